"""Expert-parallel experts of any format, with parameters under the names that the model gave them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fluid_hf.moe.layer import ExpertParallelLayer

__all__ = ["GeneralExperts"]

# What `GeneralMath` calls the weights of transformers' experts.
ROLES = {
    "gate_up_proj": "first",
    "up_proj": "first",
    "gate_up_proj_bias": "first_bias",
    "up_proj_bias": "first_bias",
    "down_proj_bias": "down_bias",
    "down_proj": "down",
}


class GeneralExperts(ExpertParallelLayer):
    """Experts whose arithmetic is `settings.context.math`.

    Args:
        settings: everything but the weights.
        weights: the shares held here, by transformers' names, first dimension [E_local].
        modules: modules of the experts that every rank holds whole (a norm, an activation with parameters).
    """

    def __init__(
        self, settings: ExpertParallelLayer, weights: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module]
    ) -> None:
        self.init_like(settings)
        for name, weight in weights.items():
            setattr(self, name, weight)
        for name, module in modules.items():
            setattr(self, name, module)

    def expert_parameters(self) -> dict[str, torch.Tensor]:
        weights = {ROLES[name]: getattr(self, name) for name in self.weight_names}
        down = weights.pop("down")
        return {**weights, **self.extra_parameters(), "down": down}
