"""The GPUs that a dry run can stand for, with their published peak rates."""

from __future__ import annotations

from dataclasses import dataclass

from bench.ceilings import Ceilings

# What large products, attention and large copies reach of the published peaks: assumed, not measured.
REACHED = {"products": 0.7, "attention": 0.4, "bytes": 0.9}
LAUNCH = 2e-6  # seconds that a launch takes at least, in a graph: assumed
EXPONENTIALS = 16  # per multiprocessor and clock, on all of them


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVIDIA's data sheet describes it.

    Attributes:
        name: as its driver reports it.
        capability: its compute capability.
        tflops: dense 16-bit products with fp32 sums, 10^12 operations per second.
        gbytes: memory bandwidth, 10^9 bytes per second.
        multiprocessors, clock: their number, and the clock in GHz of the published peak.
        memory: GiB.
        source: of the figures.
    """

    name: str
    capability: tuple[int, int]
    tflops: float
    gbytes: float
    multiprocessors: int
    clock: float
    memory: int
    source: str

    @property
    def reachable(self) -> Ceilings:
        """The rates that a floor is computed with: the peaks times `REACHED`."""
        return Ceilings(
            self.tflops * 1e12 * REACHED["products"],
            self.gbytes * 1e9 * REACHED["bytes"],
            EXPONENTIALS * self.multiprocessors * self.clock * 1e9,
        )


GPUS = {
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 989.4, 3352, 132, 1.83, 80, "H100 SXM5 data sheet; Hopper white paper"
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), 989.4, 4800, 132, 1.83, 141, "H200 SXM data sheet"),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 312.0, 2039, 108, 1.41, 80, "A100 80GB SXM data sheet"),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 165.2, 1008, 128, 2.52, 24, "Ada white paper, appendix A"),
    "l4": Gpu("NVIDIA L4", (8, 9), 121.0, 300, 58, 2.04, 24, "L4 data sheet; Ada white paper"),
}
