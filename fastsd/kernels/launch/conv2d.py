"""Launches of `conv2d`: tiles, and into how many parts the sums of few pixels are split.

None is timed yet. Tiles are chosen by compiled code (registers, spills, shared memory) and by how many programs they
give: a map of 64 x 64 x 320, twice, is 128 tiles of 128 pixels x 160 channels, for 132 multiprocessors.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from fastsd.kernels.launch.linear import EXACT


@dataclass(frozen=True)
class ConvBoxes:
    """The launch of the kernel that reads boxes (TMA), on sm_90 and later.

    Attributes:
        box: images, rows and columns of a tile; powers of two.
        channels: output channels of a tile, in two parts; the second may be 0.
        depth: input channels of a step.
        split: programs that share the sums of a tile; above 1 a second launch adds their parts.
        swapped: weights are the first factor of the product, so that both factors stay in shared memory. Its rows are
            channels then, which come in 64s.
    """

    box: tuple[int, int, int]
    channels: tuple[int, int]
    depth: int
    warps: int
    stages: int
    split: int = 1
    swapped: bool = False

    def by_address(self) -> ConvPointers:
        """A launch of the other kernel, for a map that does not begin at a multiple of 16 bytes."""
        return ConvPointers(math.prod(self.box), self.channels[0], self.depth, self.warps, self.stages, self.split)


@dataclass(frozen=True)
class ConvPointers:
    """The launch of the kernel that reads pixels by address: `pixels` x `channels` of a tile; see `ConvBoxes`."""

    pixels: int
    channels: int
    depth: int
    warps: int
    stages: int
    split: int = 1


@dataclass(frozen=True)
class ConvSettings:
    """The settings of an architecture class, from which `choose` derives a launch.

    Attributes:
        programs: that run at the same time: one for each multiprocessor of its largest chip.
        boxes: whether the copy engine reads boxes.
        depth, warps, stages: of tiles of 128 pixels x 128 or 160 channels.
        narrow: the same of tiles of 128 x 64 and fewer.
        least_depth: of maps with fewer channels, as the first convolution's; twice that in fp8.
    """

    programs: int
    boxes: bool
    depth: int
    warps: int
    stages: int
    narrow: tuple[int, int, int]
    least_depth: int = 16


# Classes on which PyTorch's convolution takes every call, and why.
UNUSED = {75: "on sm_75 Triton computes products without tensor cores and spills; the kernel needs sm_80 or newer"}

TABLE: dict[int, ConvSettings] = {
    80: ConvSettings(108, False, 32, 8, 4, (32, 4, 4)),
    86: ConvSettings(84, False, 32, 8, 4, (32, 4, 4)),
    90: ConvSettings(132, True, 64, 8, 4, (64, 4, 4)),
    100: ConvSettings(148, True, 64, 8, 4, (64, 4, 4), least_depth=32),  # with 16 it would spill under Triton 3.7
    120: ConvSettings(170, True, 32, 8, 4, (32, 4, 4)),
}

PIXELS = 128  # of a tile; twice as many where that leaves two programs for each multiprocessor
ALIGNED = 16  # bytes of input channels, in which the copy engine counts
IMAGES = 2  # in a batch, as guidance has; the number of programs is estimated for them
STEPS = 12  # the fewest of one program of a split


@functools.lru_cache(maxsize=1024)
def choose(
    architecture: int,
    height: int,
    width: int,
    inputs: int,
    outputs: int,
    taps: int,
    stride: int,
    phases: int,
    itemsize: int = 2,
) -> ConvBoxes | ConvPointers:
    """The launch for `[B, height, width, outputs]`, of each phase. It does not depend on B: a batch changes no sums.

    Args:
        inputs, outputs: channels.
        taps: of the kernel: 9 of 3 x 3.
        phases: 4 for the upsampling by two, whose maps are of height x width each; otherwise 1.
        itemsize: 1 for fp8, with twice the channels in the bytes of a step, unless an eighth of them would be zeros.
    """
    settings = TABLE[architecture]
    boxes = settings.boxes and stride == 1 and inputs * itemsize % ALIGNED == 0
    groups = boxes and architecture < 120  # of warps multiply together, from shared memory
    channels, pixels = _channels(outputs, two_parts=groups), PIXELS
    narrow = sum(channels) <= 64
    depth, warps, stages = settings.narrow if narrow else (settings.depth, settings.warps, settings.stages)
    depth = min(depth * 2 // itemsize, max(_power_of_two(inputs), settings.least_depth * 2 // itemsize))
    if itemsize == 1 and 8 * (-inputs % depth) > inputs:
        depth //= 2
    many = 2 * settings.programs * 2 * PIXELS * 128
    spills = itemsize == 1 and architecture in EXACT  # sums of fp8 products stand twice in registers
    if groups and not spills and outputs % 128 == 0 and IMAGES * height * width * outputs * phases >= many:
        channels, pixels = (128, 0), 2 * PIXELS  # fewer bytes for each product
    swapped = groups and channels == (128, 0)
    tiles = -(-outputs // sum(channels)) * phases * -(-IMAGES * height * width // pixels)
    split = max(min(settings.programs // tiles, taps * -(-inputs // depth) // STEPS), 1)
    if boxes:
        return ConvBoxes(box_of(height, width, pixels), channels, depth, warps, stages, split, swapped)
    return ConvPointers(pixels, channels[0], depth, warps, stages, split)


@dataclass(frozen=True)
class ConvEstimate:
    """What a class of chips does, to estimate whether our kernel takes less time than cuDNN's; nothing is measured.

    Attributes:
        ours, cudnn: shares of the peak of products that the kernels reach.
        flop: dense 16-bit products in the time of a byte from memory.
        launch: bytes in the time of a launch in a graph.
    """

    ours: float
    cudnn: float
    flop: float
    launch: float


# Of 700 TFLOP/s, 3 TB/s and 1.5 us on sm_90. On other classes a kernel of Triton's is not assumed to come so close.
ESTIMATES = {90: ConvEstimate(0.60, 0.70, 233.0, 4.5e6)}


def saves_time(architecture: int, pixels: int, inputs: int, outputs: int, taps: int, split: int, passes: float) -> bool:
    """Whether, by estimate, what cuDNN leaves to other launches exceeds what it computes faster.

    Args:
        pixels: of the result; of two images, whatever the batch, which must not change an image.
        split: of our launch, whose parts are written and read in fp32.
        passes: over the result, in 16 bits, that our kernel saves.
    """
    estimate = ESTIMATES.get(architecture)
    if estimate is None or not passes:
        return False
    result = IMAGES * pixels * outputs
    slower = 2 * result * inputs * taps * (1 / estimate.ours - 1 / estimate.cudnn) / estimate.flop
    if split > 1:
        slower += result * (2 * 4 * split + 2) + estimate.launch
    return slower < result * 2 * passes + estimate.launch


def saves_time_doubled(pixels: int, inputs: int, outputs: int) -> bool:
    """Whether four products in place of nine save more than summing the weights costs, by estimate, on any class.

    At 0.5 of the peak instead of cuDNN's 0.7, they take the time of 9 / 0.7 - 4 / 0.5 = 4.9 fewer products; every class
    computes at least 150 FLOP in the time of a byte. The sums read 9 weights and write 16.

    Args:
        pixels: of the result.
    """
    saved = 2 * IMAGES * pixels * outputs * inputs * 4.9 / 150
    return saved > 2 * (9 + 16) * inputs * outputs


def box_of(height: int, width: int, pixels: int) -> tuple[int, int, int]:
    """Images, rows and columns of a tile of `pixels`: as few tiles as possible, then the squarest one."""
    choices = []
    for columns in (1 << i for i in range(pixels.bit_length())):
        rows = min(pixels // columns, _power_of_two(height))
        if columns <= _power_of_two(width):
            images = pixels // (columns * rows)
            tiles = -(-height // rows) * -(-width // columns) / images
            choices.append((tiles, abs(math.log2(columns / rows)), images, rows, columns))
    _, _, *box = min(choices)
    return (box[0], box[1], box[2])


OFFSETS = 2**31  # that a tile counts in 32 bits, from a 64-bit address near it


@functools.lru_cache(maxsize=1024)
def widest_offset(
    batch: int, rows: int, columns: int, size: tuple[int, int], inputs: int, outputs: int, taps: tuple[int, int],
    stride: int,
) -> int:  # fmt: skip
    """The most elements between two that a tile of any launch reads or writes, of a convolution or of the upsampling by
    two, whose result is twice as high and wide.

    Args:
        rows, columns: of the map; size: of the result, or of each phase.
        taps: rows and columns of the kernel.
    """
    height, width = size
    widest = taps[0] * taps[1] * inputs * 2 * PIXELS  # of the weights
    for pixels in (PIXELS // 2, PIXELS, 2 * PIXELS):
        # Pixels that follow one another: rows of the result, and what is left of the map where an image ends.
        crossed = min(-(-pixels // (height * width)), batch - 1)
        lines = -(-pixels // width) + 1
        read = (stride * lines + (crossed + 1) * taps[0]) * columns * inputs
        images, high, _ = box_of(height, width, pixels)
        written = ((min(images, batch) - 1) * height + max(lines, high)) * 4 * width * outputs
        widest = max(widest, read, written)
    return widest


def _channels(outputs: int, two_parts: bool) -> tuple[int, int]:
    """Output channels of a tile, in two parts."""
    if outputs <= 64:
        return max(_power_of_two(outputs), 16), 0
    if two_parts and outputs % 160 == 0:
        return 128, 32
    return (128, 0) if outputs % 128 == 0 else (64, 0)


def _power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length()
