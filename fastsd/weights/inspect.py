"""A description of a model, line by line: family, precision, prediction, keys, metadata, hashes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastsd.components import Components
from fastsd.config import UNetConfig
from fastsd.errors import FastsdError
from fastsd.few_step import Detection
from fastsd.files.hashes import legacy_hash, remember_sha256
from fastsd.weights.adapters.embeddings import vectors_of
from fastsd.weights.few_step import detect_in_metadata
from fastsd.weights.formats.pickle_file import is_pickle, open_pickle, tensors_in
from fastsd.weights.formats.safetensors_file import DTYPES, TensorEntry
from fastsd.weights.layouts.edm_markers import MARKERS, with_markers
from fastsd.weights.layouts.family import CheckpointFamily, find_family
from fastsd.weights.layouts.folder import outline_folder
from fastsd.weights.layouts.names import same_matrix, sources
from fastsd.weights.layouts.single_file import EMA_PREFIX, file_networks, read_file
from fastsd.weights.load import read_headers
from fastsd.weights.recognise import embedding_kind, recognise

MAX_KEYS, MAX_TEXT = 10, 200  # keys shown of a list, characters shown of a value
# Keys that training leaves in a file, which belong to no network.
_TRAINING_PREFIXES = (
    *(EMA_PREFIX, "first_stage_model.loss.", "first_stage_model.model_ema.", "embedding_manager.", "denoiser."),
    *("betas", "alphas_", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights", "scale_factor"),
    *("v_pred", "ztsnr", "global_step"),
    "depth_model.",  # MiDaS, which measures depth, beside SD 2's depth model; fastsd takes the depth map as an image
)
# Keys of text encoders that no model uses.
_UNUSED_SUFFIXES = ("position_ids", "logit_scale", "attn_mask", "text_projection", "text_projection.weight")

Facts = list[tuple[str, str]]
ComparedKeys = tuple[list[str], list[str], list[str]]  # missing, extra, of a wrong shape


def inspect(path: Path, allow_pickle: bool = False) -> Facts:
    """The facts about a file or a folder in the diffusers layout as (name, value); an empty name continues the fact
    before.

    Reads a file whole, once, for its hash, which is stored for later (`fastsd.files.hashes`).

    Raises:
        FastsdError: no file, malformed, or a pickle that is not allowed.
    """
    if path.is_dir():
        return _inspect_folder(path)
    other = _other_pickle(path, allow_pickle)
    entries, metadata = ({}, {}) if other else read_file(path, allow_pickle)
    facts = [("file", str(path)), *_sizes([path], list(entries.values()))]
    if other:
        return facts + [("kind", other), *_hashes(path)]
    try:
        family = find_family(path, {key: entry.shape for key, entry in entries.items()}, metadata)
        family = with_markers(path, family, entries)
        facts += _family_facts(family, entries)
    except FastsdError as error:
        reason = str(error).removeprefix(f"{path}: ")
        known = reason.startswith(("it is ", "its "))  # a checkpoint, of another kind or with parts that do not fit
        kinds = [] if known else recognise(path, entries, allow_pickle)
        facts += kinds or [("family", reason if known else f"unknown: {reason}")]
        if (detection := detect_in_metadata(metadata)) is not None:
            facts += [("few steps", _few_step(detection))]
    facts += _named("metadata", _metadata(metadata))
    return facts + _hashes(path)


def _inspect_folder(path: Path) -> Facts:
    """What `load_folder` would load; where a network has files of two precisions, those of half precision."""
    model, files = outline_folder(path, half=True)
    headers = {name: read_headers(own) for name, own in files.items()}
    entries = [entry for own in headers.values() for entry in own.values()]
    facts = [("folder", str(path)), *_sizes([file for own in files.values() for file in own], entries)]
    for name, network in model.networks():
        count = sum(parameter.numel() for parameter in network.parameters())
        facts += [(name, f"{count:,} parameters in {', '.join(file.name for file in files[name])}")]
    scheduler, side = model.scheduler, model.sample_size * model.vae.config.downscale
    facts += [
        ("family", f"text of {model.unet.config.cross_attention_dim} features{', as SDXL' if model.xl else ''}"),
        ("prediction", f"{scheduler.prediction_type} (scheduler/scheduler_config.json)"),
        ("zero SNR", "yes" if scheduler.rescale_betas_zero_snr else "no"),
        ("sampler", f"{scheduler.sampler}, schedule {scheduler.schedule}"),
        ("few steps", _few_step(model.few_step)),
        ("UNet", _unet(model.unet.config)),
        ("size of images", f"{side} x {side} in training"),
    ]
    facts += _named("defaults", (f"{name} = {value}" for name, value in model.defaults.items()))
    return facts + _key_facts(*_compare_folder(model, headers))


def _compare_folder(model: Components, headers: dict[str, dict[str, TensorEntry]]) -> ComparedKeys:
    """As `compare_keys`, with the network's folder before each key."""
    missing, extra, wrong = [], [], []
    for folder, network in model.networks():
        entries = headers[folder]
        shapes = {part.key: part.shape for _, _, parts in sources(network) for part in parts}
        missing += [f"{folder}/{key}" for key in shapes if key not in entries]
        extra += [f"{folder}/{entry.key}" for key, entry in entries.items() if key not in shapes]
        for key in shapes.keys() & entries.keys():
            if not same_matrix(entries[key].shape, shapes[key]):
                wrong.append(f"{folder}/{entries[key].key} {list(entries[key].shape)}")
    return sorted(missing), sorted(extra), sorted(wrong)


