"""Expert-parallel and sequence-parallel groups: pure rank arithmetic, and their creation in plain PyTorch.

Ranks that share one set of experts are neighbours: with world size 4 and ep_size 2 the expert-parallel groups are
(0, 1) and (2, 3), the expert-data-parallel groups (ranks that hold the same experts) are (0, 2) and (1, 3). DeepSpeed's
`deepspeed.utils.groups` uses the same layout. Ranks that share one sequence are neighbours too, as in DeepSpeed's
`parallel_state_sp`; the two kinds of groups do not depend on each other.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from fluid_hf.errors import CollectiveError, ConfigError

__all__ = [
    "ParallelGroups",
    "backend_of",
    "check_alive",
    "create_groups",
    "crossing_groups",
    "expert_data_parallel_ranks",
    "expert_parallel_ranks",
    "is_alive",
    "release_exchange_groups",
    "resolve_ep_size",
    "resolve_sp_size",
    "sequence_parallel_ranks",
    "set_group_timeout",
    "tell_crossing_groups",
    "with_exchange_groups",
    "with_sequence_groups",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParallelGroups:
    """The process groups of a patched model; every group is `None` when its size is 1 without torch.distributed.

    `exchange_groups` are communicators of their own for the exchanges, over the ranks of `ep_group` (and `sp_group`).
    `met` names the groups whose ranks have met (`fluid_hf.comm.reduce.meet_first`).
    """

    ep_size: int
    ep_rank: int
    ep_group: dist.ProcessGroup | None
    expert_data_group: dist.ProcessGroup | None
    world_size: int
    sp_size: int = 1
    sp_rank: int = 0
    sp_group: dist.ProcessGroup | None = None
    exchange_groups: tuple[dist.ProcessGroup, ...] = ()
    met: set[str] = field(default_factory=set, compare=False)

    @property
    def ep_exchange(self) -> dist.ProcessGroup | None:
        """The group whose communicator carries the rows."""
        return self.exchange_groups[0] if self.exchange_groups else self.ep_group

    @property
    def sp_exchange(self) -> dist.ProcessGroup | None:
        """The group whose communicator carries the heads."""
        return self.exchange_groups[-1] if len(self.exchange_groups) > 1 else self.sp_group


def backend_of(group: dist.ProcessGroup | None = None, device: str | None = None) -> str:
    """The name of the backend that carries a group's tensors: "nccl", "gloo", ...; empty if none does.

    `dist.get_backend` gives it of groups that were started by that one name only. Of those that were started without
    one, or for each kind of device, it says "undefined" or "cpu:gloo,cuda:nccl".

    Args:
        group: `None` is the default group.
        device: kind of device that the tensors are on; `None` for a GPU, if there is one that the group serves, or else
            the CPU.
    """
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    if device is None:
        device = "cuda" if "cuda" in backends and torch.cuda.is_available() else "cpu"
    return backends.get(device, "")


def is_alive(group: dist.ProcessGroup | None) -> bool:
    """Whether torch.distributed knows a group: `destroy_process_group()` makes it forget all of them."""
    return group is not None and group in dist.distributed_c10d._world.pg_map


def check_alive(group: dist.ProcessGroup | None, what: str) -> None:
    """Raise before a collective of a group that was destroyed; `None` is the default group, or none.

    Raises:
        CollectiveError: names what was to be done.
    """
    if group is not None and not is_alive(group):
        raise CollectiveError(
            f"the process group (destroyed) must be there for {what}: a patched model keeps those with which it was "
            "patched; call torch.distributed.destroy_process_group() after the last use of the model, and patch "
            "another one after init_process_group()."
        )


def expert_parallel_ranks(world_size: int, ep_size: int) -> list[list[int]]:
    """Global ranks of each expert-parallel group."""
    return [list(range(start, start + ep_size)) for start in range(0, world_size, ep_size)]


def expert_data_parallel_ranks(world_size: int, ep_size: int) -> list[list[int]]:
    """Global ranks of each expert-data-parallel group: the ranks that hold the same experts."""
    return [list(range(index, world_size, ep_size)) for index in range(ep_size)]


def sequence_parallel_ranks(world_size: int, sp_size: int) -> list[list[int]]:
    """Global ranks of each sequence-parallel group: the ranks that share one sequence."""
    return [list(range(start, start + sp_size)) for start in range(0, world_size, sp_size)]


def crossing_groups(hosts: Sequence[str], size: int) -> list[list[int]]:
    """Global ranks of the groups of `size` neighbours that lie on more than one node.

    Args:
        hosts: the node of each rank, in rank order.
        size: `ep_size` or `sp_size`.
    """
    groups = expert_parallel_ranks(len(hosts), size) if len(hosts) % size == 0 else []
    return [ranks for ranks in groups if len({hosts[rank] for rank in ranks}) > 1]


def tell_crossing_groups(hosts: Sequence[str], **sizes: int) -> None:
    """Warn, on rank 0, where groups lie on several nodes although each would fit into one.

    Args:
        hosts: the node of each rank, in rank order.
        **sizes: `ep_size` and `sp_size`.
    """
    fewest = min((hosts.count(host) for host in set(hosts)), default=0)
    for name, size in sizes.items():
        crossing = crossing_groups(hosts, size)
        if not crossing or size > fewest or (dist.is_initialized() and dist.get_rank() != 0):
            continue
        logger.warning(
            "%s (%d): ranks %s are on several nodes, so their exchanges cross the network; number the ranks node by "
            "node, and take a size that divides the ranks of every node.",
            name,
            size,
            ", ".join(map(str, crossing[0])),
        )


def resolve_sp_size(sp_size: int | None, world_size: int) -> int:
    """The sequence parallel size to use, checked.

    Raises:
        ConfigError: `sp_size` does not divide the world size.
    """
    sp_size = sp_size or 1
    if world_size % sp_size:
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ConfigError(
            f"world size ({world_size}) must be divisible by sp_size ({sp_size}); use sp_size {_choices(fitting)}."
        )
    return sp_size


def resolve_ep_size(ep_size: int | None, world_size: int, num_experts: int, hosts: Sequence[str] = ()) -> int:
    """The expert parallel size to use: as asked, checked; or the largest divisor of the world size that fits.

    Not asked for, groups stay inside a node, where the links are fast, unless each node has one rank only.

    Args:
        ep_size: as asked.
        world_size: number of ranks.
        num_experts: experts of a layer.
        hosts: the node of each rank, in rank order; empty for one node.

    Raises:
        ConfigError: `ep_size` divides neither the world size nor the number of experts.
    """
    fitting = [n for n in range(1, world_size + 1) if world_size % n == 0 and num_experts % n == 0]
    if ep_size is None:
        inside = [size for size in fitting if not crossing_groups(hosts, size)]
        return inside[-1] if inside[-1] > 1 else fitting[-1]
    if world_size % ep_size:
        raise ConfigError(
            f"world size ({world_size}) must be divisible by ep_size ({ep_size}); use ep_size {_choices(fitting)}."
        )
    if num_experts % ep_size:
        raise ConfigError(
            f"num_experts ({num_experts}) must be divisible by ep_size ({ep_size}); use ep_size {_choices(fitting)}."
        )
    return ep_size


def create_groups(ep_size: int) -> ParallelGroups:
    """Create the expert-parallel groups in plain PyTorch. Collective over the default group when ep_size > 1."""
    if not dist.is_initialized():
        if ep_size > 1:
            raise ConfigError(
                f"ep_size ({ep_size}) needs torch.distributed, which is not initialised; launch with `deepspeed` or "
                "`torchrun` and call torch.distributed.init_process_group() first, or use ep_size 1."
            )
        return ParallelGroups(1, 0, None, None, 1)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    ep_group = edp_group = None
    if ep_size > 1:
        ep_group, _ = dist.new_subgroups_by_enumeration(expert_parallel_ranks(world_size, ep_size))
        edp_group, _ = dist.new_subgroups_by_enumeration(expert_data_parallel_ranks(world_size, ep_size))
    return ParallelGroups(ep_size, rank % ep_size, ep_group, edp_group, world_size)


def with_sequence_groups(groups: ParallelGroups, sp_size: int) -> ParallelGroups:
    """The same groups and the sequence-parallel ones. Collective over the default group when `sp_size` > 1."""
    if sp_size == 1:
        return groups
    group, _ = dist.new_subgroups_by_enumeration(sequence_parallel_ranks(groups.world_size, sp_size))
    return dataclasses.replace(groups, sp_size=sp_size, sp_rank=dist.get_rank() % sp_size, sp_group=group)


def _choices(values: list[int]) -> str:
    return " or ".join(map(str, values))


def with_exchange_groups(groups: ParallelGroups, max_ctas: int | None) -> ParallelGroups:
    """Give the exchanges NCCL communicators of their own, on streams of high priority; collective over all ranks.

    A kernel of the exchange then starts before the GEMM that was queued earlier has ended. Other backends need none.

    Args:
        max_ctas: most thread blocks that NCCL takes from the GPU for one exchange; `None` for NCCL's choice.
    """
    if groups.ep_size * groups.sp_size == 1 or backend_of() != "nccl":
        return groups
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if max_ctas is not None:
        options.config.max_ctas = max_ctas
    layouts = [expert_parallel_ranks(groups.world_size, groups.ep_size)]
    if groups.sp_size > 1:
        layouts.append(sequence_parallel_ranks(groups.world_size, groups.sp_size))
    made = [dist.new_subgroups_by_enumeration(ranks, pg_options=options)[0] for ranks in layouts]
    return dataclasses.replace(groups, exchange_groups=tuple(made))


def release_exchange_groups(groups: ParallelGroups) -> None:
    """Give back what `with_exchange_groups` and `with_sequence_groups` made."""
    for group in (*groups.exchange_groups, groups.sp_group):
        if is_alive(group):
            dist.destroy_process_group(group)


def set_group_timeout(group: dist.ProcessGroup | None, seconds: float, watchdog: float = 0.0) -> None:
    """How long a collective of the group may take; NCCL's watchdog ends the process `watchdog` seconds after that.

    Whoever waits on the host raises a named error after `seconds`, and needs the time between to say so.
    """
    if group is not None and group is not dist.group.WORLD:
        seconds += watchdog if backend_of(group) == "nccl" else 0.0
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)
