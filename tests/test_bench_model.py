"""`fluid-hf bench model` on two gloo ranks: all variants agree, all modes are timed."""

from __future__ import annotations

import json
from pathlib import Path

from distributed import ROOT, launch


def test_all_variants_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "bench.py"
    script.write_text("import sys\nfrom fluid_hf.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    out = tmp_path / "model.json"
    options = ["--models", "tiny", "--link", "gloo", "--sequence", "16", "--batch", "1", "--repeats", "1", "--step"]
    done = launch(script, "bench", "model", *options, "--json", str(out), launcher="torchrun", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    (cell,) = json.loads(out.read_text())["cells"]
    assert set(cell["variants"]) == {"row per expert", "serial", "fluid_hf", "AutoEP", "AllToAllEP"}
    for name, error in cell["errors"].items():
        assert error <= 1e-5, (name, error)
    for name, times in cell["variants"].items():
        patched = name in ("row per expert", "serial", "fluid_hf")
        assert set(times) == {"inference", "forward", "backward", *(["step"] if patched else [])}
        assert all(time["median"] > 0 for time in times.values())
