"""A1111's text of an image's settings, written and read.

The PNG text chunk `parameters`:

    a lighthouse at dusk
    Negative prompt: fog
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, Model: sd15, ...

A1111's hashes are written where they cost nothing: `Lora hashes` and `TI hashes`, whose files are small, always;
`Model hash` and `VAE hash` where they are known (`fastsd.files.hashes`), since those files have gigabytes. They are
short SHA-256s: 10 digits of a model's file, 12 of an embedding's file, 12 of a LoRA's tensors alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from fastsd.errors import FastsdError
from fastsd.image.programs import EMPHASIS, ESSENTIAL, HARMLESS, RNG, rules_of
from fastsd.parameters import PARAMETERS
from fastsd.parameters.kinds import MAX_STEPS, Name
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES

FILLS = {"fill": "fill", "noise": "latent noise", "blank": "latent nothing"}  # A1111's "Masked content"
ALL_STEPS_RUN = ("a1111", "comfy")  # programs by whose rules the second pass runs all of its own steps
HASHES = {"Lora hashes": "lora_hashes", "TI hashes": "embedding_hashes"}
UPSCALERS = {
    "latent": "Latent",
    "latent-antialiased": "Latent (antialiased)",
    "latent-bicubic": "Latent (bicubic)",
    "latent-bicubic-antialiased": "Latent (bicubic antialiased)",
    "latent-nearest": "Latent (nearest)",
    "latent-nearest-exact": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}


def write_parameters(settings: Mapping[str, Any]) -> str:
    """A1111's text. Settings that are missing or None are left out."""
    pairs: dict[str, Any] = {}
    for parameter in PARAMETERS.values():
        if parameter.name in _WRITERS:
            pairs |= _WRITERS[parameter.name](settings)
        elif parameter.label and settings.get(parameter.name) != parameter.default:
            pairs[parameter.label] = settings.get(parameter.name)
    pairs |= {
        "Lora hashes": _hashes(settings.get("loras"), lambda lora: (_bare(lora["name"]), lora.get("hash"))),
        "TI hashes": _hashes(settings.get("embeddings"), lambda found: (found["token"], found["sha256"][:12])),
        "Device": settings.get("device"),
        "Dtype": settings.get("dtype"),
        "RNG": "NV" if _noise(settings) == "gpu" else "CPU",
        "Version": f"fastsd {settings['version']}" if settings.get("version") else None,
    }
    line = ", ".join(f"{key}: {quote(_text(value))}" for key, value in pairs.items() if value is not None)
    negative = settings.get("negative_prompt")
    return f"{settings.get('prompt', '')}{f'{chr(10)}Negative prompt: {negative}' if negative else ''}\n{line}".strip()


def with_upscale(texts: Mapping[str, str], name: str, scale: float, suffix: str) -> dict[str, str]:
    """An image's texts and, as A1111 has it, that it was enlarged: in a PNG as a text of its own, `postprocessing`;
    elsewhere, where there is none, at the end of `parameters`."""
    said = f"Postprocess upscale by: {scale:g}, Postprocess upscaler: {quote(name)}"
    if suffix.lower() == ".png":
        return {**texts, "postprocessing": said}
    return {**texts, "parameters": ", ".join(filter(None, (texts.get("parameters"), said)))}


def _write_sampler(settings: Mapping[str, Any]) -> dict[str, Any]:
    sampler = settings.get("sampler")
    return {"Sampler": SAMPLERS[sampler].label if sampler in SAMPLERS else sampler}


def _write_schedule(settings: Mapping[str, Any]) -> dict[str, Any]:
    sampler, schedule = settings.get("sampler"), settings.get("schedule")
    if schedule is None or (sampler in SAMPLERS and not SAMPLERS[sampler].takes_schedule):
        return {}
    return {"Schedule type": SCHEDULES.get(schedule, schedule)}


def _write_size(settings: Mapping[str, Any]) -> dict[str, Any]:
    width, height = settings.get("width"), settings.get("height")
    return {"Size": f"{width}x{height}" if width and height else None}


