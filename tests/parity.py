"""The parity matrix on CPU ranks, many cells in one start of the processes.

    python tests/parity.py --world 2                       every pair of settings
    python tests/parity.py --world 2 --strength 3          every triple
    python tests/parity.py --world 4 --fixed engine=zero3 trained=lora_experts --all
    torchrun --nproc_per_node 2 tests/parity.py --seconds 100 --json cells.json --fixed compiled=False
                                                           on ranks that are started already (GPUs over NCCL), in parts

Each finished cell is a line of --json; cells that are in it already are not run again, so a run can be continued.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fluid_hf.bench.parity import CellResult, markdown_summary, run
from fluid_hf.bench.parity_cells import FACTORS, Cell, all_cells, covering_cells

HANG = 120  # seconds in which a collective must end


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2, help="ranks to start, unless torchrun did")
    parser.add_argument("--strength", type=int, default=2, help="2 for every pair of settings, 3 for every triple")
    parser.add_argument("--all", action="store_true", help="every cell (narrow it with --fixed)")
    parser.add_argument("--cell", nargs="+", metavar="NAME=VALUE", help="one cell, plain in all other settings")
    parser.add_argument("--fixed", nargs="*", default=[], metavar="NAME=VALUE", help="settings with one value only")
    parser.add_argument("--seed", type=int, default=0, help="which of the many covering arrays")
    parser.add_argument("--seconds", type=float, help="start no more cells after so long; --json continues")
    parser.add_argument("--json", type=Path, help="file with one line per finished cell")
    parser.add_argument("--quiet", action="store_true", help="print only what is not equal")
    return parser.parse_args(arguments)


def read_fixed(pairs: list[str]) -> dict[str, Any]:
    fixed = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        known = {str(value): value for value in FACTORS[name]}
        fixed[name] = known[text]
    return fixed


def choose(options: argparse.Namespace, world: int) -> list[Cell]:
    fixed = read_fixed(options.fixed)
    if options.cell:
        return [Cell(**read_fixed(options.cell))]
    if options.all:
        return list(all_cells(world, fixed=fixed))
    return covering_cells(world, strength=options.strength, seed=options.seed, fixed=fixed)


def read_results(path: Path | None) -> list[CellResult]:
    if path is None or not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [CellResult(Cell(**line["cell"]), line["status"], line["detail"], line["seconds"]) for line in lines]


def write_result(path: Path | None, result: CellResult) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")


def work(options: argparse.Namespace) -> bool:
    """All cells that have no result yet, on this rank; whether the promise held."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_float32_matmul_precision("highest")  # an environment may ask for TF32, which is no float32
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if cuda:
        # Ranks may share a GPU; DeepSpeed goes by LOCAL_RANK.
        os.environ["LOCAL_RANK"] = str(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if "RANK" in os.environ:
        timeout = datetime.timedelta(seconds=HANG)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    done = read_results(options.json)
    known = {result.cell for result in done}
    cells = [cell for cell in choose(options, world) if cell not in known]

    def report(result: CellResult) -> None:
        write_result(options.json, result)
        if not (options.quiet and result.status == "equal"):
            print(
                f"{result.status:<8} {result.seconds:5.1f} s  {result.cell.name}\n         {result.detail}", flush=True
            )

    results = done + run(cells, seconds=options.seconds, report=report)
    if int(os.environ.get("RANK", 0)) == 0:
        counts = collections.Counter(result.status for result in results)
        print(markdown_summary(results))
        print(
            f"{len(results)} of {len(done) + len(cells)} cells on {world} ranks: "
            + ", ".join(f"{n} {status}" for status, n in counts.items())
        )
    return all(result.good for result in results)


def main() -> int:
    options = parse()
    if "RANK" in os.environ:
        return 0 if work(options) else 1
    from distributed import launch

    done = launch(__file__, *sys.argv[1:], nproc=options.world, launcher="torchrun", timeout=24 * 3600, capture=False)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
