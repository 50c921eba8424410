"""The process groups that DeepSpeed keeps for a whole process."""

from __future__ import annotations

from deepspeed.utils import groups

from fluid_hf.process_groups import is_alive

__all__ = ["forget_destroyed_groups"]


def forget_destroyed_groups() -> None:
    """Let DeepSpeed make anew what `torch.distributed.destroy_process_group` has destroyed.

    Only its own `deepspeed.comm.destroy_process_group` forgets such groups; it would hand them out again.
    """
    experts = (groups._get_expert_parallel_group_dict(), groups._get_expert_data_parallel_group_dict())
    kept = [group for known in experts for group in known.values()]
    kept += [groups._WORLD_GROUP] if groups._WORLD_GROUP is not None else []
    destroyed = [group for group in kept if not is_alive(group)]
    # All of them: the default group went, and what DeepSpeed keeps elsewhere with it.
    for group in [None] if destroyed and len(destroyed) == len(kept) else destroyed:
        groups._release_process_group_references(group)
