"""Shapes of known models, by name."""

from __future__ import annotations

from dataclasses import dataclass

from fluid_hf.overlap.cost_model import LayerSizes, expected_rows

__all__ = ["SHAPES", "LayerShape"]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of the routed experts of one layer: H, I, E, K."""

    hidden: int
    inner: int
    experts: int
    top_k: int

    def expected_rows(self, tokens: int, ep_size: int) -> float:
        """Rows a rank sends with uniform routing: unique (token, other rank) pairs."""
        return expected_rows(tokens, self.top_k, self.experts, ep_size)

    def sizes(self, tokens: int, ep_size: int, element_bytes: int) -> LayerSizes:
        """As the cost model takes them."""
        return LayerSizes(tokens, self.top_k, self.experts, ep_size, self.hidden, self.inner, element_bytes)


SHAPES = {
    "mixtral-8x7b": LayerShape(4096, 14336, 8, 2),
    "qwen1.5-moe-a2.7b": LayerShape(2048, 1408, 60, 4),
    "qwen2-57b-a14b": LayerShape(3584, 2560, 64, 8),
    "qwen3-30b-a3b": LayerShape(2048, 768, 128, 8),
    "qwen3-235b-a22b": LayerShape(4096, 1536, 128, 8),
    "small": LayerShape(1024, 512, 16, 4),
    "tiny": LayerShape(64, 32, 16, 4),
}
