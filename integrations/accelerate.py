"""accelerate's `ParallelismConfig(sp_size=n, sp_backend="deepspeed")`: one sequence parallel size, in agreement.

The Trainer cuts its training batches and computes its loss as it does for DeepSpeed's Ulysses; attention is ours.
Evaluation batches stay whole on every rank, as the Trainer leaves them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fluid_hf.config import FluidConfig
from fluid_hf.errors import ConfigError

__all__ = ["agree_on_sp_size", "check_sp_size"]


def _asked(parallelism_config: Any) -> int:
    return int(getattr(parallelism_config, "sp_size", None) or 1)


def agree_on_sp_size(config: FluidConfig, parallelism_config: Any) -> FluidConfig:
    """The settings with the `sp_size` of a `ParallelismConfig`, if they leave it open.

    Raises:
        ConfigError: both give one, and they differ.
    """
    if config.sp_size is None:
        return dataclasses.replace(config, sp_size=_asked(parallelism_config))
    check_sp_size(config.sp_size, parallelism_config)
    return config


def check_sp_size(sp_size: int, parallelism_config: Any) -> None:
    """Raise unless the Trainer cuts its batches over as many ranks as the attention layers expect.

    Raises:
        ConfigError: the sizes differ.
    """
    asked = _asked(parallelism_config)
    if asked != sp_size:
        raise ConfigError(
            f"sp_size ({sp_size}) of the fluid settings must equal sp_size ({asked}) of the Trainer's "
            f'ParallelismConfig; set ParallelismConfig(sp_size={sp_size}, sp_backend="deepspeed"), or leave sp_size '
            "out of the fluid settings."
        )
