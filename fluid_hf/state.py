"""`model.fluid`: what belongs to one patched model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from fluid_hf.attention.sequence import sequence_parallel_loss, shard_batch
from fluid_hf.backends import Backend
from fluid_hf.comm.gradients import LeftGradients, UntrainedExperts, left_to_us, refuse_flattened, square_sum
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.comm.reduce import all_reduce_in_time, spread_overflow
from fluid_hf.comm.same_weights import check_same_weights
from fluid_hf.config import FluidConfig
from fluid_hf.control import ControlGroup, HeldGroups
from fluid_hf.errors import ConfigError, GradientError, RankMismatchError
from fluid_hf.metrics import global_load, imbalance, read_loads
from fluid_hf.models.adapters import check_adapters
from fluid_hf.models.attention_wgrad import CrossLayerWgrad
from fluid_hf.models.sequence_parallel import SequenceParallel
from fluid_hf.models.sequence_router import RouterGather
from fluid_hf.models.stored_experts import StoredExperts
from fluid_hf.moe.layer import ExpertParallelLayer
from fluid_hf.overlap.sampler import OverlapSampler
from fluid_hf.overlap.wgrad import WgradScheduler, WgradStats
from fluid_hf.process_groups import ParallelGroups, set_group_timeout

__all__ = ["FluidState", "patched_elsewhere", "unwrapped"]

logger = logging.getLogger(__name__)
WATCHDOG_SECONDS = 10.0  # what a rank that has waited in vain needs to ask who is missing, and to say it


def patched_elsewhere(model: nn.Module) -> str:
    """Of a model that is not patched itself: which one is, that it holds or is a part of; "" if there is none."""
    for name, module in model.named_modules():
        if isinstance(vars(module).get("fluid"), FluidState):
            return f"its part {name} ({type(module).__name__}) is"
        if isinstance(module, ExpertParallelLayer) and module.patched_in:
            return f"it is a part of a {module.patched_in} that is"
    return ""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` and engines put around one, which pass its attributes on."""
    inside = model._modules.get("_orig_mod", model._modules.get("module"))
    return model if inside is None or "fluid" in vars(model) or not hasattr(inside, "fluid") else unwrapped(inside)


