"""DeepSpeed engines for sequence-parallel models: every rank a data-parallel rank, whatever `mpu` accelerate brings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups

from fluid_hf.errors import ConfigError
from fluid_hf.process_groups import ParallelGroups
from fluid_hf.state import FluidState

__all__ = ["SequenceParallelState", "sequence_parallel_engine"]


class SequenceParallelState:
    """What DeepSpeed's helpers and the Trainer's loss ask an `mpu` for, with every rank a data-parallel rank.

    DeepSpeed's own sequence-parallel `mpu` makes ZeRO 0 to 2 divide gradients by world / sp_size, though the Trainer's
    loss already sums over the sequence-parallel group: gradients come out sp_size times too big (ZeRO 3 divides by the
    world size and is right). The engine of a patched model is therefore built without an `mpu`, so that every stage
    takes the mean over all ranks; this object only answers where the sequence-parallel group is asked for.

    Args:
        groups: groups of the patched model.
        data_parallel_group: group of all ranks.
    """

    def __init__(self, groups: ParallelGroups, data_parallel_group: dist.ProcessGroup) -> None:
        self._groups, self._data_parallel_group = groups, data_parallel_group

    def get_sequence_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that share one sequence."""
        return self._groups.sp_group

    def get_sequence_parallel_world_size(self) -> int:
        """Their number."""
        return self._groups.sp_size

    def get_sequence_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self._groups.sp_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """All ranks: gradients are averaged over them."""
        return self._data_parallel_group

    def get_data_parallel_world_size(self) -> int:
        """Number of ranks."""
        return self._groups.world_size

    def get_data_parallel_rank(self) -> int:
        """This rank."""
        return dist.get_rank()

    def get_data_parallel_group_ranks(self) -> range:
        """Global ranks of all ranks."""
        return range(self._groups.world_size)

    def get_model_parallel_world_size(self) -> int:
        """No tensor parallelism."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """No tensor parallelism."""
        return 0


@contextlib.contextmanager
def sequence_parallel_engine(arguments: dict[str, Any], settings: Any, state: FluidState) -> Iterator[None]:
    """Build the engine without an `mpu`, so that gradients are averaged over all ranks at every ZeRO stage."""
    mpu: Any = arguments.get("mpu")
    groups = state.groups
    given = mpu.get_sequence_parallel_world_size() if hasattr(mpu, "get_sequence_parallel_world_size") else None
    if given is not None and given != groups.sp_size:
        raise ConfigError(
            f"sp_size ({groups.sp_size}) of the patched model must equal that of the mpu ({given}) given to "
            "deepspeed.initialize; patch the model with the same sp_size."
        )
    _check_mesh(arguments.get("mesh_param"), settings, groups)
    if groups.sp_size == 1:
        yield
        return
    if mpu is not None and given is None:
        raise ConfigError(
            f"mpu ({type(mpu).__name__}) cannot be combined with sp_size ({groups.sp_size}); leave mpu out."
        )
    arguments["mpu"] = arguments["mesh_param"] = None
    name = "config" if arguments.get("config") is not None else "config_params"
    if isinstance(settings, dict):  # batch sizes count sequences, of which sp_size ranks share one
        settings = {key: value for key, value in settings.items() if key != "data_parallel_size"}  # else, a mesh
        arguments[name] = {**settings, "sequence_parallel_size": groups.sp_size}
    deepspeed_groups.mpu = None
    yield
    if mpu is not None:
        deepspeed_groups.mpu = SequenceParallelState(groups, deepspeed_groups._get_data_parallel_group())


def _check_mesh(mesh_param: Any, settings: Any, groups: ParallelGroups) -> None:
    """Refuse meshes that tell other ranks to share sequences than the patched model's.

    Of a mesh DeepSpeed 0.19 averages gradients over the first dimension only, and ranks would drift apart.

    Raises:
        ConfigError: names the mesh and the shape that it must have.
    """
    found: dict[str, tuple[int, ...]] = {}
    settings = settings if isinstance(settings, dict) else {}
    if mesh_param:
        found["mesh_param"] = tuple(mesh_param)
    elif "data_parallel_size" in settings and (groups.sp_size > 1 or "sequence_parallel_size" in settings):
        sizes = (settings["data_parallel_size"], settings.get("sequence_parallel_size", groups.sp_size))
        found["data_parallel_size and sequence_parallel_size"] = sizes
    fitting = groups.world_size // groups.sp_size, groups.sp_size
    for name, shape in found.items():
        if shape != fitting:
            raise ConfigError(
                f"{name} {shape} of deepspeed.initialize must be {fitting} for a model patched with sp_size "
                f"({groups.sp_size}); patch the model with the sp_size that you want, and leave out the mesh."
            )
    kept = deepspeed_groups.mesh_device
    if kept is not None and (ranks := kept.get_group("data_parallel").size()) != groups.world_size:
        raise ConfigError(
            f"the mesh that another engine has left in deepspeed.utils.groups ({ranks} data-parallel ranks) must have "
            f"all {groups.world_size}, or gradients are averaged over some of them only; train one of the two models "
            "in another process."
        )