# Parameters whose value is not one pair of A1111's text, by what they write.
_WRITERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "sampler": _write_sampler,
    "schedule": _write_schedule,
    "width": _write_size,
    "emphasis": lambda settings: {
        "Emphasis": EMPHASIS[settings["emphasis"]] if settings.get("emphasis") not in (None, "original") else None
    },
    "noise": lambda settings: {"Noise": _noise(settings) if _noise(settings) in ("batch", "comfy") else None},
    "model": lambda settings: {"Model hash": settings.get("model_hash"), "Model": settings.get("model")},
    "vae": lambda settings: {
        "VAE hash": (settings.get("vae") or {}).get("hash"),
        "VAE": (settings.get("vae") or {}).get("name"),
    },
    "strength": lambda settings: {
        "Denoising strength": settings.get("strength")
        if settings.get("strength") is not None
        else settings.get("hires_strength")
    },
    "hires_steps": lambda settings: {"Hires steps": _steps_that_run(settings)},
    "hires_upscaler": lambda settings: {"Hires upscaler": _upscaler(settings.get("hires_upscaler"))},
    "mask_invert": lambda settings: {"Mask mode": "Inpaint not masked" if settings.get("mask_invert") else None},
    "inpaint_fill": lambda settings: {"Masked content": FILLS.get(settings.get("inpaint_fill") or "")},
    "inpaint_only_masked": lambda settings: {
        "Inpaint area": "Only masked" if settings.get("inpaint_only_masked") else None,
        "Masked area padding": settings.get("inpaint_padding") if settings.get("inpaint_only_masked") else None,
    },
    "refiner": lambda settings: {"Refiner": _title(settings.get("refiner") or {})},
}


def _upscaler(name: str | None) -> str | None:
    """A1111's name of an upscaler; that of a file is its own."""
    return None if name is None else UPSCALERS.get(name, name)


def _noise(settings: Mapping[str, Any]) -> str:
    """Where the noise comes from, also in settings that leave it to the rules of a program."""
    own = {"a1111": "gpu", "comfy": "comfy", "diffusers": "batch"}
    return settings.get("noise") or own.get(settings.get("like") or "none", "cpu")


def _hashes(files: Any, named: Callable[[dict[str, Any]], tuple[str, str | None]]) -> str | None:
    """A1111's list, "name: hash, name: hash", of those whose hash is known; a name loses its colons and commas."""
    pairs = dict(named(one) for one in files or () if isinstance(one, dict))
    return ", ".join(f"{re.sub('[:,]', '', name)}: {digest}" for name, digest in pairs.items() if digest) or None


def read_hashes(value: str) -> dict[str, str]:
    """A1111's list of names and hashes, each hash by its name; what is no such pair is left out."""
    pairs = (one.rpartition(":") for one in value.split(","))
    return {name.strip(): digits.strip().lower() for name, _, digits in pairs if name.strip() and digits.strip()}


def is_another(digits: str, *hashes: str) -> bool:
    """Whether a file with these hashes is not the one of A1111's short hash.

    Hashes of fewer than 10 digits are of older rules, which say too little.
    """
    return len(digits) >= 10 and not any(one.startswith(digits) for one in hashes)


def _title(model: Mapping[str, Any]) -> str | None:
    """A1111's name of a model: without its ending, and with its hash where that is known."""
    name, digits = model.get("name"), model.get("hash")
    return name and f"{_bare(name)}{f' [{digits}]' if digits else ''}"


def _bare(name: str) -> str:
    """A file's name without its ending; a folder's, which may hold dots, as it is."""
    return name.removesuffix(".safetensors").removesuffix(".ckpt")


