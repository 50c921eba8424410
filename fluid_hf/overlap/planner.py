"""How many waves an exchange is cut into, from numbers that are equal on all ranks."""

from __future__ import annotations

from fluid_hf.comm.tournament import num_rounds
from fluid_hf.overlap.cost_model import SERIAL, Hardware, LayerSizes, backward_seconds, forward_seconds

__all__ = ["choose_waves", "possible_waves", "predicted_seconds"]

MAX_WAVES = 8
MIN_GAIN = 0.03  # a wave more must gain that share of the time: predictions are no better than that


def possible_waves(ep_size: int) -> list[int]:
    """Numbers of waves that differ in what they do: rounds grouped, or every round cut into the same parts."""
    rounds = num_rounds(ep_size)
    if rounds == 0:
        return [1]
    cut = range(2 * rounds, MAX_WAVES + 1, rounds)
    return [*range(1, min(rounds, MAX_WAVES) + 1), *cut]


def choose_waves(sizes: LayerSizes, hardware: Hardware, *, training: bool, serial: bool = False) -> int:
    """The number of waves with the shortest predicted time; fewer where more gain little.

    Every rank must pass the same numbers: waves that differ between ranks would not match. The pieces of forward are
    those of backward, so in training both passes are predicted together.

    Args:
        serial: whether `SERIAL`, one all-to-all each way with nothing computed meanwhile, may be chosen; overlap must
            gain as much over it as each further wave.
    """
    best, best_time = 1, float("inf")
    for waves in [SERIAL, *possible_waves(sizes.ep_size)] if serial else possible_waves(sizes.ep_size):
        time = predicted_seconds(sizes, hardware, waves, training=training)
        if time < best_time * (1 - MIN_GAIN):
            best, best_time = waves, time
    return best


def predicted_seconds(sizes: LayerSizes, hardware: Hardware, waves: int, *, training: bool) -> float:
    """Forward, and backward in training."""
    forward = forward_seconds(sizes, hardware, waves)
    return forward + backward_seconds(sizes, hardware, waves) if training else forward
