"""One sequence-parallel attention layer, timed in one process: serial, overlapped, DeepSpeed's, and the limit.

The limit of a pass is the larger of the time of its GEMMs and its core attention alone, and of its bytes alone on the
link, both measured in the same run. On the mirror link every rank's piece is this rank's: all variants see the same
rotary tables for each piece, so that outputs and gradients of all of them can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fluid_hf.attention.heads import plan_heads
from fluid_hf.attention.rotary import RotaryTables
from fluid_hf.attention.sequence import ShardedSequence
from fluid_hf.bench.attention_peers import AttentionLayer, AttentionShape, deepspeed_layer, new_layer, plain_layer
from fluid_hf.bench.layer import measure
from fluid_hf.comm.calibration import MEASURED, measure_speed
from fluid_hf.comm.peer_exchange import PeerExchange
from fluid_hf.models.attention import AttentionSite
from fluid_hf.models.attention_forms import find_attention_form
from fluid_hf.models.sequence_parallel import KEYWORD, LayerAttention, OverlappedForward, take_interface
from fluid_hf.overlap.wgrad import WgradScheduler

__all__ = ["AttentionBench", "AttentionTiming"]

Build = Callable[[], tuple[AttentionLayer, nn.Module]]


@dataclass(frozen=True)
class AttentionTiming:
    """Milliseconds per call: median and spread (90th less 10th percentile), and until the host has issued the call.

    `peak_mib` is the most memory that one forward and backward pass held above what was there before.
    """

    forward: float
    forward_spread: float
    both: float
    both_spread: float
    host_forward: float
    host_both: float
    peak_mib: float


class AttentionBench:
    """Inputs and variants of one shape on one group size.

    Args:
        shape: sizes of the layer.
        sp_size: ranks of the mirror world; torch.distributed's default group must have that size, if over 1.
        tokens: tokens of the whole sequence.
        layers: calls that are timed in a row, each with weights of its own; times are per call.
    """

    def __init__(
        self,
        shape: AttentionShape,
        sp_size: int,
        tokens: int,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.bfloat16,
        layers: int = 4,
    ) -> None:
        self.shape, self.sp_size, self.tokens, self.device, self.layers = shape, sp_size, tokens, device, layers
        self.dtype, self.length = dtype, tokens // sp_size
        self.layout = plan_heads(shape.heads, shape.kv_heads, sp_size)
        self.exchange = PeerExchange(dist.group.WORLD if sp_size > 1 else None, 0, sp_size)
        if sp_size > 1 and device.type in MEASURED:
            self.exchange.speed = measure_speed(self.exchange, device)
        generator = torch.Generator(device=device).manual_seed(0)
        size = (1, self.length, shape.hidden)
        self.hidden, self.grad = (torch.randn(size, device=device, generator=generator).to(dtype) for _ in range(2))
        angles = torch.rand(1, self.length, shape.head_dim // 2, device=device, generator=generator) * 6
        angles = torch.cat([angles, angles], dim=2)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.positions = torch.arange(self.length, device=device)[None]
        rotary = RotaryTables.shaped(self.cos.repeat(1, sp_size, 1), self.sin.repeat(1, sp_size, 1), sp_size)
        masks = {"full_attention": None}
        self.sequence = ShardedSequence(self.positions.repeat(1, sp_size), masks, rotary)

    def ours(self, *, overlap: bool, chunks: int = 1) -> tuple[AttentionLayer, nn.Module]:
        """The sequence-parallel layer."""
        module = new_layer(self.shape, self.device, self.dtype)
        attention = LayerAttention(AttentionSite("layer", module, self.layout, "full_attention"), self.exchange)
        form = find_attention_form(module)
        assert form is not None
        if overlap:
            forward: Any = OverlappedForward(module, form, attention, WgradScheduler("layer"), chunks)
            module.forward = forward
        take_interface(module, attention)
        keywords = {KEYWORD: self.sequence, "position_ids": self.positions}
        return self._call(module, **keywords), module

    def _call(self, module: nn.Module, **keywords: Any) -> AttentionLayer:
        def call(hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = module(
                hidden, position_embeddings=(self.cos, self.sin), attention_mask=None, **keywords
            )[0]
            return output

        return call

    def variants(self, chunks: list[int]) -> dict[str, Build]:
        """Builders of every variant by name."""
        if self.sp_size == 1:
            return {"transformers": lambda: self._named(plain_layer(self.shape, self.device, self.dtype))}
        found: dict[str, Build] = {"serial": lambda: self.ours(overlap=False)}
        for count in chunks:
            found[f"overlap {count}"] = lambda count=count: self.ours(overlap=True, chunks=count)  # type: ignore[misc]
        found["UlyssesSPAttentionHF"] = lambda: self._named(deepspeed_layer(self.shape, self.device, self.dtype))
        return found

    def _named(self, module: nn.Module) -> tuple[AttentionLayer, nn.Module]:
        return self._call(module, position_ids=self.positions), module

    def gradients(self, layer: AttentionLayer, module: nn.Module) -> dict[str, torch.Tensor]:
        """Output and gradients of one forward and backward pass; module gradients are cleared."""
        hidden = self.hidden.detach().requires_grad_()
        output = layer(hidden)
        output.backward(self.grad)
        assert hidden.grad is not None
        found = {"output": output.detach(), "hidden": hidden.grad}
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            found[name], parameter.grad = parameter.grad, None
        return found

    def passes(self, stack: list[tuple[AttentionLayer, nn.Module]]) -> dict[str, Callable[[], None]]:
        """Forward, and forward and backward, of layers in a row."""

        def forward() -> None:
            with torch.no_grad():
                for layer, _ in stack:
                    layer(self.hidden)

        def both() -> None:
            inputs = [self.hidden.detach().requires_grad_() for _ in stack]
            outputs = [layer(x) for (layer, _), x in zip(stack, inputs, strict=True)]
            torch.autograd.backward(outputs, [self.grad] * len(outputs))
            for _, module in stack:
                module.zero_grad(set_to_none=True)

        return {"forward": forward, "both": both}

    def time(self, stack: list[tuple[AttentionLayer, nn.Module]], repeats: int) -> AttentionTiming:
        """Median times of a variant per call, from `layers` builds of it."""
        runs, count = self.passes(stack), len(stack)
        (f, fs), (b, bs) = (measure(runs[name], repeats, self.device) for name in ("forward", "both"))
        host = (self._host(runs["forward"], repeats) / count, self._host(runs["both"], repeats) / count)
        return AttentionTiming(f / count, fs / count, b / count, bs / count, *host, self._peak(*stack[0]))

    def limits(self, repeats: int) -> dict[str, float]:
        """Milliseconds of the computation alone and of the bytes alone, and the limits they make."""
        module = new_layer(self.shape, self.device, self.dtype)
        x = self.hidden[0].detach().requires_grad_()
        sizes = ((self.layout.local_q, "q"), (self.layout.local_kv, "k"), (self.layout.local_kv, "v"))
        q, k, v = (
            torch.randn(1, heads, self.tokens, self.shape.head_dim, device=self.device).to(self.dtype).requires_grad_()
            for heads, _ in sizes
        )
        context = torch.randn(self.length, self.shape.heads * self.shape.head_dim, device=self.device).to(self.dtype)
        context.requires_grad_()

        def outputs() -> list[torch.Tensor]:
            core = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.layout.group > 1)
            return [module.q_proj(x), module.k_proj(x), module.v_proj(x), module.o_proj(context), core]

        grads = [torch.randn_like(output) for output in outputs()]
        # As in a model, where results are transposed to [B, T, n, D]. PyTorch 2.11 and 2.13 on a GPU keep one cuDNN
        # graph for all backward calls with such queries, keys and values, made for the first one's gradient layout.
        grads[-1] = grads[-1].transpose(1, 2).contiguous().transpose(1, 2)

        def forward() -> None:
            with torch.no_grad():
                for _ in range(self.layers):
                    outputs()

        def both() -> None:
            for _ in range(self.layers):
                torch.autograd.backward(outputs(), grads)
                for tensor in (x, q, k, v, context, *module.parameters()):
                    tensor.grad = None

        compute, compute_both = (measure(run, repeats, self.device)[0] / self.layers for run in (forward, both))
        link = self._link(repeats) if self.sp_size > 1 else 0.0
        found = {"compute": compute, "compute_both": compute_both, "link": link, "link_both": 2 * link}
        return {**found, "limit": max(compute, link), "limit_both": max(compute_both, 2 * link)}

    def bytes_sent(self) -> int:
        """Bytes one forward pass sends to the other ranks."""
        return self.layout.bytes_sent(self.length, self.shape.head_dim, self.hidden.element_size())

    def _link(self, repeats: int) -> float:
        per = self.bytes_sent() // (self.sp_size - 1) // 2
        sent = torch.zeros(self.sp_size - 1, per, dtype=torch.uint8, device=self.device)
        received = torch.empty_like(sent)
        splits = [0] + [1] * (self.sp_size - 1)

        def there_and_back() -> None:
            for source, target in ((sent, received), (received, sent)) * self.layers:
                self.exchange.all_to_all(target, source, splits, splits).wait()

        return measure(there_and_back, repeats, self.device)[0] / self.layers

    def _host(self, run: Callable[[], None], repeats: int) -> float:
        """Milliseconds until the host has issued everything."""
        if self.device.type == "cpu":
            return 0.0
        times = []
        for _ in range(min(repeats, 5)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return sorted(times)[len(times) // 2] * 1e3

    def _peak(self, layer: AttentionLayer, module: nn.Module) -> float:
        if self.device.type == "cpu":
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.gradients(layer, module)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
