"""Makes the attention layers of a Hugging Face model sequence parallel, and undoes it.

The model's own forward keeps running on this rank's piece of the sequence. What crosses pieces is prepared once per
forward pass, before the first layer: positions of the whole sequences and the masks of the core attention, made by
transformers' own mask functions. A keyword argument takes it to the layers, also when a checkpoint runs again.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from fluid_hf.attention.attention_context import AttentionContext
from fluid_hf.attention.fused_projection import Projections
from fluid_hf.attention.head_layouts import HeadNorms
from fluid_hf.attention.heads import HeadLayout
from fluid_hf.attention.overlapped import overlapped_attention
from fluid_hf.attention.planner import choose_head_chunks
from fluid_hf.attention.rotary import RotaryTables
from fluid_hf.attention.sequence import ShardedSequence, gather_sequence
from fluid_hf.attention.ulysses import ulysses_attention
from fluid_hf.comm.calibration import MEASURED, measure_speed
from fluid_hf.comm.call_form import CallForm, check_forms, describe_ranks
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.errors import ConfigError, RankMismatchError, UnsupportedModelError
from fluid_hf.models.attention import PROJECTIONS, AttentionSite
from fluid_hf.models.attention_forms import AttentionForm, find_attention_form
from fluid_hf.models.core_arguments import CoreLayer, core_arguments
from fluid_hf.models.fused_parts import is_fused
from fluid_hf.models.mask_code import read_mask_code
from fluid_hf.models.sequence_inputs import by_position, check_inputs, for_rotary
from fluid_hf.nodes import apart
from fluid_hf.overlap.wgrad import WgradScheduler

__all__ = ["LayerAttention", "OverlappedForward", "SequenceParallel", "take_interface"]

INTERFACE = "fluid_sequence_parallel"
KEYWORD = "fluid_sequence"
MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LAYER_ARGUMENTS = (KEYWORD, "position_embeddings", "attention_mask", "past_key_values")


class _Whole:
    """Stands for sequences that each rank holds whole (evaluation, generation)."""


WHOLE = _Whole()


class _InterfaceConfig:
    """A layer's view of its config in which the attention implementation is ours; all else is the config's."""

    def __init__(self, config: Any) -> None:
        self.__dict__["original"] = config

    def __getattr__(self, name: str) -> Any:
        if name == "_attn_implementation":
            return INTERFACE
        if name == "original" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.original, name, value)


class LayerAttention:
    """What one layer's attention needs; hangs on the layer while it is sequence parallel.

    Args:
        site: the layer.
        exchange: exchange of the sequence-parallel group.
    """

    def __init__(self, site: AttentionSite, exchange: PeerExchange) -> None:
        self.layout: HeadLayout = site.layout
        self.kind = site.kind
        self.exchange = exchange
        self.config: Any = site.module.config
        self._has_sinks = hasattr(site.module, "sinks")
        # Fixed now: whatever later replaces the function for the whole process (DeepSpeed's Ulysses) stays outside.
        module: Any = inspect.getmodule(type(site.module))
        self._functions = dict(ALL_ATTENTION_FUNCTIONS) | {"eager": getattr(module, "eager_attention_forward", None)}

    def core(self) -> Any:
        """The model's own attention function, as its config names it now."""
        name = self.config._attn_implementation
        function = self._functions.get(name)
        if function is None:
            raise UnsupportedModelError(f"attn_implementation ({name!r}) was unknown when the model was patched.")
        return function

    @torch.compiler.disable  # exchanges are host code, here and below: the compiled parts end there
    def run(
        self, module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention interface: queries, keys and values [B, N, L, D] of this rank's tokens to [B, L, N, D]."""
        sequence = kwargs.pop(KEYWORD, None)
        if sequence is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} was called without what the model's forward prepares; call the whole model, "
                "one whose layers pass keyword arguments on to their attention."
            )
        if not isinstance(sequence, ShardedSequence):
            output: tuple[torch.Tensor, torch.Tensor | None]
            output = self.core()(CoreLayer(module, self.config, None), q, k, v, attention_mask, **kwargs)
            return output

        def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.call_core(module, sequence, q, k, v, kwargs)

        self.exchange.at(f"attention {getattr(module, 'layer_idx', '')}".strip(), "exchange of heads")
        return ulysses_attention(q, k, v, core, self.layout, self.exchange), None

    def call_core(
        self,
        module: nn.Module,
        sequence: ShardedSequence,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """The core on some heads of the whole sequence: [B, n, T, D] to [B, T, n, D]."""
        sinks: Any = module.sinks if self._has_sinks else None
        if sinks is not None:  # one of each query head; only layers that exchange all heads at once have them
            first = self.exchange.rank * self.layout.local_q
            sinks = sinks[first : first + self.layout.local_q]
            kwargs = {**kwargs, "s_aux": sinks} if "s_aux" in kwargs else kwargs
        layer = CoreLayer(module, self.config, q.shape[1] // k.shape[1], sinks)
        kwargs = {**kwargs, **sequence.arguments}
        output: torch.Tensor = self.core()(layer, q, k, v, sequence.masks[self.kind], **kwargs)[0]
        return output


class OverlappedForward:
    """Stands in for the forward of a layer whose code is known: projections overlap with their exchange.

    Args:
        module: the layer.
        form: what its own forward does.
        attention: what hangs on the layer.
        scheduler: weight gradient scheduler.
        chunks: pieces the heads are cut into; `None` lets the planner choose.
    """

    def __init__(
        self,
        module: nn.Module,
        form: AttentionForm,
        attention: LayerAttention,
        scheduler: WgradScheduler,
        chunks: int | None,
    ) -> None:
        self.module: Any = module
        self._own = module.forward
        self._form, self._attention, self._chunks = form, attention, chunks
        norms = {name: type(getattr(module, name)) for name in ("q_norm", "k_norm")} if form.normed else {}
        self._kinds: dict[str, type] = dict.fromkeys(PROJECTIONS, nn.Linear) | norms
        head_dim: Any = module.head_dim
        name = f"attention {getattr(module, 'layer_idx', '')}".strip()
        self.context = AttentionContext(attention.exchange, attention.layout, head_dim, scheduler, name=name)

    @torch.compiler.disable
    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward."""
        sequence = kwargs.get(KEYWORD)
        if args or not isinstance(sequence, ShardedSequence) or sequence.rotary is None or not self.is_plain():
            return self._own(hidden_states, *args, **kwargs)
        module, form, chunks = self.module, self._form, self._chunks
        if not chunks:
            tokens, size = hidden_states.shape[0] * hidden_states.shape[1], module.q_proj.weight.element_size()
            layout = self.context.layout
            sent = layout.bytes_sent(tokens, self.context.head_dim, size)
            chunks = choose_head_chunks(sent, layout.sp_size, self.context.exchange.speed)
        extra = {name: value for name, value in kwargs.items() if name not in LAYER_ARGUMENTS}
        extra["scaling"], extra["dropout"] = module.scaling, module.attention_dropout if module.training else 0.0
        extra |= form.window(module)

        def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self._attention.call_core(module, sequence, q, k, v, extra)

        norms = None
        if form.normed:
            norms = HeadNorms(module.q_norm.weight, module.k_norm.weight, module.q_norm.variance_epsilon)
        output = overlapped_attention(hidden_states, self.context, self._read, chunks, sequence.rotary, core, norms)
        return output, None

    def is_plain(self) -> bool:
        """Whether what is not called here would compute the same: no adapters, forwards of somebody's own, computed
        weights, or hooks.
        """
        modules: Any = self.module._modules  # not by attribute: that costs the host a microsecond
        for name, kind in self._kinds.items():
            module: nn.Module = modules[name]
            if type(module) is not kind or any([getattr(module, hooks) for hooks in HOOKS]):
                return False
            if "forward" in module.__dict__ and not is_fused(module):
                return False
        weights = [modules[name]._parameters.get("weight") for name in PROJECTIONS]
        return all([isinstance(weight, nn.Parameter) for weight in weights])

    def _read(self) -> Projections:
        modules = self.module._modules
        parameters = [(name[0], modules[name]._parameters) for name in PROJECTIONS]
        return Projections(
            {key: found["weight"] for key, found in parameters}, {key: found["bias"] for key, found in parameters}
        )


def _interface(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module.fluid_attention.run(module, *args, **kwargs)


def take_interface(module: nn.Module, attention: Any) -> None:
    """Let a layer's attention interface be `attention.run`, for this layer alone."""
    AttentionInterface.register(INTERFACE, _interface)
    layer: Any = module
    layer.fluid_attention = attention
    layer.config = _InterfaceConfig(layer.config)


class SequenceParallel:
    """Sequence parallelism of one model; `attach` turns it on, `detach` off.

    Args:
        model: the model.
        sites: its attention layers.
        exchange: exchange of the sequence-parallel group, of size 2 or more.
        scheduler: weight gradient scheduler.
        overlap: `False` runs every layer's own forward, with plain all-to-alls around the core.
        chunks: pieces the heads are cut into; `None` lets the planner choose.

    Attributes:
        overlapped: layers whose projections overlap with their exchange, by module name.
        gather: puts the ranks' pieces of positions and masks together.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[AttentionSite],
        exchange: PeerExchange,
        scheduler: WgradScheduler,
        *,
        overlap: bool = True,
        chunks: int | None = None,
    ) -> None:
        self.overlapped: dict[str, OverlappedForward] = {}
        self.exchange = exchange
        self.gather = gather_sequence
        self._model: Any = model
        self._sites = list(sites)
        self._scheduler, self._chunks, self._overlap = scheduler, chunks, overlap
        self._kinds = sorted({site.kind for site in sites})
        body: Any = model.base_model
        self._masks_by_position = read_mask_code(body).by_position
        self._hooks: list[Any] = []

    def attach(self) -> None:
        """Change the layers and hook the model."""
        body = self._model.base_model
        for site in self._sites:
            module: Any = site.module
            attention = LayerAttention(site, self.exchange)
            form = find_attention_form(module) if self._overlap and _rotary(body) is not None else None
            if form is not None:
                forward = OverlappedForward(module, form, attention, self._scheduler, self._chunks)
                self.overlapped[site.name] = module.forward = forward
                self._hooks.append(module.register_forward_pre_hook(by_position, with_kwargs=True))
            take_interface(module, attention)
        self._hooks.append(body.register_forward_pre_hook(self._prepare, with_kwargs=True))
        if body is not self._model:
            self._hooks.append(self._model.register_forward_pre_hook(self._check_labels, with_kwargs=True))

    def detach(self) -> None:
        """Put everything back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for site in self._sites:
            module: Any = site.module
            module.config = module.config.original
            if site.name in self.overlapped:
                del module.forward
            del module.fluid_attention
        self.overlapped = {}

    def _check_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _named(model, args, kwargs)
        sharded = given.get("sequence_sharded", model.training)
        if sharded and given.get("labels") is not None and given.get("shift_labels") is None:
            raise ConfigError(
                "labels of a piece of a sequence must come as shift_labels: the label of its last token is on the next "
                "rank; use model.fluid.shard_batch and model.fluid.sequence_loss."
            )

    @torch.compiler.disable
    def _prepare(
        self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Before the model's body runs: gather what the layers must know about the whole sequences."""
        given = _named(body, args, kwargs)
        sharded = given.pop("sequence_sharded", None)
        if not (body.training if sharded is None else sharded):
            return (), {**given, KEYWORD: WHOLE}
        with apart():
            sequence = self._whole_sequences(body, given)
        given["use_cache"] = False
        # transformers takes a 4-D mask as it is, and ours are used instead: no mask is made for the piece alone.
        given["attention_mask"] = sequence.position_ids.new_empty((1, 1, 1, 1), dtype=torch.bool)
        return (), {**given, KEYWORD: sequence}

    def _whole_sequences(self, body: nn.Module, given: dict[str, Any]) -> ShardedSequence:
        self.exchange.drain()
        check_inputs(given, self.exchange.size)
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        positions, mask = given["position_ids"], given.get("attention_mask")
        self._check_calls(tokens, positions, mask)
        if self.exchange.speed is None and self.overlapped and tokens.device.type in MEASURED:
            self.exchange.at("attention", "calibration")
            self.exchange.speed = measure_speed(self.exchange, tokens.device)  # host synchronisation, once per model
        positions = self.gather(positions, self.exchange)
        mask = self.gather(mask, self.exchange) if mask is not None else None
        embeds = self._stand_in(tokens, positions)
        rotary = _rotary(body)
        tables = None
        if rotary is not None and self.overlapped:
            cos, sin = rotary(embeds, for_rotary(rotary, positions))
            tables = RotaryTables.shaped(cos, sin, self.exchange.size)
        arguments = core_arguments(self._model.config._attn_implementation, positions, tokens.shape[0])
        return ShardedSequence(positions, self._masks(embeds, positions, mask), tables, arguments)

    def _check_calls(self, tokens: torch.Tensor, positions: torch.Tensor, mask: Any) -> None:
        dtype = torch.get_autocast_dtype(tokens.device.type) if torch.is_autocast_enabled(tokens.device.type) else None
        own = [*tokens.shape[:2], positions.shape[0], 0 if mask is None else mask.shape[0]]
        own += CallForm(dtype or self._dtype(), 0, 0, 0, 0).words
        own.append(sum(not forward.is_plain() for forward in self.overlapped.values()))
        place = "the forward pass of sequences"
        values = self.exchange.all_gather(torch.tensor(own, device=tokens.device), place)
        calls = self.exchange.read(torch.stack(values), place)  # host synchronisation, once per forward pass
        check_forms([call[4:-1] for call in calls], self.exchange.ranks, "attention")
        changed = {rank: call[-1] for rank, call in zip(self.exchange.ranks, calls, strict=True)}
        if len(set(changed.values())) > 1:
            raise RankMismatchError(
                f"attention layers with hooks or adapters on their projections ({describe_ranks(changed)}) must be as "
                "many on all ranks that share sequences; add and remove them on every rank alike."
            )
        shapes = [call[:4] for call in calls]
        for rank, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise RankMismatchError(
                    f"pieces of a sequence must have equal shapes on all ranks of its group: rank 0 of the group has "
                    f"[sequences, tokens] {shapes[0][:2]}, rank {rank} has {shape[:2]} (position_ids and "
                    f"attention_mask for {shapes[0][2:]} and {shape[2:]} sequences); use model.fluid.shard_batch."
                )

    def _stand_in(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """For the embeddings of the whole sequences, where only their sizes, type and device are read."""
        dtype = self._dtype()
        if torch.is_autocast_enabled(tokens.device.type):
            dtype = torch.get_autocast_dtype(tokens.device.type)
        one = torch.empty((), dtype=dtype, device=tokens.device)
        return one.expand(tokens.shape[0], positions.shape[1], 1)

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self._model.parameters() if p.is_floating_point()), torch.float32)

    @torch.no_grad()
    def _masks(self, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
        common: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask}
        if self._masks_by_position:
            common["position_ids"] = positions
        config = self._model.config
        return {kind: MASKS[kind](config=config, past_key_values=None, **common) for kind in self._kinds}


def _rotary(body: nn.Module) -> Any:
    """The model's rotary embedding, if it is called as transformers' Llama-like models call it."""
    rotary = getattr(body, "rotary_emb", None)
    if rotary is None or list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"]:
        return None
    return rotary


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
