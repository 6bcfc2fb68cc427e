"""The rows of `fastsd.parameters` for guidance beside its scale, and for what the UNet does otherwise in a step."""

from __future__ import annotations

from fastsd.parameters.kinds import HOW, MAX_STEPS, SHARE, Number, Numbers, Parameter, Text, Whole

PAG = ("pag_scale", "which says by how much")

GUIDANCE_ROWS: tuple[Parameter, ...] = (
    Parameter(
        "guidance_start",
        SHARE,
        "the share of the steps that run before guidance acts, 0 to 1; they take half the time",
        ("--guidance-start",),
        HOW,
        0.0,
        label="Guidance start",
        rare=True,
    ),
    Parameter(
        "guidance_end",
        SHARE,
        "the share of the steps after which guidance acts no more, 0 to 1",
        ("--guidance-end",),
        HOW,
        1.0,
        label="Guidance end",
        rare=True,
    ),
    Parameter(
        "pag_scale",
        Number(low=0, high=100),
        "perturbed-attention guidance: how far away from results without self-attention, as in 3; half more work",
        ("--pag",),
        HOW,
        label="PAG scale",
        rare=True,
    ),
    Parameter(
        "pag_adaptive_scale",
        Number(low=0, high=100),
        "by how much the scale of --pag falls with each timestep below 1000",
        ("--pag-adaptive",),
        HOW,
        0.0,
        needs=PAG,
        label="PAG adaptive scale",
        rare=True,
    ),
    Parameter(
        "pag_layers",
        Text(metavar="NAMES"),
        "the blocks whose self-attention it perturbs: mid, or names as down_blocks.2,up_blocks.1.attentions.0",
        ("--pag-layers",),
        HOW,
        "mid",
        needs=PAG,
        label="PAG layers",
        rare=True,
    ),
    Parameter(
        "freeu",
        Numbers(metavar="B1,B2,S1,S2", count=4, high=10),
        "FreeU's weights of the lowest two levels and of their skip connections, as in 1.5,1.6,0.9,0.2",
        ("--freeu",),
        HOW,
        label="FreeU",
        rare=True,
    ),
    Parameter(
        "deepcache",
        Whole(low=1, high=MAX_STEPS),
        "DeepCache: compute the whole UNet in every Nth call, and between them its first blocks alone: faster, coarser",
        ("--deepcache",),
        HOW,
        label="DeepCache",
        rare=True,
    ),
    Parameter(
        "deepcache_branch",
        Whole(low=0, high=99),
        "how many more blocks each call computes, 0 or above",
        ("--deepcache-branch",),
        HOW,
        0,
        needs=("deepcache", "which says how often the whole UNet runs"),
        label="DeepCache branch",
        rare=True,
    ),
)
