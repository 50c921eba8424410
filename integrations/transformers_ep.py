"""transformers' expert parallelism on fluid_hf's layer: `DistributedConfig(ep_size=n, ep_implementation="fluid")`.

Importing this module registers it. Models load, shard (also under FSDP2) and save as transformers does it; only the
exchange of tokens and the order of the computation are fluid_hf's. Weight gradients are computed in the communication
window of their own layer and reach the parameters through autograd, before FSDP's hooks look for them.

Shared experts run where transformers calls them, before or after the exchange: the forward that it puts on an experts
module takes three tensors and returns one, so a block cannot hand its shared expert on to run in between.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.errors import ConfigError, UnsupportedModelError
from fluid_hf.models.expert_formats import expert_format, is_experts, weight_names
from fluid_hf.moe.general_experts import GeneralMath
from fluid_hf.moe.general_layer import ROLES
from fluid_hf.moe.layer import ExpertParallelLayer, WaveChoice
from fluid_hf.overlap.wgrad import WgradScheduler

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError as error:
    raise ConfigError(
        f"transformers ({transformers.__version__}) must have transformers.distributed.expert_parallel, where expert "
        "parallelism can be registered; install transformers 5.23, or use fluid_hf.patch_model."
    ) from error

__all__ = ["FluidEP"]


class FluidEP(EPImplementation):  # type: ignore[misc]
    """`ep_implementation="fluid"`: rows are sent once per rank and computed while others travel.

    Args:
        experts: experts module whose parameters are already split over `ep_mesh`.
        ep_mesh: ranks that share the experts.
        tp_mesh: ranks that hold the same batch; each takes a slice of it.

    Raises:
        UnsupportedModelError: the experts have parameters besides projections and biases.
    """

    name = "fluid"

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.layer = _ModuleExperts(experts, ep_mesh)

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of each token's experts [T, H]; a collective over the expert-parallel group."""
        self.layer.train(self.layer.is_training())
        if self.tp_mesh.size() == 1:
            output = self.layer(hidden_states, top_k_index, top_k_weights)
            assert isinstance(output, torch.Tensor)
            return output
        num_tokens, hidden = hidden_states.shape
        # Every rank of the group has the same tokens: each sends a slice of them. Backward gathers the gradients.
        slices = (
            DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
            .redistribute(self.tp_mesh, [Shard(0)])
            .to_local()
            for tensor in (hidden_states, top_k_index, top_k_weights)
        )
        output = self.layer(*slices).contiguous()
        shape = torch.Size((num_tokens, hidden))
        whole = DTensor.from_local(output, self.tp_mesh, [Shard(0)], shape=shape, stride=(hidden, 1))
        return whole.full_tensor()


class _ModuleExperts(ExpertParallelLayer):
    """The layer on the parameters of a module that transformers has split; it has none of its own."""

    def __init__(self, experts: Any, ep_mesh: DeviceMesh) -> None:
        where = type(experts).__name__
        if not is_experts(experts):
            raise UnsupportedModelError(f"{where} does not follow `use_experts_implementation`.")
        format = expert_format(experts, where)
        if format is not None and format.extra:
            raise UnsupportedModelError(
                f"{where} has parameters that all ranks hold ({', '.join(format.extra)}); FSDP replaces them at every "
                'step, out of the layer\'s sight. Use ep_implementation "all_to_all", or fluid_hf.patch_model.'
            )
        group = ep_mesh.get_group()
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        super().__init__(
            experts.num_experts * size,
            PeerExchange(group, rank, size),
            WgradScheduler("layer"),
            getattr(experts, "act_fn", nn.functional.silu),
            wave_choice=WaveChoice(None),
        )
        self.weight_names = weight_names(experts)
        self.context.math = None if format is None else GeneralMath(format)
        # Not a child: the parameters belong to the module, under the names that transformers loads and saves.
        self._experts = (experts,)

    def is_training(self) -> bool:
        """Whether the module is in training mode."""
        return bool(self._experts[0].training)

    def expert_parameters(self) -> dict[str, torch.Tensor]:
        """As they are now: FSDP gathers them for forward and again for backward."""
        gated = self.context.math is None
        roles = {"gate_up_proj": "gate_up", "down_proj": "down"} if gated else ROLES
        found = {roles[name]: _local(getattr(self._experts[0], name)) for name in self.weight_names}
        down = found.pop("down")
        return {**found, "down": down}


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """In forward transformers has made parameters local already; in backward they are as FSDP gathered them."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


EPImplementationInterface.register(FluidEP.name, FluidEP)
