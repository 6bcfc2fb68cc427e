"""The rows of `fastsd.parameters` for guidance beside its scale: in which steps it acts."""

from __future__ import annotations

from fastsd.parameters.kinds import HOW, SHARE, Parameter

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
)
