"""The expert-parallel experts as modules: built from sizes and a process group, or from the experts of an HF model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize

from fluid_hf.comm.calibration import MEASURED, measure_launch, measure_link, measure_spared
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.config import FluidConfig, check_sizes
from fluid_hf.errors import ConfigError, GradientError, UnsupportedModelError
from fluid_hf.moe.activation import Activation
from fluid_hf.moe.arguments import check_arguments, fit
from fluid_hf.moe.expert_parallel import expert_parallel, tell_malformed
from fluid_hf.moe.general_experts import GeneralMath
from fluid_hf.moe.layer_context import LayerContext
from fluid_hf.moe.shares import mark_shares
from fluid_hf.nodes import apart
from fluid_hf.overlap.cost_model import LayerSizes, hardware_of
from fluid_hf.overlap.planner import choose_waves
from fluid_hf.overlap.wgrad import WgradScheduler

__all__ = ["ExpertParallelExperts", "ExpertParallelLayer", "WaveChoice"]

# Names in `expert_parameters()` of the first projection, whole or in parts.
FIRST = ("gate_up", "gate", "up", "first", "first.0", "first.1")


class WaveChoice:
    """Number of waves, chosen once per mode (training, evaluation) for all layers that share it.

    Args:
        waves: the number to use; `None` lets the planner choose from the tokens of the first batch, averaged over the
            group, and the speed of the link, so that all its ranks choose alike.
    """

    def __init__(self, waves: int | None) -> None:
        self._fixed = waves
        self._chosen: dict[bool, int] = {}
        self._measured: tuple[float, float] | None = None

    def get(self, layer: ExpertParallelLayer, tokens: int, top_k: int, device: torch.device) -> int:
        """The number of waves for a call; the first call, and that of a mode, is a collective over the group."""
        exchange = layer.context.exchange
        if exchange.size == 1 or not layer.context.overlap:
            return self._fixed or 1
        if self._fixed is not None:
            if exchange.spared is None:
                exchange.at(layer.context.name, "calibration")
                exchange.spared = measure_spared(exchange, device)
            return self._fixed
        if layer.training not in self._chosen:
            total = torch.tensor([tokens], dtype=torch.int64, device=device)
            exchange.at(layer.context.name, "the choice of waves")
            exchange.all_reduce(total)
            (all_tokens,) = exchange.read(total)
            if self._measured is None and device.type in MEASURED:
                self._measured = measure_link(exchange, device), measure_launch(exchange, device)
            down = layer.expert_parameters()["down"]
            shape = getattr(down, "ds_shape", down.shape)  # an engine may have partitioned it
            sizes = LayerSizes(
                tokens=all_tokens // exchange.size,
                top_k=top_k,
                num_experts=layer.num_experts,
                ep_size=exchange.size,
                hidden=shape[1],
                inner=shape[2],
                element_bytes=down.element_size(),
            )
            hardware = hardware_of(device, *(self._measured or (0.0, 0.0)))
            self._chosen[layer.training] = choose_waves(sizes, hardware, training=layer.training)
        return self._chosen[layer.training]


class ExpertParallelLayer(nn.Module):
    """Base of the modules: called as `experts(hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]`.

    Attributes:
        weight_names: transformers' names of the weights that are split over the ranks.
        unstack: of experts that a model stores otherwise, makes what is stored from a weight's name and value.
        stack: of such experts, makes some experts' weight from its name and what is stored of all.
        patched_in: class of the model that was given to `patch_model`; "" for a layer of the user's own.
        patched_with: gives the first parameter as of that call, while it is there.
        hidden_size: H, if it is known whatever the layout of the weights.

    Args:
        num_experts: experts of the whole layer.
        exchange: exchange of the expert-parallel group.
        scheduler: weight gradient scheduler.
        act: activation of the gate.
        overlap, recompute: see `fluid_hf.FluidConfig`.
        wave_choice: number of waves, shared between layers.
    """

    unstack: Callable[[str, torch.Tensor], dict[str, torch.Tensor]] | None = None
    stack: Callable[[str, Mapping[str, torch.Tensor], slice], torch.Tensor] | None = None
    patched_in = ""
    patched_with: Callable[[], torch.Tensor | None] = staticmethod(lambda: None)
    hidden_size: int | None = None
    adapters_are_split = False  # whether adapters on the weights (PEFT) know that only some experts are here

    def __init__(
        self,
        num_experts: int,
        exchange: PeerExchange,
        scheduler: WgradScheduler,
        act: Activation,
        *,
        overlap: bool = True,
        recompute: bool = False,
        wave_choice: WaveChoice | None = None,
    ) -> None:
        nn.Module.__init__(self)  # by name: a subclass may have other bases whose constructors must not run
        if num_experts % exchange.size:
            raise ConfigError(f"num_experts ({num_experts}) must be divisible by ep_size ({exchange.size}).")
        self.num_experts = num_experts
        self.ep_size = exchange.size
        self.ep_rank = exchange.rank
        self.num_local_experts = num_experts // exchange.size
        self.wave_choice = wave_choice or WaveChoice(None)
        self.weight_names: tuple[str, ...] = ("gate_up_proj", "down_proj")
        self.context = LayerContext(exchange, num_experts, act, scheduler, overlap=overlap, recompute=recompute)
        if self.ep_size > 1:
            self.register_state_dict_post_hook(mark_shares)

    @property
    def last_top_k(self) -> int:
        """Experts of a token in the last call; 0 before the first one."""
        return self.context.stats.top_k

    def init_like(self, settings: ExpertParallelLayer) -> None:
        """Initialise with the settings of another layer; `__init__` of a subclass calls it first."""
        context = settings.context
        ExpertParallelLayer.__init__(
            self,
            settings.num_experts,
            context.exchange,
            context.scheduler,
            context.act,
            overlap=context.overlap,
            recompute=context.recompute,
            wave_choice=settings.wave_choice,
        )
        self.weight_names = settings.weight_names
        self.context.math = context.math

    def expert_parameters(self) -> dict[str, torch.Tensor]:
        """The weights held here, as `expert_parallel` takes them."""
        raise TypeError(f"{type(self).__name__} must define expert_parameters()")

    def named_weights(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The split ones of `expert_parameters()`, or tensors of their shapes, named and laid out by transformers."""
        math = self.context.math
        transposed = isinstance(math, GeneralMath) and math.format.transposed
        parts = [parameters[name] for name in FIRST if name in parameters]
        first = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2 if transposed else 1)
        weights = [first, parameters["down"]]
        if len(self.weight_names) == 4:
            biases = parameters.get("biases")
            if biases is None:
                pair = parameters["first_bias"], parameters["down_bias"]
            else:
                outputs = first.shape[2 if transposed else 1]
                pair = biases[:, :outputs], biases[:, outputs:]
            weights = [first, pair[0], parameters["down"], pair[1]]
        return dict(zip(self.weight_names, weights, strict=True))

    def own_weights(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What `named_weights` gives, by the names of this layer's parameters."""
        return weights

    def weights_in_parameters(self) -> dict[str, tuple[str, ...]]:
        """Names of this layer's split parameters, and which of `weight_names` each holds, whole or in part."""
        return {name: (name,) for name in self.weight_names}

    def extra_parameters(self) -> dict[str, torch.Tensor]:
        """Parameters that every rank holds whole, by the names that `context.math` knows them under."""
        math = self.context.math
        return dict(math.format.extra) if isinstance(math, GeneralMath) else {}

    def split_parameters(self) -> list[torch.Tensor]:
        """Parameters of which this rank holds its experts' share only."""
        whole = {id(parameter) for parameter in self.extra_parameters().values()}
        return [parameter for parameter in self.parameters() if id(parameter) not in whole]

    @torch.compiler.disable  # the exchange is host code between autograd nodes: the compiled parts end here
    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        between: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of each token's experts; a collective over the expert-parallel group.

        With `between`, also its result: a shared expert, computed while the rows travel.

        Raises:
            ConfigError: an argument has another shape or type; the other ranks of the group raise `RankMismatchError`.
        """
        if not fit(hidden_states, top_k_index, top_k_weights, self.hidden_size):
            self._check_arguments(hidden_states, top_k_index, top_k_weights)
            top_k_index = top_k_index.long()  # integers of another width
        with apart():
            self.context.waves = self.wave_choice.get(
                self, hidden_states.shape[0], top_k_index.shape[1], hidden_states.device
            )
        parameters = self._readable_parameters()
        return expert_parallel(hidden_states, top_k_index, top_k_weights, parameters, self.context, between)

    def _check_arguments(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        """Raise what is wrong with the arguments, once the other ranks know that their call has failed as well."""
        try:
            check_arguments(hidden, index, weights, self.hidden_size, self.context.name)
        except ConfigError:
            if self.ep_size > 1:
                math, down = self.context.math, self.expert_parameters()["down"]
                transposed = isinstance(math, GeneralMath) and math.format.transposed
                no_hidden = down.detach().new_empty(0, down.shape[2 if transposed else 1])
                top_k = self.last_top_k or 1
                self.context.waves = self.wave_choice.get(self, 0, top_k, down.device)
                tell_malformed(no_hidden, top_k, self._readable_parameters(), self.context)
            raise

    def _readable_parameters(self) -> Callable[[], dict[str, torch.Tensor]]:
        """How backward reads the weights again. Computed ones (adapters, `functional_call`) are kept from forward."""
        held, parameters = _held_tensors(self), self.expert_parameters()
        # Looked for first where torch puts them: an attribute that is not there takes a module long to find.
        adapted = "parametrizations" in self._modules and parametrize.is_parametrized(self)
        own = all([isinstance(tensor, nn.Parameter) for tensor in held])
        if self.ep_size > 1 and own and held and not self.adapters_are_split:
            self._refuse_computed(parameters)
        if own and not adapted:
            return _Readable(self, held, parameters)
        return lambda: parameters

    def _refuse_computed(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Raise where a weight is not a parameter but made from some: of these experts alone, and what it is made with
        would be taken for experts of this rank, too.
        """
        computed = [name for name, tensor in parameters.items() if not isinstance(tensor, nn.Parameter)]
        if computed:
            raise ConfigError(
                f"weight {computed[0]} of the experts {self.context.name} must be a parameter while ep_size "
                f"({self.ep_size}) is over 1, and is computed: by adapters (target_parameters), a parametrization or "
                "pruning, which would differ between ranks; call get_peft_model first and patch_model after it, or set "
                "ep_size 1."
            )

    def _replicate_for_data_parallel(self) -> Any:
        """Where `nn.DataParallel` asks for a copy on another device, to be run by another thread."""
        raise UnsupportedModelError(
            f"{type(self).__name__} cannot run under torch.nn.DataParallel (the Trainer's choice where one process "
            "sees several GPUs), which shares its state between threads; start one process per GPU with `deepspeed` "
            "or `torchrun`, or let the process see one (CUDA_VISIBLE_DEVICES)."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """How `copy.deepcopy`, `pickle` and `torch.save` copy it, or what it is a part of: not while it has a group."""
        if self.ep_size > 1:
            raise UnsupportedModelError(
                f"{type(self).__name__} cannot be copied or pickled with ep_size ({self.ep_size}) over 1: it holds "
                "some of the experts, and a process group; copy the model before patch_model, or write it with "
                "fluid_hf.save_pretrained."
            )
        return super().__reduce_ex__(protocol)

    def extra_repr(self) -> str:
        """Shown by `repr(model)`."""
        first = self.ep_rank * self.num_local_experts
        return (
            f"num_experts={self.num_experts}, held={first}..{first + self.num_local_experts - 1}, "
            f"ep_size={self.ep_size}, overlap={self.context.overlap}, wgrad={self.context.scheduler.policy!r}"
        )


class _Readable:
    """Reads a layer's parameters: in forward, at once, as they are; later if they are the same ones still."""

    def __init__(
        self, layer: ExpertParallelLayer, held: list[torch.Tensor | None], parameters: dict[str, torch.Tensor]
    ) -> None:
        self._layer, self._held = layer, held
        self._first: dict[str, torch.Tensor] | None = parameters

    def __call__(self) -> dict[str, torch.Tensor]:
        first, self._first = self._first, None
        if first is not None:
            return first
        now = _held_tensors(self._layer)
        if len(now) != len(self._held) or not all(map(operator.is_, now, self._held)):
            raise GradientError(
                f"parameters of layer {self._layer.context.name} must be those that forward was called with, and "
                "they were replaced; give torch.func.functional_call tensors that are no nn.Parameter."
            )
        return self._layer.expert_parameters()


def _held_tensors(module: nn.Module) -> list[torch.Tensor | None]:
    """Parameters of a module and those in it; walked here, since `modules()` costs the host as much as a launch."""
    held: list[torch.Tensor | None] = [*module._parameters.values()]
    for child in module._modules.values():
        if child is not None:
            held += _held_tensors(child)
    return held


class ExpertParallelExperts(ExpertParallelLayer):
    """Gated experts split over a process group, in plain PyTorch.

    Args:
        num_experts: experts of the whole layer, divisible by the group's size.
        hidden_size: H.
        intermediate_size: I.
        group: process group that shares the experts; `None` for all experts here.
        scheduler: weight gradient scheduler; its own by default.
        act: activation of the gate.
        overlap, waves, recompute: see `fluid_hf.FluidConfig`.
        device, dtype: of the weights.

    Attributes:
        gate_up_proj: parameter [E_local, 2I, H] in the layout of transformers 5.
        down_proj: parameter [E_local, H, I].

    Gradients are those of the sum of all ranks' losses: divide by the number of ranks for a mean.

    Raises:
        ConfigError: a size or setting is out of range, the group's size does not divide `num_experts`, or this rank is
            not in the group.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        group: dist.ProcessGroup | None = None,
        scheduler: WgradScheduler | None = None,
        act: Activation = nn.functional.silu,
        overlap: bool = True,
        waves: int | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size)
        FluidConfig(overlap=overlap, waves=waves, recompute=recompute)  # checks them
        if not callable(act):
            raise ConfigError(f"act ({act!r}) must be a function of a tensor, as torch.nn.functional.silu.")
        if group is not None and not isinstance(group, dist.ProcessGroup):  # what `new_group` gives ranks outside
            raise ConfigError(f"group ({group!r}) must be a process group that this rank is in, or None.")
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        super().__init__(
            num_experts,
            PeerExchange(group, rank, size),
            scheduler or WgradScheduler("layer"),
            act,
            overlap=overlap,
            recompute=recompute,
            wave_choice=WaveChoice(waves),
        )
        self.hidden_size = hidden_size
        shape = (self.num_local_experts, 2 * intermediate_size, hidden_size)
        self.gate_up_proj = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        shape = (self.num_local_experts, hidden_size, intermediate_size)
        self.down_proj = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    @classmethod
    def from_parameters(
        cls, gate_up_proj: nn.Parameter, down_proj: nn.Parameter, layer: ExpertParallelLayer
    ) -> ExpertParallelExperts:
        """A module around existing parameters (those of the experts held here), with the settings of `layer`."""
        module = cls.__new__(cls)
        module.init_like(layer)
        module.gate_up_proj, module.down_proj = gate_up_proj, down_proj
        module.hidden_size = getattr(down_proj, "ds_shape", down_proj.shape)[1]
        return module

    def expert_parameters(self) -> dict[str, torch.Tensor]:
        return {"gate_up": self.gate_up_proj, "down": self.down_proj}
