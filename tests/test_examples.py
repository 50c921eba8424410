"""The examples on 2 CPU ranks, the first of them as a user starts it; each is short and explains its arguments."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from distributed import ROOT, launch, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = ROOT / "examples"
SCRIPTS = ["pretrain.py", "finetune_lora.py", "plain_loop.py", "generate.py", "accelerate_loop.py", "sft_trl.py"]
SMALL = ["--steps", "12", "--max-mb", "0.15", "--seq-len", "32", "--batch-size", "2"]
PROMPTS = ["def main(", "import"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_are_short_and_explain_every_argument(name: str) -> None:
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 120
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    arguments = [call for call in calls if call.args and getattr(call.args[0], "value", "").__class__ is str]
    added = [
        call
        for call in arguments
        if getattr(call.func, "id", getattr(call.func, "attr", "")) in ("add", "add_argument")
    ]
    assert len(added) >= 2
    for call in added:
        assert any(keyword.arg == "help" for keyword in call.keywords), ast.unparse(call)


@pytest.fixture(scope="module", autouse=True)
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Path] | None]:
    """Runs beside the tests that do not need it: its launcher and its ranks import one after the other."""
    wanted = any("checkpoint" in getattr(item, "fixturenames", ()) for item in request.session.items)
    with ThreadPoolExecutor(1) as beside:
        yield beside.submit(pretrain, tmp_path_factory.mktemp("pretrain")) if wanted else None


def pretrain(output: Path) -> Path:
    done = launch(EXAMPLES / "pretrain.py", *SMALL, "--profile-steps", "5", "6", "--output", str(output))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "reloaded              yes" in done.stdout
    return output


@pytest.fixture
def checkpoint(launched: Future[Path] | None) -> Path:
    assert launched is not None
    return launched.result()


def test_lora_trains_and_saves_an_adapter(tmp_path: Path) -> None:
    assert "weights trained" in run_script(EXAMPLES / "finetune_lora.py", *SMALL, "--output", str(tmp_path))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "adapter").iterdir()}


def test_accelerate_without_trainer(tmp_path: Path) -> None:
    printed = run_script(EXAMPLES / "accelerate_loop.py", "--epochs", "2", "--output", str(tmp_path / "out"))
    assert "wgrad in windows 100%" in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_experts == 8


def test_supervised_fine_tuning_with_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    printed = run_script(EXAMPLES / "sft_trl.py", *SMALL, "--output", str(tmp_path))
    first, last = re.findall(r"loss ([0-9.]+) -> ([0-9.]+)", printed)[0]
    assert float(last) < float(first)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_api_pages_build(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    text = (EXAMPLES / "guides" / "api.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("pdoc "))
    arguments = line.split()[1:]
    arguments[arguments.index("api")] = str(tmp_path)
    run_script("pdoc", *arguments, nproc=1)
    page = (tmp_path / "fluid_hf.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in ("patch_model", "FluidConfig", "ExpertParallelExperts"))
    assert 'id="FluidCallback"' in (tmp_path / "fluid_hf/integrations/trainer.html").read_text(encoding="utf-8")


def test_pretraining_saves_a_model_and_a_profile(checkpoint: Path) -> None:
    assert (checkpoint / "checkpoint" / "config.json").is_file()
    summary = json.loads((checkpoint / "fluid_profile" / "timeline.json").read_text())
    assert len(summary["layers"]) == 4 and 0 < summary["overlap_ratio"] < 1


def test_generated_text_is_that_of_transformers(checkpoint: Path) -> None:
    folder = checkpoint / "checkpoint"
    arguments = [str(folder), "--new-tokens", "8", "--prompt", *PROMPTS]
    printed = run_script(EXAMPLES / "generate.py", *arguments)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = tokenizer.batch_decode(
        model.generate(**inputs, max_new_tokens=8, do_sample=False), skip_special_tokens=True
    )
    assert printed == "".join(f"--- {text}\n" for text in expected)
