"""Kills a writer at random moments of saving over an older model, and loads what is left. Started by test_saving.py.

usage: crash_writer.py FOLDER KILLS SHARD_SIZES; prints a JSON report. On a slow disk, where a save waits long for every
file to be safe, it stops early: after `SECONDS`, but with some kills done.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from families import tiny_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import fluid_hf

SECONDS, FEWEST = 60.0, 5


def fill(model: torch.nn.Module, value: float) -> None:
    """Make every weight equal: a model that mixes two saves is seen at once."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def write_forever(model: torch.nn.Module, folder: Path, sizes: list[str]) -> None:
    generation = 2
    while True:
        fill(model, float(generation))
        fluid_hf.save_pretrained(model, folder, max_shard_size=sizes[generation % len(sizes)])
        (folder.parent / "saving").write_text(str(generation))
        os.replace(folder.parent / "saving", folder.parent / "saved")  # a kill must not leave it half written
        generation += 1


def left(folder: Path) -> list[str]:
    """What killed writers have left of saves that were not complete."""
    return [str(path) for path in (*folder.parent.glob(f".{folder.name}.*"), *folder.rglob("*.tmp"))]


def main(folder: Path, kills: int, sizes: list[str]) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # bars share a lock with forked processes, and the dead never give it back
    model = fluid_hf.patch_model(tiny_model("qwen3_moe"), fluid_hf.FluidConfig(ep_size=1))
    fill(model, 1.0)
    fluid_hf.save_pretrained(model, folder, max_shard_size=sizes[0])
    start = time.perf_counter()
    fluid_hf.save_pretrained(model, folder, max_shard_size=sizes[0])
    duration = time.perf_counter() - start
    chance, found = random.Random(0), []
    for _ in range(kills):
        enough = len(found) >= FEWEST and any(case["aside"] for case in found)
        if enough and time.perf_counter() - start > SECONDS:
            break
        (folder.parent / "saved").write_text("0")
        child = os.fork()
        if child == 0:
            write_forever(model, folder, sizes)
        time.sleep(chance.uniform(0, 4 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        values = {float(value) for parameter in loaded.parameters() for value in parameter.unique()}
        saved = (folder.parent / "saved").read_text()
        found.append({"values": sorted(values), "saved": saved, "aside": len(left(folder))})
    fluid_hf.save_pretrained(model, folder, max_shard_size=sizes[-1])
    print(json.dumps({"found": found, "left": left(folder)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
