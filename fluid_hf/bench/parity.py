"""The parity matrix: whatever a user switches on, numbers equal one process, or a named error comes before training."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from fluid_hf.bench.parity_cells import Cell, covering_cells
from fluid_hf.bench.parity_train import Outcome, train_patched, train_plain
from fluid_hf.comm.faults import peer_error
from fluid_hf.errors import FluidError
from fluid_hf.process_groups import backend_of

__all__ = ["CellResult", "markdown_summary", "run"]

EXACT = 1e-5  # float32: relative error of losses and norms; of weight changes beside their rounding
References = dict[tuple[Cell, bool], Outcome]
LOW_PRECISION = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float16_static": 2.0**-11, "autocast": 2.0**-8}


@dataclasses.dataclass(frozen=True)
class CellResult:
    """What became of one cell.

    Attributes:
        cell: the settings.
        status: `"equal"`; `"refused"` (a named error on every rank before training); `"unavailable"` (the plain model
            fails in the same way); `"wrong"` (other numbers); `"failed"` (any other error, or on some ranks only).
        detail: the error, or the largest deviation over what is allowed, with its place.
        seconds: how long it took.
    """

    cell: Cell
    status: str
    detail: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether the promise holds."""
        return self.status in ("equal", "refused", "unavailable")


class _Control:
    """What ranks tell each other about a cell, beside the process groups that the cell uses.

    Args:
        world: ranks of the default process group.
        seconds: how long a rank waits for the others.
    """

    def __init__(self, world: int, seconds: float) -> None:
        self._ranks, self._seconds = list(range(world)), seconds
        timeout = datetime.timedelta(seconds=seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world > 1 else None

    def gather(self, value: Any, place: str, raised: str = "") -> list[Any]:
        """The values of all ranks.

        Args:
            value: this rank's.
            place: what it belongs to, for the error.
            raised: what this rank has raised there; the others may be stuck for it.

        Raises:
            PeerError: a rank does not come.
        """
        values: list[Any] = [value] * len(self._ranks)
        if self._group is not None:
            try:
                dist.all_gather_object(values, value, group=self._group)
            except RuntimeError as error:
                others = [rank for rank in self._ranks if rank != dist.get_rank()]
                raise peer_error(self._ranks, others, place, self._seconds, raised or error) from error
        return values

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None:
            dist.destroy_process_group(self._group)


def run(
    cells: Iterable[Cell] | None = None,
    *,
    strength: int = 2,
    fixed: dict[str, Any] | None = None,
    seconds: float | None = None,
    report: Callable[[CellResult], None] | None = None,
    timeout_seconds: float = 300.0,
) -> list[CellResult]:
    """Train every cell and compare. Collective over all ranks of the default process group, if there is one.

    Args:
        cells: which; by default those that contain every possible combination of `strength` settings.
        strength: 2 for every pair of settings.
        fixed: settings with one value only, by name (`{"family": "mixtral"}`).
        seconds: start no more cells after so long; `None` for all of them.
        report: called on rank 0 with each result as it comes.
        timeout_seconds: how long a rank waits for another one to end a cell.

    Returns:
        All results, equal on all ranks; fewer than there are cells if time was over.

    Raises:
        PeerError: a rank did not end a cell in time.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", torch.cuda.current_device()) if _on_cuda() else torch.device("cpu")
    if cells is None:
        cells = covering_cells(world, strength=strength, fixed=fixed)
    control = _Control(world, timeout_seconds)
    references: References = {}
    results: list[CellResult] = []
    start = time.monotonic()
    for cell in cells:
        if seconds is not None and control.gather(time.monotonic() - start > seconds, "the choice of cells")[0]:
            break
        result = run_cell(cell, device, rank, world, control, references)
        results.append(result)
        if report is not None and rank == 0:
            report(result)
    control.close()
    return results


def run_cell(
    cell: Cell,
    device: torch.device,
    rank: int,
    world: int,
    control: _Control,
    references: References,
) -> CellResult:
    """One cell; `references` keeps what rank 0 has computed for cells that need the same."""
    start = time.monotonic()
    outcome, errors = _attempt(cell, device, world, control, patched=True)
    if not errors:
        verdict = _judge(cell, outcome, device, world, references) if rank == 0 and outcome else ("", "")
        status, detail = control.gather(verdict, f"the comparison of {cell.name}")[0]
        return CellResult(cell, status, detail, time.monotonic() - start)
    status = "refused" if len(errors) == world and all(named for named, _ in errors.values()) else "failed"
    first = next(iter(errors))
    if status == "failed" and len(errors) == world:
        _, theirs = _attempt(cell, device, world, control, patched=False)
        if {text for _, text in theirs.values()} == {text for _, text in errors.values()}:
            status = "unavailable"
    return CellResult(cell, status, f"rank {first}: {errors[first][1]}", time.monotonic() - start)


def _attempt(
    cell: Cell, device: torch.device, world: int, control: _Control, *, patched: bool
) -> tuple[Outcome | None, dict[int, tuple[bool, str]]]:
    """Train; what each rank that raised has raised, with whether it was a named error."""
    outcome, report = None, None
    try:
        outcome = train_patched(cell, device, patched=patched)
    except Exception as error:
        report = (isinstance(error, FluidError), f"{type(error).__name__}: {error}")
    raised = "" if report is None else f"this rank raised {report[1]}"
    reports = control.gather(report, f"the training of {cell.name}", raised)
    return outcome, {rank: found for rank, found in enumerate(reports) if found is not None}


def markdown_summary(results: list[CellResult]) -> str:
    """One line per setting and value: how many cells ended in which way."""
    statuses = ("equal", "refused", "unavailable", "wrong", "failed")
    lines = ["| " + " | ".join(["setting", "value", *statuses]) + " |", "|---|---|" + "---|" * len(statuses)]
    for field in dataclasses.fields(Cell):
        for value in dict.fromkeys(getattr(result.cell, field.name) for result in results):
            found = [result.status for result in results if getattr(result.cell, field.name) == value]
            counts = [str(found.count(status)) for status in statuses]
            lines.append("| " + " | ".join([field.name, str(value), *counts]) + " |")
    return "\n".join(lines)


def _on_cuda() -> bool:
    return torch.cuda.is_available() and (not dist.is_initialized() or backend_of() == "nccl")


def _judge(cell: Cell, outcome: Outcome, device: torch.device, world: int, references: References) -> tuple[str, str]:
    """Compare with one process in float32; reduced types may be off by twice what the plain model is off by."""
    exact = _reference(cell, True, device, world, references)
    if cell.dtype == "float32":
        worst, place = _deviation(outcome, exact, {})
    else:
        allowed = _errors(_reference(cell, False, device, world, references), exact)
        floor = 4 * LOW_PRECISION[cell.dtype]
        worst, place = _deviation(outcome, exact, {name: 2 * error + floor for name, error in allowed.items()})
    return ("equal" if worst <= 1 else "wrong"), f"{worst:.2f} of what is allowed, at {place}"


def _reference(cell: Cell, exact: bool, device: torch.device, world: int, references: References) -> Outcome:
    """What one process without fluid_hf gives; only some settings matter to it."""
    kept = (
        "family",
        "sp_size",
        "checkpointing",
        "accumulation",
        "dtype",
        "trained",
        "aux_loss",
        "jitter",
        "batch",
        "num_items",
    )
    engine = "torch" if cell.engine == "torch" else "zero1"
    cell = Cell(engine=engine, **{name: getattr(cell, name) for name in kept})
    if (cell, exact) not in references:
        references[cell, exact] = train_plain(cell, device, world, exact=exact)
    return references[cell, exact]


def _errors(found: Outcome, exact: Outcome) -> dict[str, float]:
    """Relative errors of losses and norms of each step, and of the change of each weight."""
    errors: dict[str, float] = {}
    for what in ("losses", "norms"):
        pairs = zip(getattr(found, what), getattr(exact, what), strict=True)
        errors |= {f"{what}[{step}]": abs(ours / theirs - 1) for step, (ours, theirs) in enumerate(pairs)}
    if all(norm != norm for norm in found.norms):  # not reported; the clipped changes below depend on them
        errors = {name: error for name, error in errors.items() if not name.startswith("norms")}
    for name, after in exact.after.items():
        change = after - exact.before[name]
        rounding = 2.0**-22 * float(after.norm())  # of the weight itself, which the change was added to
        missed = float((found.after[name] - found.before[name] - change).norm())
        errors[name] = max(0.0, missed - rounding) / float(change.norm()) if float(change.norm()) else missed
    return errors


def _deviation(found: Outcome, exact: Outcome, allowed: dict[str, float]) -> tuple[float, str]:
    """The largest error over what is allowed, and where."""
    if found.after.keys() != exact.after.keys():
        return float("inf"), f"names {sorted(found.after.keys() ^ exact.after.keys())[:4]}"
    ratios = {name: error / allowed.get(name, EXACT) for name, error in _errors(found, exact).items()}
    place = max(ratios, key=lambda name: ratios[name] if ratios[name] == ratios[name] else float("inf"))
    return (ratios[place] if ratios[place] == ratios[place] else float("inf")), place
