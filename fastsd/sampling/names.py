"""Spellings of samplers, and those of other programs that fastsd does not have, with the reason and the nearest."""

from __future__ import annotations

import re
from collections.abc import Mapping

ADAPTIVE = "its steps depend on the data"
UNGUIDED = "it steps along the output without guidance, which a row does not keep apart"
RESIZES = "it resizes or shifts the latent within a step"
OTHER_PROCESS = "it is for models of another process than Stable Diffusion's"
FLOW = "it is for flow-matching models"
INVERSE = "it adds noise to an image and generates none"
TWICE = "it calls the network a second time after correcting a step"

# By key: why, and the nearest sampler. The names of guidance-plus-plus variants are not listed: see `refusal`.
REFUSED: dict[str, tuple[str, str]] = {
    "dpmadaptive": (ADAPTIVE, "dpm_fast"),
    "dpmad": (ADAPTIVE, "dpm_fast"),
    "cfgppud10ab": (UNGUIDED, "lms"),
    "sasolverpece": (TWICE, "sa_solver"),
    "eulermax": (RESIZES, "euler"),
    "eulernegative": (RESIZES, "euler"),
    "eulerdy": (RESIZES, "euler"),
    "eulerdynegative": (RESIZES, "euler"),
    "eulersmea": (RESIZES, "euler"),
    "eulersmeady": (RESIZES, "euler"),
    "arvideo": (OTHER_PROCESS, "euler"),
    "flowmatcheulerdiscrete": (FLOW, "euler"),
    "flowmapeulerdiscrete": (FLOW, "euler"),
    "flowmatchheundiscrete": (FLOW, "heun"),
    "flowmatchlcm": (FLOW, "lcm"),
    "ltxeulerancestralrf": (FLOW, "euler_a"),
    "helios": (FLOW, "euler"),
    "heliosdmd": (FLOW, "euler"),
    "minimaxh3": (FLOW, "euler"),
    "piflow": (FLOW, "euler"),
    "rfd4proteina": (FLOW, "euler"),
    "scm": (FLOW, "lcm"),
    "edmeuler": (OTHER_PROCESS, "euler"),
    "edmdpmsolvermultistep": (OTHER_PROCESS, "dpm++2m"),
    "cosinedpmsolvermultistep": (OTHER_PROCESS, "dpm++2m_sde"),
    "cmstochasticiterative": (OTHER_PROCESS, "lcm"),
    "consistencydecoder": (OTHER_PROCESS, "lcm"),
    "cogvideoxddim": (OTHER_PROCESS, "ddim"),
    "cogvideoxdpm": (OTHER_PROCESS, "dpm++2m"),
    "ddpmwuerstchen": (OTHER_PROCESS, "ddpm"),
    "unclip": (OTHER_PROCESS, "ddpm"),
    "vqdiffusion": (OTHER_PROCESS, "ddpm"),
    "amused": (OTHER_PROCESS, "ddpm"),
    "blockrefinement": (OTHER_PROCESS, "ddpm"),
    "discreteddim": (OTHER_PROCESS, "ddim"),
    "entropybound": (OTHER_PROCESS, "ddpm"),
    "karrasve": (OTHER_PROCESS, "heun"),
    "scoresdeve": (ADAPTIVE, "euler_a"),
    "scoresdevp": (OTHER_PROCESS, "euler_maruyama"),
    "repaint": ("it goes back up by the mask", "restart"),
    "ddiminverse": (INVERSE, "ddim"),
    "dpmsolvermultistepinverse": (INVERSE, "dpm++2m"),
}


def key_of(name: str) -> str:
    """`name` without case, separators, a leading "k_" and diffusers' "Scheduler"; "+" becomes "p"."""
    lowered = re.sub(r"^k[_ ]|scheduler$", "", name.strip().lower())
    return re.sub(r"[^a-z0-9]", "", lowered.replace("+", "p"))


def refusal(name: str, known: Mapping[str, str]) -> tuple[str, str] | None:
    """Why fastsd does not have a sampler of another program, and the nearest; None: the name is not known at all.

    Args:
        name: as a user or an image has it.
        known: the samplers by the keys of their spellings.
    """
    key = key_of(name)
    if key in REFUSED:
        return REFUSED[key]
    plain = key.replace("cfgpp", "", 1)  # "Euler a CFG++", euler_ancestral_cfg_pp
    if plain != key and plain in known:
        return UNGUIDED, known[plain]
    return None
