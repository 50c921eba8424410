"""The list of planted faults follows the code, and the script tells caught from missed."""

from __future__ import annotations

import mutations
import pytest
from distributed import ROOT

MUTATIONS = mutations.MUTATIONS


def test_there_are_enough() -> None:
    assert len(MUTATIONS) >= 30 and len({(m.file, m.old) for m in MUTATIONS}) == len(MUTATIONS)


def test_faults_can_be_planted() -> None:
    for mutation in MUTATIONS:
        text = (ROOT / "fluid_hf" / mutation.file).read_text(encoding="utf-8")
        assert mutation.old in text, f"{mutation.file} has no {mutation.old!r}: update tests/mutations.py"
        assert mutation.old != mutation.new and (ROOT / mutation.test.partition("::")[0]).is_file()
        compile(text.replace(mutation.old, mutation.new, 1), mutation.file, "exec")


def test_script_catches_a_planted_fault(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["mutations.py", "--only", "(part + 1)"])
    assert mutations.main() == 0
    assert "1 of 1 planted faults were caught" in capsys.readouterr().out
