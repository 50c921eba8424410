"""Do all ranks train the same weights? Asked once, of a few values of each parameter."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import nn

from fluid_hf.comm.reduce import all_reduce_in_time
from fluid_hf.errors import RankMismatchError
from fluid_hf.process_groups import ParallelGroups

__all__ = ["check_same_weights"]

SAMPLES = 16  # values of each parameter, spread over it
TOLERANCE = 0.02  # of their norm: what roundings of bfloat16 leave apart is no mistake


@torch.no_grad()
def check_same_weights(
    named: Sequence[tuple[str, nn.Parameter]],
    experts: Collection[int],
    groups: ParallelGroups,
    control: dist.ProcessGroup | None,
    timeout_seconds: float,
) -> None:
    """Raise on every rank if parameters that ranks should hold alike differ. Collective over all ranks.

    Engines and wrappers send the weights of the first rank to all; in a plain loop nobody does, and models or adapters
    that each rank has built with another seed would be trained with each other's gradients.

    Args:
        named: parameters with gradients, the same on all ranks.
        experts: ids of those of which each rank of an expert-parallel group has its own.
        groups: the model's groups.
        control: group for tensors on the CPU; `None` in a single process.
        timeout_seconds: how long to wait for the other ranks.

    Raises:
        RankMismatchError: names the first parameter, and how many more.
        PeerError: a rank did not take part.
    """
    if control is None:
        return
    samples = torch.cat([_sample(parameter) for _, parameter in named]).cpu().view(-1, SAMPLES)
    own = torch.full((groups.ep_size, *samples.shape), float("-inf"))  # which is below what other ranks have
    bounds = torch.stack([own, own])
    is_expert = torch.tensor([id(parameter) in experts for _, parameter in named])
    for side, values in enumerate((samples, -samples)):
        bounds[side, 0, ~is_expert] = values[~is_expert]
        bounds[side, groups.ep_rank, is_expert] = values[is_expert]
    place = "the comparison of the ranks' weights"
    all_reduce_in_time(bounds, control, timeout_seconds, place, groups.met, dist.ReduceOp.MAX)
    largest, smallest = bounds[0], -bounds[1]
    apart = (largest - smallest).norm(dim=-1) > TOLERANCE * largest.abs().maximum(smallest.abs()).norm(dim=-1)
    differing = [name for (name, _), differs in zip(named, apart.any(dim=0).tolist(), strict=True) if differs]
    if differing:
        more = f", and those of {len(differing) - 1} more," if len(differing) > 1 else ""
        raise RankMismatchError(
            f"weights of {differing[0]} (other values on some ranks){more} must be equal on all ranks that call "
            "reduce_gradients; call torch.manual_seed with the same number on every rank before the model or its "
            "adapters are built, or load the same files."
        )


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """Values [SAMPLES] spread over a parameter; zeros where it has none left."""
    flat = parameter.detach().reshape(-1)
    taken = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float()
    return nn.functional.pad(taken, (0, SAMPLES - taken.numel()))
