"""What must be equal on all ranks that exchange rows in one call, in two integers that travel with the counts.

Rows of other widths or types would be read as something else, or end the process group. Nothing is sent beside what is
sent anyway: the integers are two more columns of the counts, which every rank reads before it waits for a row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fluid_hf.errors import RankMismatchError

__all__ = ["NUM_WORDS", "CallForm", "call_form", "check_forms", "describe_ranks", "dtype_code"]

NUM_WORDS = 2
DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_GRADIENT, FIXED_INPUT, INPUT_GRADIENT = 0, 1, 2
REMEDIES = {
    "dtype": "enter the same torch.autocast on every rank, and convert the model on every rank alike",
    "top_k": "let the router of every rank choose as many experts for each token (num_experts_per_tok)",
    "hidden_size": "build the same layer on every rank",
    "waves": "call model.train() or model.eval() on every rank alike, and pass the same waves",
    "requires_grad of the input": "freeze the same parameters on every rank",
}


@dataclass(frozen=True)
class CallForm:
    """One call of one layer.

    Attributes:
        dtype: type that rows travel in.
        top_k: experts per token, below 2**13.
        hidden: hidden size, below 2**31.
        waves: waves of the exchange; 255 and more count as equal.
        gradient: 0 without gradients, 1 with gradients but those of the input, 2 with all.
    """

    dtype: torch.dtype
    top_k: int
    hidden: int
    waves: int
    gradient: int

    @functools.cached_property
    def words(self) -> tuple[int, int]:
        """All of it in `NUM_WORDS` integers that are not negative and below 2**31."""
        packed = dtype_code(self.dtype) | self.gradient << 8 | min(self.waves, 255) << 10 | self.top_k << 18
        return packed, self.hidden

    @staticmethod
    def fields(words: Sequence[int]) -> dict[str, Any]:
        """What the words of a rank say, by the names that users know; without what need not be equal."""
        packed, hidden = words
        code = packed & 255
        dtype = DTYPES[code] if code < len(DTYPES) else f"number {code}, which no rank sends"
        found = {"dtype": dtype, "top_k": packed >> 18, "hidden_size": hidden}
        found["waves"] = packed >> 10 & 255
        gradient = packed >> 8 & 3
        return found if gradient == NO_GRADIENT else {**found, "requires_grad of the input": gradient == INPUT_GRADIENT}


@functools.lru_cache(maxsize=64)
def call_form(dtype: torch.dtype, top_k: int, hidden: int, waves: int, gradient: int) -> CallForm:
    """The form, made once for all calls that are alike."""
    return CallForm(dtype, top_k, hidden, waves, gradient)


def dtype_code(dtype: torch.dtype) -> int:
    """A small number for a type; 0 for one that nothing is computed in."""
    return DTYPES.index(dtype) if dtype in DTYPES else 0


def check_forms(words: Sequence[Sequence[int]], ranks: Sequence[int], layer: str) -> None:
    """Raise if the ranks of a group call a layer in different ways; all of them see the same and raise alike.

    Args:
        words: `CallForm.words` of every rank of the group.
        ranks: their global ranks.
        layer: name of the layer.

    Raises:
        RankMismatchError: names the field, every rank's value and the remedy.
    """
    first = words[0]
    if all([other[0] == first[0] and other[1] == first[1] for other in words]):
        return
    forms = [CallForm.fields(word) for word in words]
    for field, remedy in REMEDIES.items():
        values = {rank: form[field] for rank, form in zip(ranks, forms, strict=True) if field in form}
        if len(set(values.values())) > 1:
            raise RankMismatchError(
                f"{field} ({describe_ranks(values)}) must be equal on all ranks that call layer {layer} together; "
                f"{remedy}."
            )


def describe_ranks(values: dict[int, Any]) -> str:
    """Each value with the ranks that have it."""
    ranks: dict[str, list[str]] = {}
    for rank, value in values.items():
        ranks.setdefault(str(value), []).append(str(rank))
    return "; ".join(f"rank {', '.join(held)}: {value}" for value, held in ranks.items())
