"""The rows of `fastsd.parameters` for inpainting and outpainting: what is painted anew, and how."""

from __future__ import annotations

from fastsd.parameters.kinds import MAX_SIDE, START, Choice, File, Number, Parameter, Sides, Switch, Whole

FILLS = ("original", "fill", "noise", "blank")
MASK = ("mask_image", "the part to paint anew, or outpaint")

MASK_ROWS: tuple[Parameter, ...] = (
    Parameter(
        "mask_image",
        File(stored=dict),
        "change where this image is white, grey in part",
        ("--mask",),
        START,
        needs=("image", "the image to change"),
        metadata_key="mask",
    ),
    Parameter(
        "outpaint",
        Sides(),
        "paint so many pixels around it too",
        ("--outpaint",),
        START,
        needs=("image", "the image to enlarge"),
        label="Outpaint",
        counts_as="mask_image",
    ),
    Parameter(
        "mask_blur",
        Number(low=0, high=256),
        "blur the mask's edge by this many pixels, both ways",
        ("--mask-blur",),
        START,
        0.0,
        needs=MASK,
        label="Mask blur",
        rare=True,
    ),
    Parameter(
        "mask_invert",
        Switch(),
        "change where the mask is black",
        ("--mask-invert",),
        START,
        False,
        needs=MASK,
        rare=True,
    ),
    Parameter(
        "inpaint_fill",
        Choice(options=FILLS),
        "what the painted part starts from: original, fill (the colours around it), noise, blank",
        ("--inpaint-fill",),
        START,
        "original",
        needs=MASK,
        rare=True,
    ),
    Parameter(
        "inpaint_only_masked",
        Switch(),
        "paint the mask's surroundings alone, at full size, and paste them back",
        ("--inpaint-only-masked",),
        START,
        False,
        needs=MASK,
        rare=True,
    ),
    Parameter(
        "inpaint_padding",
        Whole(low=0, high=MAX_SIDE),
        "pixels around the mask that it then sees",
        ("--inpaint-padding",),
        START,
        32,
        needs=("inpaint_only_masked", "which paints the mask's surroundings alone"),
        rare=True,
    ),
)
