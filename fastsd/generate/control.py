"""ControlNets and T2I-Adapters in a call: the control images, checked against the model and the size of the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from fastsd.components import Components
from fastsd.errors import FastsdError, about, named_arguments
from fastsd.generate.canvas import cut
from fastsd.generate.masks import InpaintMask
from fastsd.generate.sizes import read_image
from fastsd.image.files import WHITE
from fastsd.model.controlnet import ControlNet
from fastsd.model.t2i_adapter import T2IAdapter, adapter_downscale
from fastsd.parameters.kinds import SHARE, Number
from fastsd.parameters.rows import MAX_CONTROL_WEIGHT
from fastsd.runtime.devices import dtype_name
from fastsd.sampling.table import Table

WEIGHT = Number(low=-MAX_CONTROL_WEIGHT, high=MAX_CONTROL_WEIGHT)
PARTS = {"weight": WEIGHT, "start": SHARE, "end": SHARE}  # the numbers of a control


@named_arguments
@dataclass(frozen=True)
class Control:
    """An image that steers the result through a ControlNet or a T2I-Adapter.

    Attributes:
        net: from `Pipeline.load_controlnet`.
        image: edges, depths, a pose: what the net was trained to read; scaled to the size of the result.
        weight: multiplies what the net adds; 0 turns it off.
        start, end: the share of the steps in which it takes part, 0 to 1.
    """

    net: ControlNet | T2IAdapter
    image: Image.Image
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def rows(self, table: Table) -> frozenset[int]:
        """The rows of the table in which it takes part: those of steps that lie within its start and end."""
        return table.rows_within(self.start, self.end) if self.weight else frozenset()


def check_controls(controls: Any) -> list[Control]:
    """`controls` as a list of them, or a FastsdError."""
    if not isinstance(controls, list | tuple) or not all(isinstance(control, Control) for control in controls):
        raise FastsdError("should be a list of fastsd.Control", argument="controls")
    return list(controls)


def fit_controls(
    controls: Sequence[Control], components: Components, size: tuple[int, int], mask: InpaintMask | None = None
) -> tuple[tuple[Control, ...], list[str]]:
    """The controls with RGB images at the size of the result, and notes on what was changed.

    size: width and height. mask: where it paints a part alone, the control images belong to the whole image, and that
    part of them is taken.

    Raises:
        FastsdError: a net of another family or pipeline, an image that is none, a number out of range.
    """
    fitted, notes = [], []
    for k, control in enumerate(controls):
        name = f"controls[{k}]"
        with about(f"{name}.net"):
            _check_net(control.net, components)
        image, more = read_image(control.image, f"{name}.image", "RGB", WHITE)
        notes += more
        for part, kind in PARTS.items():
            with about(f"{name}.{part}"):
                kind.check(getattr(control, part))
        if control.start > control.end:
            raise FastsdError(f"{control.start:g} comes after its end {control.end:g}", argument=f"{name}.start")
        whole = size if mask is None else mask.original.size
        if image.size != whole:
            notes.append(f"the control image was resized from {image.width}x{image.height} to {whole[0]}x{whole[1]}")
        resized = resize_control(replace(control, image=image), *whole)
        if mask is not None and mask.box != (0, 0, *whole):
            resized = replace(resized, image=cut(resized.image, mask.box))
        fitted.append(resize_control(resized, *size))
    return tuple(fitted), notes


def resize_control(control: Control, width: int, height: int) -> Control:
    """The same control with its image at another size, by Lanczos."""
    if control.image.size == (width, height):
        return control
    return replace(control, image=control.image.resize((width, height), Image.Resampling.LANCZOS))


def idle_controls(controls: Sequence[Control], table: Table, refiner_row: int) -> Iterator[str]:
    """A note on each control that takes part in no step, although its weight is not 0.

    refiner_row: the first row of the refiner, which ignores controls.
    """
    for k, control in enumerate(controls, start=1):
        rows = control.rows(table)
        if not len(table) or not control.weight or any(row < refiner_row for row in rows):
            continue
        why = f"none of the {table.steps} lies within {control.start:g} and {control.end:g}"
        if rows:
            why = "the refiner, which ignores controls, does all of its steps"
        yield f"control {k} takes part in no step: {why}"


def _check_net(net: Any, components: Components) -> None:
    """Refuse a ControlNet or a T2I-Adapter that cannot steer this checkpoint's UNet."""
    wanted, shrinks = components.unet.config, components.vae.config.downscale
    if isinstance(net, T2IAdapter):
        fits, downscale, wants = net.config.fits(wanted), net.config.downscale, adapter_downscale(wanted, shrinks)
        other = f"this model takes 1/{wants}"
    elif isinstance(net, ControlNet):
        found, downscale, wants = net.config, net.downscale, shrinks
        fits = found.block_out_channels == wanted.block_out_channels
        fits = fits and found.cross_attention_dim == wanted.cross_attention_dim
        other = f"the model's autoencoder to 1/{shrinks}"
    else:
        raise FastsdError(f"should come from Pipeline.load_controlnet, not {type(net).__name__}")
    if not fits:
        raise FastsdError("it was loaded for a model of another family")
    if downscale != wants:
        raise FastsdError(f"it shrinks its image to 1/{downscale} and {other}; they should be of one family")
    own, model = next(net.parameters()), components.unet.conv_in.weight
    if (own.dtype, own.device) != (model.dtype, model.device):
        raise FastsdError(
            f"it is {dtype_name(own.dtype)} on {own.device} and the model {dtype_name(model.dtype)} on {model.device}; "
            "load it with this pipeline's load_controlnet"
        )