def parse_parameters(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A1111's text, as it and its kin write it.

    As A1111 has it, the last line holds the settings if at least three can be found in it. Failing that, the last line
    that starts with "Steps:" does; extensions write more lines after it.

    Returns:
        The settings, with `lora_hashes` and `embedding_hashes` by name, and the pairs that are not understood.
    """
    lines = [line.strip() for line in text.strip().split("\n")]
    pairs, end = split_pairs(lines[-1]), len(lines) - 1
    if len(pairs) < 3:
        steps = [i for i, line in enumerate(lines) if line.startswith("Steps:")]
        pairs, end = (split_pairs(lines[steps[-1]]), steps[-1]) if steps else ({}, len(lines))
    marker = "Negative prompt:"
    start = next((i for i, line in enumerate(lines[:end]) if line.startswith(marker)), end)
    negative = [line.removeprefix(marker).strip() for line in lines[start:end]]
    settings: dict[str, Any] = {"prompt": "\n".join(lines[:start]), "negative_prompt": "\n".join(negative)}
    others: dict[str, str] = {}
    for key, value in pairs.items():
        understood = _understand(key, value, pairs)
        if understood is None and key not in HARMLESS:
            others[key] = value
        settings |= understood or {}
    if ESSENTIAL & pairs.keys() and (rules := rules_of(pairs)) != "none":
        settings["like"] = rules
        if "sampler" in settings and "Schedule type" not in pairs:  # A1111 writes the sampler's favourite, where it is
            settings["schedule"] = "default"
    return settings, others


def is_settings(text: str) -> bool:
    """Whether a text holds settings in A1111's form."""
    return any(ESSENTIAL & split_pairs(line.strip()).keys() for line in text.split("\n"))


def _understand(key: str, value: str, pairs: Mapping[str, str]) -> dict[str, Any] | None:
    """One pair of A1111's line as settings, or None."""
    simple = next((row for row in PARAMETERS.values() if row.label == key), None)
    try:
        match key:
            case "Hires upscale" | "Hires steps" | "Hires upscaler" | "Hires resize":
                return _second_pass(pairs)
            case "Hires sampler" | "Hires schedule type" | "Hires CFG Scale" | "Hires prompt" | "Hires negative prompt":
                return {} if value == pairs.get(_SAME.get(key, "")) else None
            case "Lora hashes" | "TI hashes":
                return {HASHES[key]: read_hashes(value)}
            case "Emphasis":
                return {"emphasis": _by_label(EMPHASIS, value)} if value in EMPHASIS.values() else None
            case "RNG" if not pairs.get("Version", "").startswith("fastsd ") or value == "NV":
                return {"noise": RNG[value]} if value in RNG and "Noise" not in pairs else None
            case "Eta" if pairs.get("Sampler") == "DDIM":  # before A1111 1.6
                return {"eta": _finite(value)}
            case "Denoising strength" if any(other.startswith(("Hires", "First pass size")) for other in pairs):
                return _second_pass(pairs)
            case "Denoising strength":
                return {"strength": _finite(value)}
            case "Sampler" if value == "Default" and "App" in pairs:  # SD.Next's name of the model's own
                return {}
            case "Sampler":
                return {"sampler": _by_label({name: entry.label for name, entry in SAMPLERS.items()}, value)}
            case "Schedule type":
                return {} if value == "Automatic" else {"schedule": _by_label(SCHEDULES, value)}
            case "Size":
                width, height = value.split("x")
                return {"width": int(width), "height": int(height)}
            case "Mask mode" | "Inpaint area" | "Masked content":
                return _MASKS.get((key, value.lower()))
            case "Masked area padding":
                return {"inpaint_padding": int(value)}
            case "Model hash":
                return {"model_hash": value}
            case "Model":
                return {"model": value}
            case "Device" | "Dtype" if pairs.get("Version", "").startswith("fastsd "):
                return {key.lower(): value}
            case _ if simple is not None:
                return {
                    simple.name: simple.kind.parse(value) if isinstance(simple.kind, Name) else simple.kind.read(value)
                }
    except (ValueError, OverflowError, FastsdError):  # a number of hundreds of digits has no quotient
        pass
    return None


# A1111's words of inpainting (modules/processing.py, `StableDiffusionProcessingImg2Img.init`; modules/ui.py).
_MASKS: dict[tuple[str, str], dict[str, Any]] = {
    ("Mask mode", "inpaint not masked"): {"mask_invert": True},
    ("Mask mode", "inpaint masked"): {"mask_invert": False},
    ("Inpaint area", "only masked"): {"inpaint_only_masked": True},
    ("Masked content", "original"): {"inpaint_fill": "original"},
    **{("Masked content", label): {"inpaint_fill": name} for name, label in FILLS.items()},
}
_SAME = {"Hires sampler": "Sampler", "Hires schedule type": "Schedule type", "Hires CFG Scale": "CFG scale"}


def _second_pass(pairs: Mapping[str, str]) -> dict[str, Any] | None:
    """A1111's second pass as settings; None without its upscaler, or with another shape of image.

    An upscaler that fastsd lacks, or that is a file, has the name that A1111 shows, by which another, or the file, is
    asked for where the image is repeated.

    A1111's "Hires steps" all run, on the last part of a schedule that is as much longer (`setup_img2img_steps` in its
    modules/sd_samplers_common.py), and so they do where `like` is in `ALL_STEPS_RUN`. Elsewhere `hires_steps` are that
    schedule's.
    Without them, or 0: as many as of the first pass.
    """
    upscaler = upscaler_named(pairs.get("Hires upscaler", ""))
    scale = _hires_scale(pairs)
    if not upscaler or scale is None or not {"Steps", "Denoising strength"} <= pairs.keys():
        return None
    strength, given = _finite(pairs["Denoising strength"]), int(pairs.get("Hires steps", 0))
    found = {"hires_scale": scale, "hires_strength": strength, "hires_upscaler": upscaler}
    if rules_of(pairs) in ALL_STEPS_RUN or pairs.get("Like") in ALL_STEPS_RUN:
        return found | ({"hires_steps": given} if given else {})
    steps = run = given or int(pairs["Steps"])
    if 0 < strength <= 1:
        steps = min(int(run / strength), MAX_STEPS)
        steps += int(steps * strength) < run  # the division's remainder
    return found | {"hires_steps": min(steps, MAX_STEPS)}


def _hires_scale(pairs: Mapping[str, str]) -> float | None:
    """By how much the second pass is larger; None where it has another shape."""
    if "Hires upscale" in pairs:
        return _finite(pairs["Hires upscale"])
    if "Hires resize" not in pairs or "Size" not in pairs:
        return None
    (width, height), (wide, high) = (map(int, pairs[key].split("x")) for key in ("Size", "Hires resize"))
    return wide / width if width > 0 and height > 0 and wide * height == high * width else None


def _steps_that_run(settings: Mapping[str, Any]) -> str | None:
    """What A1111 calls "Hires steps", see `_second_pass`; None where no step runs."""
    steps, strength = settings.get("hires_steps"), settings.get("hires_strength")
    if steps is None or strength is None:
        return None
    run = steps if settings.get("like") in ALL_STEPS_RUN else int(steps * strength)
    return str(run) if run else None


def split_pairs(line: str) -> dict[str, str]:
    """The `Key: value` pairs of a line; values in double quotes are JSON strings, others run to the next comma."""
    pairs, at = {}, 0
    while at < len(line):
        found = _PAIR.match(line, at)
        if found:
            pairs[found["key"]] = unquote(found["value"].strip())
            at = found.end()
        else:
            comma = line.find(",", at)
            at = len(line) if comma < 0 else comma + 1
    return pairs


# A key of up to 60 characters; then a quoted text that ends the pair, or everything up to a comma.
_PAIR = re.compile(
    r"""\s*(?P<key>\w[\w \-/]{0,59}):\s*"""
    r"""(?P<value>"(?:\\.|[^\\"])*"(?=\s*(?:,|$))|[^,]*)(?:\s*,|\s*$)"""
)


def quote(text: str) -> str:
    """`text` as A1111 writes a value: as a JSON string where it could not be told apart from what stands around it."""
    if re.search(r'[,:\n"\\]', text) or text != text.strip():
        return json.dumps(text, ensure_ascii=False)
    return text


def unquote(text: str) -> str:
    """The opposite of `quote`; what is no JSON string stays as it is."""
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except (ValueError, RecursionError):
        return text


def upscaler_named(label: str) -> str:
    """Our name for the upscaler that A1111's hires fix calls so; a file's stays as it is. None resizes as Lanczos does
    (`resize_image` of A1111's modules/images.py)."""
    return "lanczos" if label.lower() == "none" else _by_label(UPSCALERS, label)


def _by_label(labels: Mapping[str, str], label: str) -> str:
    """Our name for A1111's label, in any case; another program's label stays as it is."""
    return next((name for name, known in labels.items() if known.lower() == label.lower()), label)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _text(value: Any) -> str:
    """A number without a needless ".0", and otherwise with as many digits as give the same number back."""
    if not isinstance(value, int | float):
        return str(value)
    return str(int(value)) if value == int(value) and abs(value) < 2**63 else repr(value)