class FluidState:
    """Groups, scheduler and statistics of one patched model.

    Attributes:
        config: the settings in force, `ep_size` resolved.
        groups: process groups.
        held_groups: gives back what was made of them for this model.
        scheduler: weight gradient scheduler of all its layers.
        layers: expert-parallel layers by module name.
        originals: what `unpatch_model` puts back, by module name.
        sequence: the attention layers' sequence parallelism; `None` with `sp_size` 1.
        sequence_router: hands the balancing loss the router logits of whole sequences; `None` with `sp_size` 1.
        cross_layer: weight gradients placed in other layers' windows; `None` unless `wgrad` is `"cross_layer"`.
        sharding_check: ends the look for FSDP around split experts; `None` with `ep_size` 1.
        sequence_exchange: exchange of the sequence-parallel group.
        bound_blocks: blocks or layers with their methods that run a shared expert in the window, by module name.
        bound_methods: names of the methods of the block around a list of experts that call all of them at once, by
            the layer's name.
        expert_load: pairs of every expert by layer, as of the last `metrics()`.
        engine_bound: whether an engine drives the model.
        leave_engine: undoes what that engine hung on the layers, before another one takes the model.
        stop_measuring: ends what a training measures, if one does or has raised.
        staging_folder: where whole models are kept for the moment between gathering and saving them; `None` is the
            system's folder for temporary files.
        gathering: context in which the engine lets its partitioned parameters be gathered.
    """

    def __init__(
        self,
        config: FluidConfig,
        requested: FluidConfig,
        groups: ParallelGroups,
        backend: Backend,
        control: ControlGroup,
    ) -> None:
        self.config = config
        self.requested = requested
        self.groups = groups
        self.backend = backend
        self.control = control
        self.held_groups = HeldGroups(control, groups)
        self.scheduler = WgradScheduler(config.wgrad)
        self.exchange = PeerExchange(groups.ep_exchange, groups.ep_rank, groups.ep_size)
        self.sequence_exchange = PeerExchange(groups.sp_exchange, groups.sp_rank, groups.sp_size)
        for exchange in (self.exchange, self.sequence_exchange):
            exchange.timeout_seconds = config.timeout_seconds
            set_group_timeout(exchange.group, config.timeout_seconds, WATCHDOG_SECONDS)
        self.sequence: SequenceParallel | None = None
        self.sequence_router: RouterGather | None = None
        self.cross_layer: CrossLayerWgrad | None = None
        self.sharding_check: RemovableHandle | None = None
        self._left, self._untrained, self._compared = LeftGradients(), UntrainedExperts(), False
        self.layers: dict[str, ExpertParallelLayer] = {}
        self.originals: dict[str, nn.Module | StoredExperts] = {}
        self.bound_blocks: dict[str, tuple[nn.Module, list[str]]] = {}
        self.bound_methods: dict[str, list[str]] = {}
        self.engine_bound = False
        self.leave_engine: Callable[[], object] = contextlib.nullcontext
        self.stop_measuring: Callable[[], object] = contextlib.nullcontext
        self.staging_folder: str | None = None
        self.gathering: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.expert_load: dict[str, list[int]] = {}
        self._last_stats = WgradStats()

    def finish_batch(self) -> WgradStats:
        """End a batch: `scheduler.finish_batch()`, and nothing may be left in flight.

        Raises:
            WgradPendingError: see `WgradScheduler.finish_batch`.
            RoutingError: on a GPU with `ep_size` 1, of a call whose kernels have found an expert id out of range.
        """
        self.exchange.drain()
        self.sequence_exchange.drain()
        for layer in self.layers.values():
            layer.context.late_status.check(layer.context.name)
        self._last_stats = self.scheduler.finish_batch()
        return self._last_stats

    def shard_batch(
        self, batch: Mapping[str, Any], *, pad_token_id: int = 0, pad_to_multiple: bool = True
    ) -> dict[str, Any]:
        """This rank's piece of a batch that all ranks of its sequence-parallel group hold whole.

        Collective over the group. See `fluid_hf.attention.sequence.shard_batch`; with `sp_size` 1 the batch keeps its
        length and only gets `position_ids` and `shift_labels`.
        """
        return shard_batch(batch, self.sequence_exchange, pad_token_id=pad_token_id, pad_to_multiple=pad_to_multiple)

    def sequence_loss(
        self,
        logits: torch.Tensor,
        shift_labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy over the labelled tokens of whole sequences, from this rank's piece.

        Collective over the sequence-parallel group. See `fluid_hf.attention.sequence.sequence_parallel_loss`.
        """
        return sequence_parallel_loss(logits, shift_labels, self.sequence_exchange, num_items_in_batch)

    def metrics(self, tokens: int = 0) -> dict[str, float]:
        """Counts since the last call. Collective over all ranks; waits for the device once.

        Args:
            tokens: tokens this rank has trained on since the last call, to be summed over the ranks.

        Returns:
            `fluid/bytes_sent` (for experts and attention) and `fluid/rows_sent` of this rank; over all ranks
            `fluid/tokens`, `fluid/busiest_expert` (pairs of the busiest expert over the mean of its layer, largest over
            layers) and `fluid/busiest_rank` (the same for the ranks of an expert-parallel group);
            `fluid/wgrad_in_window` (share of the weight gradients of the last batch that ran inside a communication
            window). Loads by layer are left in `expert_load`.
        """
        loads = read_loads(self.layers)
        rows = sum(layer.context.stats.rows for layer in self.layers.values())
        for layer in self.layers.values():
            layer.context.stats.reset()
        reports = self.control.gather((loads, tokens), "model.fluid.metrics()")
        size = self.groups.ep_size
        self.expert_load = {name: global_load([load for load, _ in reports], name, size) for name in self.layers}
        by_rank = {
            name: [sum(load[rank * len(load) // size : (rank + 1) * len(load) // size]) for rank in range(size)]
            for name, load in self.expert_load.items()
        }
        exchanges = {self.exchange, self.sequence_exchange}
        sent = sum(exchange.bytes_sent for exchange in exchanges)
        for exchange in exchanges:
            exchange.bytes_sent = 0
        return {
            "fluid/bytes_sent": float(sent),
            "fluid/rows_sent": float(rows),
            "fluid/tokens": float(sum(count for _, count in reports)),
            "fluid/busiest_expert": max(map(imbalance, self.expert_load.values()), default=0.0),
            "fluid/busiest_rank": max(map(imbalance, by_rank.values()), default=0.0),
            "fluid/wgrad_in_window": self._last_stats.share_inside,
        }

    def count(self, on: bool) -> None:
        """Whether calls add to what `metrics` tells."""
        self.exchange.counting = self.sequence_exchange.counting = on
        for layer in self.layers.values():
            layer.context.stats.counting = on

    def start_sampling(self, device: torch.device, again: OverlapSampler | None = None) -> OverlapSampler:
        """Measure every exchange until `stop_sampling`: how long it was in flight, how long computation waited.

        Args:
            device: where the rows live.
            again: an earlier one whose result was read, to be used once more; a new one by default.
        """
        if again is not None:
            again.restart()
        sampler = again if again is not None else OverlapSampler(device)
        self.exchange.sampler = self.sequence_exchange.sampler = sampler
        return sampler

    def stop_sampling(self) -> None:
        """Measure no more."""
        self.exchange.sampler = self.sequence_exchange.sampler = None

    @contextlib.contextmanager
    def record_events(self) -> Iterator[list[tuple[str, str]]]:
        """Collect `(layer name, event)` in the order in which the host issues them."""
        events: list[tuple[str, str]] = []
        contexts: dict[str, Any] = {name: layer.context for name, layer in self.layers.items()}
        if self.sequence is not None:
            contexts |= {name: forward.context for name, forward in self.sequence.overlapped.items()}
        for name, context in contexts.items():
            context.record = lambda event, name=name: events.append((name, event))  # type: ignore[misc]
        try:
            yield events
        finally:
            for context in contexts.values():
                context.record = None

    @torch.no_grad()
    def reduce_gradients(self, model: nn.Module) -> None:
        """Average gradients over the ranks in a loop without DeepSpeed or DDP: collective over all ranks.

        Dense gradients become the mean over the world; expert gradients, which already hold every token of their
        expert-parallel group, are summed over the expert-data-parallel group and divided by the world size. A
        parameter that no rank has used keeps `None`, and what FSDP2 has sharded is left to it. Where experts of one
        rank have a gradient that is not finite, all ranks get a NaN in theirs, so that loss scaling skips the step
        everywhere: call it before `scaler.unscale_`.

        Call it once for each time that the gradients are cleared, after the last backward pass and before clipping:
        experts' gradients that are reduced again, with others added or not, and all that are clipped first, are wrong.

        The device is not waited for; the hosts are, for the others' list of gradients.

        Raises:
            GradientError: no gradient has changed since this or `clip_grad_norm_` was called last.
            PeerError: a rank did not take part within `timeout_seconds`; names it. Over NCCL that is so until the first
                gradient, after which the group's own timeout holds.
            RankMismatchError: a parameter is frozen on some ranks only, or, looked at in the first call, the ranks'
                weights differ.
            ConfigError: the model holds experts in training that another patched model has split, or parameters that
                FSDP2 has sharded over some of the ranks only, or FullyShardedDataParallel.
        """
        check_adapters(model, self.layers.values())
        if self.groups.world_size == 1:
            return
        expert = self._split_parameters(model)
        named = left_to_us(model.named_parameters(), self.groups.world_size)
        used = self._used_anywhere(named)
        if any(used) and not self._compared:
            trained = [pair for pair, is_used in zip(named, used, strict=True) if is_used]
            check_same_weights(trained, expert, self.groups, self.control.group, self.config.timeout_seconds)
            self._compared = True
        expert_gradients = []
        for (name, parameter), is_used in zip(named, used, strict=True):
            if not is_used:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            group = self.groups.expert_data_group if id(parameter) in expert else None
            self._sum(parameter.grad, group, f"the reduction of the gradient of {name}")
            parameter.grad /= self.groups.world_size
            if id(parameter) in expert:
                expert_gradients.append(parameter.grad)
        if expert_gradients:
            spread_overflow(expert_gradients, self.config.timeout_seconds, self.groups.met)
        reduced = [parameter for (_, parameter), is_used in zip(named, used, strict=True) if is_used]
        self._left.leave(parameter.grad for _, parameter in named if parameter.grad is not None)
        if self._untrained.found({id(p) for p in reduced if id(p) in expert}, reduced):
            logger.warning(
                "the optimizer has changed parameters that have gradients, and none of the experts: build it after "
                "patch_model, and again after unpatch_model."
            )

    def _split_parameters(self, model: nn.Module) -> set[int]:
        """Ids of the parameters of which each rank of an expert-parallel group has its own.

        Raises:
            ConfigError: the model holds others, which would be taken for equal on all ranks, or pieces of parameters.
        """
        refuse_flattened(model, self.groups.world_size)
        own = set(self.layers.values())
        for name, module in model.named_modules():
            if not isinstance(module, ExpertParallelLayer) or module.ep_size == 1 or module in own:
                continue
            if any(parameter.requires_grad for parameter in module.split_parameters()):
                raise ConfigError(
                    f"experts {name} of {type(model).__name__} must be split by the model whose fluid is called, and "
                    "are not; call reduce_gradients and clip_grad_norm_ of every patched model with that model alone."
                )
        several = self.groups.ep_size > 1
        return {id(p) for layer in self.layers.values() for p in layer.split_parameters()} if several else set()

    def _used_anywhere(self, named: list[tuple[str, nn.Parameter]]) -> list[bool]:
        """Which parameters have a gradient on any rank. Experts too are used if those of any rank are: unpatched, they
        are one parameter. Over the control group, as what the hosts know needs no wait for the device.
        """
        trained = [p.requires_grad for _, p in named]
        # Optimizers step by the gradients of frozen parameters too, which were trained in an earlier backward pass of
        # the batch; those that were reduced before it, and lie there since, are not reduced again.
        used = [p.grad is not None and (p.requires_grad or not self._left.is_left(p.grad)) for _, p in named]
        if self.control.group is None:
            return used
        given = [p.grad for (_, p), is_used in zip(named, used, strict=True) if is_used and p.grad is not None]
        ends = bool(given), self._left.any_other(given), False
        # Of frozen ones too: gloo ends the process where ranks send messages of other lengths.
        rows = used, trained, [not is_trained for is_trained in trained]
        flags = torch.tensor([[*row, end] for row, end in zip(rows, ends, strict=True)], dtype=torch.uint8)
        place = "the list of gradients in reduce_gradients"
        all_reduce_in_time(
            flags, self.control.group, self.config.timeout_seconds, place, self.groups.met, dist.ReduceOp.MAX
        )
        (*used_anywhere, any_given), (*_, any_other), _ = flags.tolist()
        if any_given and not any_other:
            raise GradientError(
                f"gradients ({len(given)} on this rank) must be of a backward pass since reduce_gradients or "
                "clip_grad_norm_ was called last, and none has changed; call reduce_gradients once, after the last "
                "loss.backward() of a step, and clip_grad_norm_ after it."
            )
        anywhere = dict(zip([name for name, _ in named], flags[1:, :-1].t().tolist(), strict=True))
        differing = [name for name, (is_trained, is_frozen) in anywhere.items() if is_trained and is_frozen]
        if differing:
            first, *others = differing
            more = f", and that of {len(others)} more," if others else ""
            here = dict(named)[first].requires_grad
            raise RankMismatchError(
                f"requires_grad of {first} ({here} on this rank, {not here} on another){more} must be equal on all "
                "ranks that call reduce_gradients; freeze the same parameters on every rank."
            )
        return [bool(flag) for flag in used_anywhere]

    def _sum(self, tensor: torch.Tensor, group: dist.ProcessGroup | None, place: str) -> None:
        all_reduce_in_time(tensor, group, self.config.timeout_seconds, place, self.groups.met)

    @torch.no_grad()
    def clip_grad_norm_(self, model: nn.Module, max_norm: float) -> torch.Tensor:
        """Clip by the norm over all experts of all ranks, which `torch.nn.utils.clip_grad_norm_` cannot see.

        For a loop without DeepSpeed, after `reduce_gradients`. Collective over all ranks.

        Returns:
            The norm before clipping, float64, equal on all ranks up to rounding.

        Raises:
            ConfigError: as `reduce_gradients`.
        """
        expert = self._split_parameters(model)
        gradients = [(p.grad, id(p) in expert) for p in model.parameters() if p.grad is not None]
        device = gradients[0][0].device if gradients else None
        squares = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)]
        for gradient, is_expert in gradients:
            squares[is_expert] += square_sum(gradient)
        if self.groups.ep_size > 1:
            self._sum(squares[1], self.groups.ep_group, "the norm of the gradients")
        norm = (squares[0] + squares[1]).sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient, _ in gradients:
            gradient.mul_(scale.to(gradient.dtype))
        if max_norm != float("inf"):  # which is for the norm alone
            self._left.leave(gradient for gradient, _ in gradients)
        return norm
