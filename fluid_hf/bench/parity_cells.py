"""Cells of the parity matrix: settings that users combine, which combinations exist, and covering arrays of them."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any

__all__ = ["FACTORS", "Cell", "all_cells", "covering_cells", "impossible", "refused"]

# Every value of every setting. The first value is the plainest: it fills places that nothing else asks for.
FACTORS: dict[str, tuple[Any, ...]] = {
    "family": ("mixtral", "qwen2_moe", "qwen3_moe"),
    "ep_size": (1, 2, 4, 8),
    "sp_size": (1, 2),
    "engine": ("torch", "zero0", "zero1", "zero2", "zero3"),
    "offload": ("none", "cpu"),
    "checkpointing": ("none", "reentrant", "non_reentrant"),
    "accumulation": (1, 4),
    "dtype": ("float32", "bfloat16", "float16", "float16_static", "autocast"),
    "wgrad": ("layer", "off", "cross_layer"),
    "exchange": ("planned", "waves3", "serial"),
    "recompute": (False, True),
    "trained": ("all", "no_experts", "no_down", "only_experts", "no_router", "lora_attention", "lora_experts"),
    "lora_order": ("patch_first", "lora_first"),
    "aux_loss": (False, True),
    "jitter": (False, True),
    "compiled": (False, True),
    "batch": ("even", "padded", "uneven"),
    "num_items": (False, True),
}

# Combinations that fluid_hf refuses with a named error.
SPLIT, LORA, TRAINED = (2, 4), ("lora_attention", "lora_experts"), ("all", "no_down", "only_experts", "no_router")
REFUSALS: tuple[dict[str, tuple[Any, ...]], ...] = (
    {"sp_size": (2,), "wgrad": ("cross_layer",)},
    {"engine": ("zero0",), "dtype": ("float16", "float16_static")},
    {"ep_size": SPLIT, "engine": ("zero0",), "dtype": ("bfloat16",), "trained": TRAINED},
    {"ep_size": SPLIT, "engine": ("zero3",), "trained": ("no_experts", *LORA)},
    {"ep_size": SPLIT, "trained": ("lora_experts",), "lora_order": ("patch_first",)},
)
# The plain model fails too: ZeRO 3's hooks do not allow the router's input to be changed in place, and free weights
# before their gradient comes where a layer's input has none.
UNAVAILABLE: tuple[dict[str, tuple[Any, ...]], ...] = (
    {"engine": ("zero3",), "jitter": (True,)},
    {"engine": ("zero3",), "trained": ("only_experts",), "checkpointing": ("none",)},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of settings.

    Attributes:
        family: model type, as transformers names it.
        ep_size: expert parallel size.
        sp_size: sequence parallel size: so many ranks share a batch.
        engine: `"torch"` for a plain loop, or DeepSpeed at a ZeRO stage.
        offload: where ZeRO keeps optimizer states.
        checkpointing: activation checkpointing.
        accumulation: micro-batches per step.
        dtype: of the model; `"float16"` with a dynamic and `"float16_static"` with a static loss scale; `"autocast"` is
            a float32 model under bfloat16 autocast.
        wgrad, exchange, recompute: fluid_hf's own settings (`exchange`: overlapped as planned, in 3 waves, or serial).
        trained: which parameters are trained.
        lora_order: whether the model is patched before or after PEFT wraps it.
        aux_loss: `output_router_logits`, which adds the auxiliary loss.
        jitter: noise on the router's input (Mixtral).
        compiled: `torch.compile` on the model (without code generation on a CPU).
        batch: equal token counts; padded with masked labels; or other numbers and lengths of sequences on every rank
            (with sequence parallelism: in every group, and not divisible by its size).
        num_items: losses scaled by the number of labels on all ranks, as the Trainer does.
    """

    family: str = "mixtral"
    ep_size: int = 1
    sp_size: int = 1
    engine: str = "torch"
    offload: str = "none"
    checkpointing: str = "none"
    accumulation: int = 1
    dtype: str = "float32"
    wgrad: str = "layer"
    exchange: str = "planned"
    recompute: bool = False
    trained: str = "all"
    lora_order: str = "patch_first"
    aux_loss: bool = False
    jitter: bool = False
    compiled: bool = False
    batch: str = "even"
    num_items: bool = False

    @property
    def name(self) -> str:
        """What differs from the plainest cell, for reports."""
        return " ".join(
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name in ("family", "ep_size", "engine") or getattr(self, field.name) != field.default
        )


def impossible(values: dict[str, Any], world_size: int) -> str | None:
    """Why a (partial) combination cannot exist with or without fluid_hf; None if it can.

    Args:
        values: settings chosen so far, by name.
        world_size: number of ranks.
    """
    has = values.get
    stage = str(has("engine", "zero1"))
    if world_size % int(has("ep_size", 1)) or int(has("ep_size", 1)) > 4:
        return "ep_size must divide the number of ranks and of experts (4)"
    if world_size % int(has("sp_size", 1)):
        return "sp_size must divide the number of ranks"
    if has("sp_size", 1) > 1 and has("jitter"):
        return "each piece of a sequence draws its own noise, which one process cannot draw"
    if has("offload") == "cpu" and stage in ("torch", "zero0"):
        return "only ZeRO 1 to 3 offload"
    if has("jitter") and has("family", "mixtral") != "mixtral":
        return "only Mixtral has router jitter"
    if str(has("dtype")).startswith("float16") and stage == "torch":
        return "float16 needs DeepSpeed's loss scaling"
    if has("lora_order") == "lora_first" and not str(has("trained", "lora_")).startswith("lora"):
        return "no LoRA, no order"
    return None


