"""`FluidConfig`: every setting of fluid_hf, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

from fluid_hf.errors import ConfigError

__all__ = ["FluidConfig", "check_sizes", "check_wgrad"]

WGRAD_POLICIES = ("off", "layer", "cross_layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FluidConfig:
    """Settings of a patched model, also the `"fluid"` block of a DeepSpeed JSON.

    Args:
        ep_size: ranks that share one set of experts (expert parallel size). `None` takes the largest divisor of the
            world size that divides the number of experts and keeps groups inside a node (of nodes with several ranks).
        sp_size: ranks that share one sequence (sequence parallel size). `None` takes that of the Trainer's
            `ParallelismConfig`, or 1.
        overlap: exchange rows peer by peer and compute what has arrived while the rest is on the wire. `False` is the
            serial reference: one all-to-all each way.
        wgrad: `"layer"` computes expert weight gradients while the input gradients travel back; `"off"` computes them
            before the input gradients are sent; `"cross_layer"` also places those of attention's projections and of
            the router in the windows of the MoE layer before.
        waves: number of pieces the exchange is cut into. `None` lets the planner choose.
        recompute: keep only the received rows for backward and compute the gate and up projections again.
        nccl_max_ctas: most thread blocks that NCCL takes from the GPU for an exchange. `None` leaves it to NCCL; fewer
            leave more of the GPU to the computation beside it.
        timeout_seconds: how long a rank waits for another one in an exchange before it raises `PeerError`.

    Raises:
        ConfigError: a value is out of range; the message names the field, its value and what is allowed.
    """

    ep_size: int | None = None
    sp_size: int | None = None
    overlap: bool = True
    wgrad: str = "layer"
    waves: int | None = None
    recompute: bool = False
    nccl_max_ctas: int | None = None
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name in ("ep_size", "sp_size", "waves", "nccl_max_ctas"):
            value = getattr(self, name)
            if value is not None and not _is_positive_int(value):
                raise ConfigError(f"{name} ({value!r}) must be a positive integer, or null to choose by itself.")
        for name in ("overlap", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} ({getattr(self, name)!r}) must be true or false.")
        seconds = self.timeout_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < 1e7:
            raise ConfigError(f"timeout_seconds ({seconds!r}) must be a positive number of seconds.")
        check_wgrad(self.wgrad)
        if self.wgrad == "cross_layer" and (self.sp_size or 1) > 1:
            raise ConfigError(
                f"wgrad ('cross_layer') needs sp_size ({self.sp_size}) to be 1: sequence parallel attention "
                'computes its weight gradients in windows of its own; set wgrad "layer".'
            )
        if self.waves is not None and not self.overlap:
            raise ConfigError(
                f"waves ({self.waves}) needs overlap (false) to be true; leave waves out or set overlap true."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FluidConfig:
        """Build from a mapping; an unknown key raises `ConfigError` naming it and the nearest valid one."""
        if not isinstance(values, dict):
            raise ConfigError(f'the "fluid" block ({values!r}) must be a JSON object with keys {_names(cls)}.')
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
                raise ConfigError(
                    f"unknown key {key!r} in the fluid settings; did you mean {near[0]!r}? Valid: {_names(cls)}."
                )
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path) -> FluidConfig:
        """Read the `"fluid"` block of a DeepSpeed JSON file (all defaults if it has none).

        Raises:
            ConfigError: the file cannot be read, is no JSON object, or has a block with a wrong key or value.
        """
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"DeepSpeed configuration ({path}) must be a JSON file that can be read: {error}."
            ) from error
        if not isinstance(settings, dict):
            raise ConfigError(
                f"DeepSpeed configuration ({path}) must be a JSON object; it is a {type(settings).__name__}."
            )
        return cls.from_dict(settings.get("fluid", {}))

    def to_dict(self) -> dict[str, Any]:
        """The settings as a JSON-ready mapping; `from_dict(to_dict())` is equal to `self`."""
        return dataclasses.asdict(self)


def check_wgrad(policy: object) -> None:
    """Raise `ConfigError` unless it is a policy for weight gradients."""
    if policy not in WGRAD_POLICIES:
        raise ConfigError(f"wgrad ({policy!r}) must be one of {', '.join(map(repr, WGRAD_POLICIES))}.")


def check_sizes(**sizes: object) -> None:
    """Raise `ConfigError` unless each of the named sizes is a positive integer."""
    for name, size in sizes.items():
        if not _is_positive_int(size):
            raise ConfigError(f"{name} ({size!r}) must be a positive integer.")


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _names(cls: type[FluidConfig]) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))