def _sizes(files: list[Path], entries: list[TensorEntry]) -> Facts:
    total = sum(file.stat().st_size for file in files)
    names = {dtype: name for name, dtype in DTYPES.items()}
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[names.get(entry.dtype, str(entry.dtype))] += entry.nbytes
    shares = (f"{name} {size / max(1, sum(sizes.values())):.0%}" for name, size in sizes.most_common())
    return [
        ("size", f"{total} bytes ({total / 2**30:.2f} GiB), {len(entries)} tensors"),
        ("dtype", ", ".join(shares) or "none"),
    ]


def _other_pickle(path: Path, allow_pickle: bool) -> str | None:
    """What a pickle is that holds no table of tensors by name; None for any other file."""
    if not path.is_file() or not is_pickle(path):
        return None
    content, sizes = open_pickle(path, allow_pickle)
    if not isinstance(content, dict):
        return None
    if "string_to_param" in content:
        table = vectors_of(content)
        found = tensors_in(path, table, sizes) if isinstance(table, dict) else {}
        shapes = {key: entry.shape for key, entry in found.items()}
        fits = len(shapes) == 1 and all(len(shape) in (1, 2) for shape in shapes.values())
        return embedding_kind(shapes) if fits else "a textual inversion without vectors"
    if any(type(key) is int for key in content):
        return "a hypernetwork, which fastsd does not read"
    return None


def _family_facts(family: CheckpointFamily, entries: dict[str, TensorEntry]) -> Facts:
    unet = family.unet
    has_ema = any(key.startswith(EMA_PREFIX) for key in entries)
    facts = [
        ("family", f"{family.name} ({_reason(family)})"),
        ("prediction", f"{family.prediction or 'unknown, set it with --prediction'} ({family.prediction_reason})"),
        ("zero SNR", "yes (marker key ztsnr)" if family.zero_snr else "no (no marker key ztsnr)"),
        ("few steps", _few_step(family.few_step)),
        ("UNet", _unet(unet)),
        ("autoencoder", "in the file" if family.vae else "not in the file; add one with --vae"),
        ("EMA", "in the file; --ema uses it" if has_ema else "no"),
    ]
    return facts + _key_facts(*compare_keys(family, entries))


def _unet(config: UNetConfig) -> str:
    return f"{config.in_channels} input channels, level widths {', '.join(map(str, config.block_out_channels))}"


def _key_facts(missing: list[str], extra: list[str], wrong: list[str]) -> Facts:
    named = {"missing keys": missing, "extra keys": extra, "wrong shapes": wrong}
    return [fact for name, keys in named.items() for fact in _named(name, _shortened(keys))]


def compare_keys(family: CheckpointFamily, entries: dict[str, TensorEntry]) -> ComparedKeys:
    """The keys that the file lacks, those that no network has, and those with wrong shapes."""
    missing, wrong, known = [], [], set()
    for network in file_networks(family, entries):
        shapes = {source.key: source.shape for _, _, parts in sources(network.module) for source in parts}
        for key, original in network.keys.items():
            known.add(original.key)
            if key not in network.entries:
                missing.append(original.key)
            elif not same_matrix(network.entries[key].shape, shapes[key]):
                wrong.append(f"{original.key} {list(entries[original.key].shape)}")
    unloaded = tuple(
        f"{text.layout.prefix}transformer.resblocks.{text.config.num_hidden_layers}."
        for text in family.texts
        if text.layout.openclip
    )
    extra = [
        key
        for key in entries
        if key not in known
        and key not in MARKERS
        and not key.startswith((*_TRAINING_PREFIXES, *unloaded))
        and not key.endswith(_UNUSED_SUFFIXES)
    ]
    return sorted(set(missing)), sorted(extra), sorted(set(wrong))


def _few_step(detection: Detection | None) -> str:
    if detection is None:
        return "no (the file does not say so); set it with --few-step"
    kind = detection.kind
    return f"{kind.name}: {kind.samplers[0]}, {kind.steps} step{'s' * (kind.steps > 1)} ({detection.reason})"


def _reason(family: CheckpointFamily) -> str:
    encoders = " and ".join("OpenCLIP" if text.layout.openclip else "CLIP" for text in family.texts)
    width = family.unet.cross_attention_dim
    return f"text from {encoders}, {width} features in {family.layout.unet_prefix}*.attn2.to_k"


def _named(name: str, lines: Iterable[str]) -> Facts:
    """One fact of several lines."""
    return [(name if i == 0 else "", line) for i, line in enumerate(lines)]


def _shortened(keys: list[str]) -> Iterator[str]:
    if not keys:
        yield "none"
    for key in keys[:MAX_KEYS]:
        yield _cut(key)
    if len(keys) > MAX_KEYS:
        yield f"and {len(keys) - MAX_KEYS} more"


def _metadata(metadata: dict[str, str]) -> Iterator[str]:
    if not metadata:
        yield "none"
    for key, value in metadata.items():
        yield f"{_cut(key)} = {_cut(value)}"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters)"


def _hashes(path: Path) -> Facts:
    """The SHA-256, A1111's short hash (its first ten digits), and its older one."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        legacy = legacy_hash(path)
    except OSError as error:
        raise FastsdError(f"cannot be read ({error.strerror})", path=path) from error
    digits = digest.hexdigest()
    remember_sha256(path, digits)
    return [("sha256", digits), ("short hash", digits[:10]), ("legacy hash", legacy)]