def refused(values: dict[str, Any]) -> bool:
    """Whether fluid_hf must refuse a (partial) combination with a named error before training."""
    return _held(values, REFUSALS)


def _held(values: dict[str, Any], rules: tuple[dict[str, tuple[Any, ...]], ...]) -> bool:
    return any(all(values.get(name) in some for name, some in rule.items()) for rule in rules)


def all_cells(world_size: int, *, fixed: dict[str, Any] | None = None) -> Iterator[Cell]:
    """The whole matrix (hundreds of thousands of cells); `fixed` narrows it."""
    names = list(FACTORS)
    choices = [[fixed[name]] if fixed and name in fixed else FACTORS[name] for name in names]
    for picked in itertools.product(*choices):
        values = dict(zip(names, picked, strict=True))
        if impossible(values, world_size) is None:
            yield Cell(**values)


def covering_cells(
    world_size: int, *, strength: int = 2, seed: int = 0, fixed: dict[str, Any] | None = None
) -> list[Cell]:
    """Cells that contain every combination of `strength` settings that can be trained, and one for each that cannot.

    A cell that cannot shows nothing about its other settings, so combinations are looked for in the others. Greedy
    one-row-at-a-time construction (AETG; Cohen, Dalal, Fredman and Patton, 1997).

    Args:
        world_size: number of ranks.
        strength: 1 for every value once, 2 for every pair, 3 for every triple.
        seed: which of the many such arrays.
        fixed: settings with one value only.
    """
    factors = {name: (fixed[name],) if fixed and name in fixed else values for name, values in FACTORS.items()}

    def valid(values: dict[str, Any]) -> bool:
        return impossible(values, world_size) is None and not _held(values, REFUSALS + UNAVAILABLE)

    missing = _combinations(factors, strength, valid)
    pick = random.Random(seed)
    cells: list[Cell] = []
    while missing:
        rows = [_row(factors, missing, strength, valid, pick) for _ in range(8)]
        best = max(rows, key=lambda row: len(_covered(row, missing, strength)))
        missing -= _covered(best, missing, strength)
        cells.append(Cell(**best))
    return cells + _failing_cells(factors, world_size)


def _failing_cells(factors: dict[str, tuple[Any, ...]], world_size: int) -> list[Cell]:
    """The plainest cell of every combination of values that cannot be trained."""
    found: dict[Cell, None] = {}
    for rule in REFUSALS + UNAVAILABLE:
        for values in itertools.product(*rule.values()):
            chosen = dict(zip(rule, values, strict=True))
            row = _complete(chosen, factors, lambda values: impossible(values, world_size) is None)
            if row is not None and all(value in factors[name] for name, value in chosen.items()):
                found[Cell(**row)] = None
    return list(found)


Combination = tuple[tuple[str, Any], ...]


def _combinations(factors: dict[str, tuple[Any, ...]], strength: int, valid: Any) -> set[Combination]:
    found = set()
    for names in itertools.combinations(factors, strength):
        for values in itertools.product(*(factors[name] for name in names)):
            chosen = dict(zip(names, values, strict=True))
            if valid(chosen) and _complete(chosen, factors, valid) is not None:
                found.add(tuple(chosen.items()))
    return found


def _complete(chosen: dict[str, Any], factors: dict[str, tuple[Any, ...]], valid: Any) -> dict[str, Any] | None:
    """The plainest whole row that contains `chosen`, if there is one."""
    row = dict(chosen)
    for name, values in factors.items():
        if name not in row:
            fitting = next((value for value in values if valid({**row, name: value})), None)
            if fitting is None:
                return None
            row[name] = fitting
    return row


def _row(
    factors: dict[str, tuple[Any, ...]], missing: set[Combination], strength: int, valid: Any, pick: random.Random
) -> dict[str, Any]:
    """A row that starts from one missing combination and takes the value that covers most at each further setting."""
    row = dict(pick.choice(sorted(missing, key=repr)))
    names = [name for name in factors if name not in row]
    pick.shuffle(names)
    for name in names:
        fitting = [value for value in factors[name] if valid({**row, name: value})]
        if not fitting:  # a dead end: the plainest row with what was asked for
            whole = _complete(dict(list(row.items())[:strength]), factors, valid)
            assert whole is not None
            return whole
        gains = {value: len(_covered({**row, name: value}, missing, strength, name)) for value in fitting}
        most = max(gains.values())
        row[name] = pick.choice([value for value in fitting if gains[value] == most])
    return {name: row[name] for name in factors}


def _covered(
    row: dict[str, Any], missing: set[Combination], strength: int, must: str | None = None
) -> set[Combination]:
    """Missing combinations that a (partial) row contains; with `must`, only those of that setting."""
    order = [name for name in FACTORS if name in row]
    found = set()
    for names in itertools.combinations(order, strength):
        if must is None or must in names:
            combination = tuple((name, row[name]) for name in names)
            if combination in missing:
                found.add(combination)
    return found
