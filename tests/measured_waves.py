"""What serial exchanges and numbers of waves took: the planner must choose among the fastest.

Two H200, two layers of a model over NCCL (`bench model`, 8192 tokens a rank), and one layer on one H200 with a mirror
link over PCIe (`bench layer`). Milliseconds; of several runs of one kind the fastest. Weight gradients of the serial
model were computed at once, those of the serial layer while the input gradients travelled.
"""

from __future__ import annotations

from typing import NamedTuple

from fluid_hf.bench.shapes import SHAPES
from fluid_hf.overlap.cost_model import SERIAL, LayerSizes

__all__ = ["CELLS", "Cell"]

Times = dict[int, tuple[float, float]]  # per number of waves: median and spread


class Cell(NamedTuple):
    """One layer on one link.

    Attributes:
        speeds: GB/s in each direction: as ranks measured with messages of 8 MiB, and as whole exchanges showed (over
            NCCL those of Qwen3-30B, for both models).
        costs: as ranks measured: us until a small message arrives, and to post one; share of the GPU taken; us of a
            small operation of the host (6.5 is assumed where none was kept).
        inference, training: times of forward, and of forward and backward.
    """

    link: str
    shape: str
    ep_size: int
    speeds: tuple[float, float]
    costs: tuple[float, float, float, float]
    inference: Times
    training: Times

    @property
    def sizes(self) -> LayerSizes:
        """As the cost model takes them."""
        return SHAPES[self.shape].sizes(8192, self.ep_size, 2)


CELLS = [
    Cell(
        "NVLink",
        "qwen3-30b-a3b",
        2,
        (214.5, 270.0),
        (39, 188, 0.39, 9.0),
        {SERIAL: (11.06, 0.60), 1: (10.93, 1.59), 2: (11.34, 0.83)},
        {SERIAL: (32.75, 1.86), 1: (32.04, 2.40), 2: (37.68, 1.11)},
    ),
    Cell(
        "NVLink",
        "qwen2-57b-a14b",
        2,
        (134.3, 270.0),
        (12, 113, 0.17, 8.9),
        {SERIAL: (32.07, 1.85), 1: (31.85, 1.12), 2: (32.79, 1.68)},
        {SERIAL: (98.93, 6.03), 1: (97.75, 4.82), 2: (100.89, 5.28)},
    ),
    Cell(
        "shared memory",
        "qwen3-30b-a3b",
        2,
        (31.3, 23.4),
        (94, 188, 0.26, 8.2),
        {SERIAL: (15.35, 0.42), 1: (15.39, 0.15), 2: (13.00, 0.45)},
        {SERIAL: (41.43, 0.68), 1: (38.40, 1.29), 2: (35.66, 1.20)},
    ),
    Cell(
        "shared memory",
        "qwen2-57b-a14b",
        2,
        (23.8, 23.4),
        (62, 140, 0.24, 9.1),
        {SERIAL: (35.62, 0.66), 1: (34.62, 1.78), 2: (34.27, 0.64)},
        {SERIAL: (102.68, 3.79), 1: (99.60, 4.33), 2: (100.50, 3.83)},
    ),
    Cell(
        "mirror",
        "qwen3-30b-a3b",
        2,
        (27.6, 40.4),
        (18, 64, 0.01, 6.5),
        {SERIAL: (3.38, 0.07), 1: (2.75, 0.88), 2: (2.29, 0.32), 3: (3.15, 0.30)},
        {SERIAL: (7.16, 0.10), 1: (5.80, 0.09), 2: (5.58, 0.93), 3: (6.78, 0.55)},
    ),
    Cell(
        "mirror",
        "qwen2-57b-a14b",
        2,
        (27.6, 43.8),
        (18, 73, 0.02, 6.5),
        {SERIAL: (8.83, 0.43), 1: (6.86, 0.26)},
        {SERIAL: (21.82, 1.18), 1: (19.74, 3.00)},
    ),
    Cell(
        "mirror",
        "mixtral-8x7b",
        2,
        (27.3, 42.1),
        (18, 126, 0.02, 6.5),
        {SERIAL: (11.16, 0.47), 1: (9.48, 0.40)},
        {SERIAL: (30.26, 1.96), 1: (28.97, 2.78)},
    ),
    Cell(
        "mirror",
        "qwen1.5-moe-a2.7b",
        2,
        (28.7, 39.3),
        (26, 160, 0.02, 6.5),
        {SERIAL: (3.28, 0.16), 1: (2.44, 0.17), 2: (2.17, 0.32), 3: (2.00, 0.63)},
        {SERIAL: (6.45, 0.25), 1: (5.47, 0.14), 2: (5.18, 0.51), 3: (5.72, 1.26)},
    ),
    Cell(
        "mirror",
        "qwen3-30b-a3b",
        8,
        (45.2, 47.0),
        (34, 279, 0.03, 6.5),
        {SERIAL: (8.39, 0.15), 2: (7.53, 0.09)},
        {SERIAL: (16.43, 0.23), 2: (14.26, 0.45)},
    ),
    Cell(
        "mirror",
        "qwen2-57b-a14b",
        8,
        (45.9, 48.0),
        (43, 490, 0.03, 6.5),
        {SERIAL: (17.60, 0.05), 2: (12.93, 0.30)},
        {SERIAL: (35.41, 0.14), 2: (27.12, 0.44)},
    ),
    Cell(
        "mirror",
        "mixtral-8x7b",
        8,
        (45.2, 46.1),
        (34, 330, 0.03, 6.5),
        {SERIAL: (14.09, 0.54), 2: (10.81, 0.42)},
        {SERIAL: (33.55, 1.44), 2: (30.42, 2.41)},
    ),
]
