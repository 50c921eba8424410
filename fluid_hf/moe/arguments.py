"""What a layer may be called with: shapes and types, told apart by attributes alone, so that nothing waits."""

from __future__ import annotations

import torch

from fluid_hf.errors import ConfigError

__all__ = ["check_arguments", "fit"]


def fit(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, hidden_size: int | None) -> bool:
    """Whether arguments can be used as they are; the host has next to nothing to do for it.

    Args:
        hidden, index, weights: arguments of `fluid_hf.moe.layer.ExpertParallelLayer`.
        hidden_size: H, if the layer knows it.
    """
    tokens, chosen = hidden.shape, index.shape
    return (
        len(tokens) == 2
        and len(chosen) == 2
        and tokens[0] == chosen[0]
        and (tokens[1] == hidden_size or hidden_size is None)
        and weights.shape == chosen
        and index.dtype is torch.int64
        and hidden.dtype.is_floating_point
        and weights.dtype.is_floating_point
    )


def check_arguments(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, hidden_size: int | None, layer: str
) -> None:
    """Say which argument cannot be used. Integers other than int64 can, once they are converted.

    Args:
        hidden, index, weights, hidden_size: as for `fit`.
        layer: its name.

    Raises:
        ConfigError: names the argument, its type and shape, and what is expected.
    """
    size = "H" if hidden_size is None else hidden_size
    fits = hidden.dim() == 2 and hidden_size in (None, hidden.shape[1]) and hidden.dtype.is_floating_point
    _require(fits, "hidden_states", hidden, f"floating point [T, {size}]", layer)
    integers = not (index.dtype.is_floating_point or index.dtype.is_complex or index.dtype is torch.bool)
    fits = index.dim() == 2 and index.shape[0] == hidden.shape[0] and integers
    _require(fits, "top_k_index", index, f"integers [{hidden.shape[0]}, K], a row for each token", layer)
    fits = weights.shape == index.shape and weights.dtype.is_floating_point
    _require(fits, "top_k_weights", weights, f"floating point {list(index.shape)}, as top_k_index", layer)


def _require(fits: bool, name: str, given: torch.Tensor, expected: str, layer: str) -> None:
    if not fits:
        raise ConfigError(
            f"{name} ({given.dtype} {list(given.shape)}) in the call of layer {layer} must be {expected}; the call is "
            "experts(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K])."
        )
