"""What a single file is, said as lines: family, precision, prediction, keys, metadata, hashes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastsd.errors import FastsdError
from fastsd.few_step import Detection
from fastsd.weights.few_step import detect_in_metadata
from fastsd.weights.formats.safetensors_file import DTYPES, Entry
from fastsd.weights.hashes import remember_sha256
from fastsd.weights.layouts.family import Family, find_family
from fastsd.weights.layouts.ldm_names import UNET_PREFIX
from fastsd.weights.layouts.names import same_matrix, sources
from fastsd.weights.layouts.single_file import parts, read_file

SHOWN, LONGEST = 10, 200  # keys of a list, characters of a value
# What training leaves in a file, which is no part of the networks.
_OF_TRAINING = (
    ("model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.", "embedding_manager.", "denoiser."),
    ("betas", "alphas_", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights", "scale_factor"),
    ("v_pred", "ztsnr", "global_step"),
)
_SILENT = ("position_ids", "logit_scale", "attn_mask", "text_projection", "text_projection.weight")

Facts = list[tuple[str, str]]


def inspect(path: Path, allow_pickle: bool = False) -> Facts:
    """Names and values, in the order of reading. The whole file is read once, for its hash, which is remembered.

    Raises:
        FastsdError: no file, malformed, or a pickle that is not allowed.
    """
    entries, metadata = read_file(path, allow_pickle)
    names = {dtype: name for name, dtype in DTYPES.items()}
    sizes: Counter[str] = Counter()
    for entry in entries.values():
        sizes[names.get(entry.dtype, str(entry.dtype))] += entry.nbytes
    total = path.stat().st_size
    facts = [("file", str(path)), ("size", f"{total} bytes ({total / 2**30:.2f} GiB), {len(entries)} tensors")]
    facts += [("dtype", ", ".join(f"{name} {share / max(1, sum(sizes.values())):.0%}" for name, share in _most(sizes)))]
    try:
        family = find_family(path, {key: entry.shape for key, entry in entries.items()}, metadata)
        facts += _of_family(family, entries)
    except FastsdError as error:
        facts += [("family", "unknown: " + str(error).removeprefix(f"{path}: "))]
        facts += [("few steps", _few_step(said)) for said in [detect_in_metadata(metadata)] if said is not None]
    facts += [("metadata" if i == 0 else "", text) for i, text in enumerate(_metadata(metadata))]
    return facts + _hashes(path)


def _of_family(family: Family, entries: dict[str, Entry]) -> Facts:
    unet = family.unet
    facts = [
        ("family", f"{family.name} ({_why(family)})"),
        ("prediction", f"{family.prediction or 'unknown, --prediction says it'} ({family.why})"),
        ("zero SNR", "yes (marker key ztsnr)" if family.zero_snr else "no (no marker key ztsnr)"),
        ("few steps", _few_step(family.few_step)),
        ("UNet", f"{unet.in_channels} channels in, {'x'.join(map(str, unet.block_out_channels))} wide"),
        ("autoencoder", "in the file" if family.vae else "not in the file; --vae gives one"),
        ("EMA", "in the file; --ema takes it" if any(key.startswith("model_ema.") for key in entries) else "no"),
    ]
    missing, extra, wrong = keys(family, entries)
    for name, found in (("missing keys", missing), ("extra keys", extra), ("wrong shapes", wrong)):
        facts += [(name if i == 0 else "", text) for i, text in enumerate(_some(found))]
    return facts


def keys(family: Family, entries: dict[str, Entry]) -> tuple[list[str], list[str], list[str]]:
    """The keys that the family has and the file has not, those that no network knows, and those of another shape."""
    missing, wrong, known = [], [], set()
    for part in parts(family, entries):
        shapes = {source.key: source.shape for _, _, found in sources(part.module) for source in found}
        for key, place in part.places.items():
            known.add(place.key)
            if key not in part.entries:
                missing.append(place.key)
            elif not same_matrix(part.entries[key].shape, shapes[key]):
                stored = entries[place.key].shape
                wrong.append(f"{place.key} {list(stored)}")
    layers = {text.prefix: text.config.num_hidden_layers for text in family.texts if text.openclip}
    dropped = tuple(f"{prefix}transformer.resblocks.{n}." for prefix, n in layers.items())
    training = sum(_OF_TRAINING, ())
    extra = [
        key
        for key in entries
        if key not in known and not key.startswith((*training, *dropped)) and not key.endswith(_SILENT)
    ]
    return sorted(set(missing)), sorted(extra), sorted(set(wrong))


def _few_step(said: Detection | None) -> str:
    if said is None:
        return "no (nothing in the file says so); --few-step says it"
    kind = said.kind
    return f"{kind.name}: {kind.samplers[0]}, {kind.steps} step{'s' * (kind.steps > 1)} ({said.why})"


def _why(family: Family) -> str:
    texts = " and ".join("OpenCLIP" if text.openclip else "CLIP" for text in family.texts)
    return f"text from {texts}, {family.unet.cross_attention_dim} features wide, at {UNET_PREFIX}*.attn2.to_k"


def _some(found: list[str]) -> Iterator[str]:
    if not found:
        yield "none"
    for key in found[:SHOWN]:
        yield _cut(key)
    if len(found) > SHOWN:
        yield f"and {len(found) - SHOWN} more"


def _metadata(metadata: dict[str, str]) -> Iterator[str]:
    if not metadata:
        yield "none"
    for key, value in metadata.items():
        yield f"{_cut(key)} = {_cut(value)}"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"


def _most(sizes: Counter[str]) -> Iterable[tuple[str, int]]:
    return sizes.most_common() or [("none", 0)]


def _hashes(path: Path) -> Facts:
    """SHA-256 of the file; its first ten digits, which A1111 shows; and the eight of A1111 before November 2022, which
    are of 64 KiB from 1 MiB on alone."""
    whole, legacy = hashlib.sha256(), hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                whole.update(block)
            file.seek(2**20)
            legacy.update(file.read(2**16))
    except OSError as error:
        raise FastsdError(f"{path}: cannot be read ({error.strerror})") from error
    digits = whole.hexdigest()
    remember_sha256(path, digits)
    return [("sha256", digits), ("short hash", digits[:10]), ("legacy hash", legacy.hexdigest()[:8])]
