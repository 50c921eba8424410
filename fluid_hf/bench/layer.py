"""One MoE layer's experts, timed in one process: serial, overlapped, the peers, and the limit of the hardware.

The limit of a pass is the larger of the time of its GEMMs alone and of its deduplicated bytes alone on the link, both
measured in the same run; with skewed routing, of the GEMMs and bytes that this routing makes. On real ranks times are
those of the slowest one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fluid_hf.bench.links import exchange_of, several_processes
from fluid_hf.bench.peers import Layer, autoep_layer, transformers_experts, transformers_layer
from fluid_hf.bench.shapes import LayerShape
from fluid_hf.moe.layer import ExpertParallelExperts, ExpertParallelLayer, WaveChoice
from fluid_hf.overlap.wgrad import WgradScheduler

__all__ = ["LayerBench", "Timing"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call of one variant: median and spread (90th less 10th percentile), forward and both passes.

    `peak_mb` is the most memory that both passes of one call need beyond weights and inputs, in MB.
    """

    forward: float
    forward_spread: float
    both: float
    both_spread: float
    peak_mb: float = 0.0


class _SeparateExperts(ExpertParallelLayer):
    """Gate and up in parameters of their own, as in a patched model."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, settings: ExpertParallelLayer) -> None:
        self.init_like(settings)
        gate, up = (nn.Parameter(part.contiguous()) for part in gate_up.chunk(2, dim=1))
        self.gate_proj, self.up_proj, self.down_proj = gate, up, nn.Parameter(down)

    def expert_parameters(self) -> dict[str, torch.Tensor]:
        return {"gate": self.gate_proj, "up": self.up_proj, "down": self.down_proj}


class LayerBench:
    """Inputs and variants of one shape on one group size.

    Args:
        shape: sizes of the layer.
        ep_size: ranks of the world; torch.distributed's default group must have that size, if over 1.
        tokens: tokens of this rank.
        skew: exponent of Zipf-distributed expert popularity, the same on all ranks; 0 for balanced routing.
        layers: calls that are timed in a row, each with weights of its own; times are per call. A model runs its
            layers that way; a single call also pays for starting an idle GPU.
        pause: seconds that the device rests before each timed run. Without, it can be at its power limit, where it
            lowers its clock for what keeps it busy.
    """

    def __init__(
        self,
        shape: LayerShape,
        ep_size: int,
        tokens: int,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.bfloat16,
        skew: float = 0.0,
        layers: int = 4,
        pause: float = 0.0,
    ) -> None:
        self.layers, self.skew, self.pause = layers, skew, pause
        self.shape, self.ep_size, self.tokens, self.device = shape, ep_size, tokens, device
        self.exchange = exchange_of(ep_size)
        self.rank = self.exchange.rank
        generator = torch.Generator(device=device).manual_seed(self.rank)
        local = shape.experts // ep_size

        def random(*size: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*size, device=device, generator=generator, dtype=torch.float32) * scale).to(dtype)

        self.gate_up = torch.cat([random(1, 2 * shape.inner, shape.hidden, scale=0.02) for _ in range(local)])
        self.down = torch.cat([random(1, shape.hidden, shape.inner, scale=0.02) for _ in range(local)])
        self.hidden, self.grad = random(tokens, shape.hidden), random(tokens, shape.hidden)
        noise = torch.rand(tokens, shape.experts, device=device, generator=generator).log().neg()
        order = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(0)).to(device)
        popularity = (order + 1.0) ** -skew
        self.index = (noise / popularity).argsort(1)[:, : shape.top_k].contiguous()
        self.weights = torch.rand(tokens, shape.top_k, device=device, generator=generator, dtype=torch.float32)
        self.weights = (self.weights / self.weights.sum(1, keepdim=True)).to(dtype)

    def ours(
        self, *, overlap: bool, waves: int = 1, wgrad: str = "layer", recompute: bool = False, separate: bool = False
    ) -> ExpertParallelLayer:
        """The expert-parallel layer around the shared weights; `separate` as a patched model holds them, in copies."""
        settings = ExpertParallelLayer(
            self.shape.experts,
            self.exchange,
            WgradScheduler(wgrad),
            nn.functional.silu,
            overlap=overlap,
            recompute=recompute,
            wave_choice=WaveChoice(waves),
        )
        if separate:
            return _SeparateExperts(self.gate_up, self.down, settings)
        return ExpertParallelExperts.from_parameters(nn.Parameter(self.gate_up), nn.Parameter(self.down), settings)

    def row_per_expert(self) -> tuple[Layer, nn.Module]:
        """The serial layer with one row per (token, expert), on the same kernels."""
        layer, top_k = self.ours(overlap=False), self.shape.top_k

        def call(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            rows = hidden[:, None].expand(-1, top_k, -1).reshape(-1, hidden.shape[1])
            output = layer(rows, index.reshape(-1, 1), weights.reshape(-1, 1))
            return output.view(-1, top_k, hidden.shape[1]).sum(1)

        return call, layer

    def variants(self, waves: list[int]) -> dict[str, Callable[[], tuple[Layer, nn.Module]]]:
        """Builders of every variant by name."""

        def build(**settings: Any) -> Callable[[], tuple[Layer, nn.Module]]:
            def make() -> tuple[Layer, nn.Module]:
                layer = self.ours(**settings)
                return layer, layer

            return make

        if self.ep_size == 1:
            plain = transformers_experts
            return {
                "fluid_hf": build(overlap=True),
                "fluid_hf patched": build(overlap=True, separate=True),
                "transformers": lambda: (lambda m: (m, m))(plain(self.shape, self.gate_up, self.down)),
            }
        found = {"row per expert": self.row_per_expert, "serial": build(overlap=False)}
        for count in waves:
            found[f"overlap {count}"] = build(overlap=True, waves=count)
        found[f"overlap {waves[-1]} patched"] = build(overlap=True, waves=waves[-1], separate=True)
        found[f"overlap {waves[-1]} wgrad off"] = build(overlap=True, waves=waves[-1], wgrad="off")
        found["AutoEP"] = lambda: autoep_layer(self.shape, self.gate_up, self.down)
        found["AutoEP fused"] = lambda: autoep_layer(self.shape, self.gate_up, self.down, fused=True)
        found["AllToAllEP"] = lambda: transformers_layer(self.shape, self.gate_up, self.down)
        found["FluidEP"] = lambda: transformers_layer(self.shape, self.gate_up, self.down, "fluid")
        return found

    def passes(self, stack: list[tuple[Layer, nn.Module]]) -> dict[str, Callable[[], None]]:
        """What is timed, over all builds of a variant in a row: forward without gradients, forward and backward."""

        def forward() -> None:
            with torch.no_grad():
                for layer, _ in stack:
                    layer(self.hidden, self.index, self.weights)

        def both() -> None:
            inputs = [(self.hidden.detach().requires_grad_(), self.weights.detach().requires_grad_()) for _ in stack]
            outputs = [layer(x, self.index, w) for (layer, _), (x, w) in zip(stack, inputs, strict=True)]
            torch.autograd.backward(outputs, [self.grad] * len(outputs))
            for _, module in stack:
                for parameter in module.parameters():
                    parameter.grad = None

        return {"forward": forward, "both": both}

    def time(self, stack: list[tuple[Layer, nn.Module]], repeats: int) -> Timing:
        """Median times of a variant per call, from `layers` builds of it."""
        runs = self.passes(stack)
        (f, fs), (b, bs) = (self._measure(runs[name], repeats) for name in ("forward", "both"))
        calls = len(stack)
        return Timing(f / calls, fs / calls, b / calls, bs / calls, self._peak(*stack[0]))

    def _peak(self, layer: Layer, module: nn.Module) -> float:
        """Peak memory of one forward and backward pass, less what was there before; gradients of weights included."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.gradients(layer, module)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def gradients(self, layer: Layer, module: nn.Module) -> dict[str, torch.Tensor]:
        """Output and gradients of one forward and backward pass; module gradients are cleared."""
        hidden, weights = self.hidden.detach().requires_grad_(), self.weights.detach().requires_grad_()
        output = layer(hidden, self.index, weights)
        output.backward(self.grad)
        assert hidden.grad is not None and weights.grad is not None
        found = {"output": output.detach(), "hidden": hidden.grad, "weights": weights.grad}
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad
            parameter.grad = None
        return found

    def limits(self, repeats: int) -> dict[str, float]:
        """Milliseconds of the GEMMs alone and of the deduplicated bytes alone, and the limits they make."""
        counts = self._pairs_here()
        pairs = int(counts.sum())
        offsets = counts.cumsum(0).to(torch.int32)
        x = torch.randn(pairs, self.shape.hidden, device=self.device).to(self.hidden.dtype)
        h = torch.randn(pairs, self.shape.inner, device=self.device).to(self.hidden.dtype)
        g = torch.randn(pairs, 2 * self.shape.inner, device=self.device).to(self.hidden.dtype)
        mm: Any = torch.nn.functional.grouped_mm

        def forward() -> None:
            for _ in range(self.layers):
                mm(x, self.gate_up.transpose(1, 2), offs=offsets)
                mm(h, self.down.transpose(1, 2), offs=offsets)

        def both() -> None:
            forward()
            for _ in range(self.layers):
                mm(x, self.down, offs=offsets)
                mm(g, self.gate_up, offs=offsets)
                mm(g.t(), x, offs=offsets)
                mm(x.t(), h, offs=offsets)

        gemm, gemm_both = (self._measure(run, repeats)[0] / self.layers for run in (forward, both))
        link = self._link(repeats) if self.ep_size > 1 else 0.0
        return {
            "gemm": gemm,
            "gemm_both": gemm_both,
            "link": link,
            "link_both": 2 * link,
            "limit": max(gemm, link),
            "limit_both": max(gemm_both, 2 * link),
        }

    def _pairs_here(self) -> torch.Tensor:
        """Pairs of each expert held here; all alike with balanced routing."""
        local = self.shape.experts // self.ep_size
        if not self.skew:
            return torch.full((local,), self.tokens * self.shape.top_k // local, device=self.device)
        counts = torch.bincount(self.index.reshape(-1), minlength=self.shape.experts)
        if self.ep_size > 1 and several_processes():
            dist.all_reduce(counts)
            return counts[self.rank * local : (self.rank + 1) * local]
        return counts.view(self.ep_size, local).sum(0)  # the mirror's peers send what they are sent

    def _rows(self) -> list[tuple[int, int, int]]:
        """For each peer: rows sent to it and received from it."""
        peers = [peer for peer in range(self.ep_size) if peer != self.rank]
        if not self.skew:
            rows = int(self.shape.expected_rows(self.tokens, self.ep_size)) // (self.ep_size - 1)
            return [(peer, rows, rows) for peer in peers]
        ranks = self.index // (self.shape.experts // self.ep_size)
        sent = torch.stack([(ranks == rank).any(1).sum() for rank in range(self.ep_size)])
        every = [torch.empty_like(sent) for _ in range(self.ep_size)]
        if several_processes():
            dist.all_gather(every, sent)
        return [
            (peer, int(sent[peer]), int(every[peer][self.rank] if several_processes() else sent[peer]))
            for peer in peers
        ]

    def _link(self, repeats: int) -> float:
        out = [(peer, self.hidden.new_ones(rows, self.shape.hidden)) for peer, rows, _ in self._rows()]
        back = [(peer, self.hidden.new_ones(rows, self.shape.hidden)) for peer, _, rows in self._rows()]

        def there_and_back() -> None:
            for _ in range(self.layers):
                self.exchange.post(out, back).wait()
                self.exchange.post(back, out).wait()

        return self._measure(there_and_back, repeats)[0] / self.layers

    def _measure(self, run: Callable[[], None], repeats: int) -> tuple[float, float]:
        return measure(run, repeats, self.device, pause=self.pause)


def measure(
    run: Callable[[], None], repeats: int, device: torch.device, warm_up: int = 4, pause: float = 0.0
) -> tuple[float, float]:
    """Median milliseconds and spread of a function, of the slowest rank; (0, 0) on the CPU, where it runs once.

    The device rests for `pause` seconds before each timed run.
    """
    if device.type == "cpu":
        run()
        return 0.0, 0.0
    for _ in range(warm_up):
        run()
    times, together = [], several_processes()
    for _ in range(repeats):
        if pause:
            torch.cuda.synchronize()
            time.sleep(pause)
        if together:
            dist.all_reduce(torch.zeros(1, device=device))
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0], times[0]]
    both = torch.tensor([statistics.median(times), deciles[-1] - deciles[0]], device=device, dtype=torch.float64)
    if together:
        dist.all_reduce(both, dist.ReduceOp.MAX)
    return float(both[0]), float(both[1])
