"""`Upscaler`: an image enlarged by a network, to any factor or size."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsd.cuda.capture import ran_out_of_memory
from fastsd.cuda.cudnn import fixed_convolutions
from fastsd.errors import FastsdError, about, named_arguments
from fastsd.image.files import flatten, load
from fastsd.model.upscalers import UpscalerConfig, UpscalerNetwork
from fastsd.parameters.kinds import Number, Whole
from fastsd.runtime import memory
from fastsd.runtime.devices import dtype_name, resolve_device, resolve_dtype, undisturbed
from fastsd.runtime.memory import GIB
from fastsd.upscale import SCALES, TILES
from fastsd.upscale.tiles import Seam, count_tiles, in_tiles
from fastsd.weights.hub.locate import locate_file
from fastsd.weights.layouts.upscaler_file import load_upscaler

TRIED = (512, 384, 256, 192, 128, 64)  # tiles, of which the first that fits into memory is taken
BYTES_A_RESULT = 12  # of a pixel: its colours and transparency as an array, as an image, and enlarged or shrunk

Progress = Callable[[int, int], Any]


class Upscaler:
    """A network that enlarges images, as ESRGAN and Real-ESRGAN do.

    Several threads may call one; one works at a time.

    Attributes:
        network: on its device, in its precision.
        name: of its file, without the ending.
    """

    def __init__(self, network: UpscalerNetwork, name: str = "upscaler"):
        self.network, self.name = network, name
        self._lock = threading.Lock()
        self._notes: list[str] = []

    @classmethod
    @named_arguments
    @undisturbed()
    def from_file(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        allow_pickle: bool = False,
    ) -> Upscaler:
        """Load an upscaler: ESRGAN's networks (RRDB) or Real-ESRGAN's compact ones.

        Args:
            path: a `.safetensors` or `.pth` file, or a hub id of one, `org/name/file.safetensors`.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: "auto" is fp16 on CUDA and fp32 on the CPU.
            allow_pickle: read `.pth` files; only tensors and plain values are unpickled.

        Raises:
            FastsdError: no such file, no upscaler, one of a kind that fastsd does not have, malformed; no such device.
        """
        place = resolve_device(device)
        precision = torch.float32 if dtype == "auto" and place.type == "cpu" else resolve_dtype(dtype, place)
        found = locate_file(path).path
        return cls(load_upscaler(found, precision, place, allow_pickle), found.stem)

    @property
    def config(self) -> UpscalerConfig:
        """The network's sizes."""
        return self.network.config

    @property
    def scale(self) -> int:
        """The network's own factor."""
        return self.config.scale

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which it runs."""
        return next(self.network.parameters()).dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return Upscaler, (self.network, self.name)

    @named_arguments
    def __call__(
        self,
        image: Image.Image,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        tile: int | None = None,
        progress: Progress | None = None,
    ) -> Image.Image:
        """An image enlarged.

        The network runs once, and again while the result is smaller than what is asked for; Lanczos brings that to the
        size. Transparency goes through the network as an image of its own. A network for grey images enlarges the
        brightness, and Lanczos the colours.

        Args:
            image: of any Pillow mode; 16 bits become 8.
            scale: the result's sides over the image's, 0.25 to 16; None: the network's own factor.
            size: (width, height) of the result, in place of a factor.
            tile: the network runs over tiles of as many pixels a side, 64 or more; None: the largest up to 512 that
                fits into memory.
            progress: called after each tile, with how many are done and how many there are.

        Returns:
            RGB; or RGBA where a pixel of the image is not opaque.

        Raises:
            FastsdError: no image, a factor out of range, too large for the memory.
        """
        if not isinstance(image, Image.Image) or not image.width * image.height:
            raise FastsdError("it should be a PIL image with pixels", argument="image", value=type(image).__name__)
        width, height = self.result_size(image.size, scale, size)
        passes = self.check_memory(image.size, scale, size, tile)
        with about("image"):
            load(image)
        image = flatten(image, "RGBA", 0)
        done, total = 0, self._layers(image) * sum(self._count(own, each) for own, each in passes)
        with self._lock, _fitting(image.size):
            for _, each in passes:
                for result in self._pass(image, each):
                    done += 1
                    if progress is not None:
                        progress(done, total)
                    image = image if result is None else result
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)

    def result_size(
        self, given: tuple[int, int], scale: float | None = None, size: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """The (width, height) of a call's result, for an image's; raises as the call does."""
        if size is not None:
            if scale is not None:
                raise FastsdError("given with {scale}; either says how large the result is", argument="size")
            if not isinstance(size, tuple | list) or len(size) != 2:
                raise FastsdError("it should be (width, height)", argument="size", value=size)
            width, height = (_checked("size", Whole(low=1, high=2**20), side) for side in size)
            return width, height
        factor = float(self.scale) if scale is None else _checked("scale", SCALES, scale)
        return max(round(given[0] * factor), 1), max(round(given[1] * factor), 1)

    def check_memory(
        self,
        given: tuple[int, int],
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        tile: int | None = None,
    ) -> list[tuple[tuple[int, int], int]]:
        """The sizes at which the network would run for an image of (width, height), each with the side of its tiles.

        Raises:
            FastsdError: as the call does; nothing has been computed.
        """
        target = self.result_size(given, scale, size)
        side = None if tile is None else _checked("tile", TILES, tile)
        sizes = list(self._sizes(given, target))
        self._check_result(sizes, target)
        return [(own, self._tile(own, side)) for own in sizes]

    def take_notes(self) -> list[str]:
        """What the user should know of the calls since the last call of this."""
        notes, self._notes = self._notes, []
        return notes

    def _sizes(self, size: tuple[int, int], target: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """The sizes at which the network runs."""
        yield size
        while self.scale > 1:
            size = size[0] * self.scale, size[1] * self.scale
            if size[0] >= target[0] and size[1] >= target[1]:
                return
            yield size

    def _tile(self, size: tuple[int, int], sides: int | None) -> int:
        """The side of a tile that fits into the device's memory; at most as long as the image.

        Raises:
            FastsdError: none does.
        """
        seam = self._seam
        free, needed = memory.available(self.device), 0
        for side in TRIED if sides is None else (sides,):
            side = max(side, seam.smallest) // seam.step * seam.step
            width, height = (min(own, side) for own in size)
            needed = width * height * self.config.numbers_a_pixel * self.dtype.itemsize
            if free is None or needed <= free:
                return side
        advice = "close other programs" if sides is None else "a smaller {tile} takes less"
        raise FastsdError(
            f"a tile takes {needed / GIB:.1f} GiB, {(free or 0) / GIB:.1f} GiB are free on {self.device}; {advice}"
        )

    def _check_result(self, passes: list[tuple[int, int]], target: tuple[int, int]) -> None:
        """Refuse a result that does not fit into memory, before anything is computed."""
        last = passes[-1][0] * self.scale, passes[-1][1] * self.scale
        largest = max(last, target, key=lambda size: size[0] * size[1])
        free, needed = memory.available(torch.device("cpu")), largest[0] * largest[1] * BYTES_A_RESULT
        if free is not None and needed > free:
            raise FastsdError(
                f"the result is computed at {largest[0]}x{largest[1]}, which takes {needed / GIB:.1f} GiB; "
                f"{free / GIB:.1f} GiB are free: a smaller factor or image takes less"
            )

    @property
    def _seam(self) -> Seam:
        return Seam.of(self.config.radius, self.config.unshuffle)

    def _count(self, size: tuple[int, int], tile: int) -> int:
        step = self.config.unshuffle
        width, height = (-(-side // step) * step for side in size)
        return count_tiles(height, width, tile, self._seam)

    @staticmethod
    def _layers(image: Image.Image) -> int:
        """How often the network runs over an image: for its colours, and for its transparency."""
        return 2 if image.mode == "RGBA" else 1

    def _pass(self, image: Image.Image, tile: int) -> Iterator[Image.Image | None]:
        """The network once over an image; yields None after each tile but the last, then the result."""
        colours = image.convert("RGB")
        found = yield from self._layer(colours, tile)
        if image.mode == "RGBA":
            yield None
            alpha = image.getchannel("A")
            clear = yield from self._layer(Image.merge("RGB", (alpha, alpha, alpha)), tile)
            found.putalpha(clear.convert("L"))
        yield found

    def _layer(self, image: Image.Image, tile: int) -> Any:
        """An RGB image through the network; yields as `_pass`, and returns the result."""
        if self.config.channels == 3:
            array = yield from self._tiles(np.asarray(image), tile)
            return Image.fromarray(array)
        brightness, *colours = image.convert("YCbCr").split()
        array = yield from self._tiles(np.asarray(brightness)[:, :, None], tile)
        enlarged = Image.fromarray(array[:, :, 0])
        others = [each.resize(enlarged.size, Image.Resampling.LANCZOS) for each in colours]
        return Image.merge("YCbCr", (enlarged, *others)).convert("RGB")

    def _tiles(self, image: np.ndarray, tile: int) -> Any:
        """`[H, W, C]` uint8 through the network; yields None after each tile but the last, and returns the result."""
        height, width, _ = image.shape
        for result in in_tiles(self._run, mirrored(image, self.config.unshuffle), self.scale, tile, self._seam):
            if result is None:
                yield None
        assert result is not None  # the last one is
        return np.ascontiguousarray(result[: height * self.scale, : width * self.scale])

    @undisturbed()
    def _run(self, part: np.ndarray) -> np.ndarray:
        """One tile, uint8, to `[h, w, C]` fp32 from 0 to 255. What overflows in 16 bits runs in fp32 from then on.

        Raises:
            FastsdError: it is not finite even in fp32.
        """
        result = self._computed(part)
        if result is None and self.dtype != torch.float32:
            self._notes.append(f"the upscaler overflowed in {dtype_name(self.dtype)}; it runs in fp32 from now on")
            self.network.float()
            result = self._computed(part)
        if result is None:
            raise FastsdError("the upscaler's result is not finite: its file holds weights that are of no use")
        return result

    @torch.inference_mode()
    def _computed(self, part: np.ndarray) -> np.ndarray | None:
        """What `_run` returns; None where it is not finite."""
        pixels = torch.from_numpy(np.array(part)).to(self.device).to(self.dtype).div_(255)[None]
        with fixed_convolutions(self.device):
            result = self.network(pixels).float()
        return result[0].clamp_(0, 1).mul_(255).cpu().numpy() if bool(torch.isfinite(result).all()) else None


@contextmanager
def _fitting(size: tuple[int, int]) -> Iterator[None]:
    """Inside this context, memory that runs out although it was checked is an error of one line."""
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # whoever keeps the error would keep their arrays
        message = f"not enough memory to enlarge {size[0]}x{size[1]}; a smaller tile, factor or image takes less"
        raise FastsdError(message) from error


def mirrored(image: np.ndarray, step: int) -> np.ndarray:
    """`[H, W, C]` mirrored at its end to the next multiples of `step`; repeated where it is smaller than that."""
    below, right = (-side % step for side in image.shape[:2])
    if not below and not right:
        return image
    mode: Any = "reflect" if below < image.shape[0] and right < image.shape[1] else "edge"
    return np.pad(image, ((0, below), (0, right), (0, 0)), mode)


def _checked(argument: str, kind: Number, value: Any) -> Any:
    with about(argument):
        return kind.check(value)
