"""Converting checkpoints between a diffusers folder and a single file, tensor by tensor, without loading a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastsd.components import Components
from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.files import check_path, replace_whole
from fastsd.model.vae import AutoencoderKL
from fastsd.weights.formats.safetensors_file import DTYPES, TensorEntry
from fastsd.weights.layouts.family import CheckpointFamily, find_family
from fastsd.weights.layouts.file_layouts import FileLayout, layout_for
from fastsd.weights.layouts.folder import outline_folder
from fastsd.weights.layouts.ldm_names import OriginalKey, openclip_key, unet_key, unet_table, vae_key
from fastsd.weights.layouts.names import sources, stored_form
from fastsd.weights.layouts.save import weights_file, write_configs
from fastsd.weights.layouts.single_file import outline_file, tokenizer_for
from fastsd.weights.layouts.upscaler_file import upscaler_entries
from fastsd.weights.load import error_path, pop_entry, read_finite, read_headers, refuse_unused

# Settings that a single file does not store, because they are the same in every family.
_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "edm")


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write. `pieces` return its row ranges from top to bottom; each is read only when it is written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Callable[[], torch.Tensor], ...] = ()

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class SourceCheckpoint:
    """The checkpoint to convert: components on the meta device, and the tensors of each network by a folder's keys."""

    path: Path
    components: Components
    entries: dict[str, dict[str, TensorEntry]]


def convert(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | None = None,
    prediction: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    ema: bool = False,
) -> list[str]:
    """Write a checkpoint in the other layout, or in another precision; or an upscaler as a `.safetensors` file.

    Memory holds one tensor at a time. The target appears only when it is complete. Converting a checkpoint and
    converting it back preserves every bit; what the target's layout cannot express is refused.

    Args:
        source: a folder or a single file.
        target: a file that ends in `.safetensors`, or a folder.
        dtype: of the weights; None: each tensor keeps its own.
        prediction: what a single file's network predicts, if the file does not say.
        allow_pickle: read a `.ckpt`.
        overwrite: replace what is at `target`.
        ema: use the moving average of a single file's UNet weights.

    Returns:
        Notes, a line each: the settings that the target does not store.

    Raises:
        FastsdError: the source cannot be read, the target cannot express its model, or the target exists.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target, overwrite)
    network = upscaler_entries(source, allow_pickle) if source.is_file() else None
    if network is not None:
        for name, given in (("prediction", prediction), ("ema", ema)):
            if given:
                raise FastsdError("an upscaler has none; leave it out", argument=name)
        return _convert_upscaler(network, target, dtype)
    checkpoint = _open(source, dtype, prediction, allow_pickle, ema)
    if target.suffix.lower() == ".safetensors":
        tensors, metadata, notes = _as_file(checkpoint, dtype)
        if target.is_dir():
            raise FastsdError("it is a folder; give another name", path=target)
        with _replacing(target, folder=False) as temporary:
            write_safetensors(temporary, tensors, metadata)
        return notes
    if target.exists() and not (target / "model_index.json").is_file():
        raise FastsdError("not a model folder, so it is not replaced; give another target", path=target)
    with _replacing(target, folder=True) as temporary:
        write_configs(checkpoint.components, temporary)
        for name, _ in checkpoint.components.networks():
            tensors = list(_as_folder(checkpoint, name, dtype))
            write_safetensors(temporary / weights_file(name), tensors, {"format": "pt"})
    return []


def _convert_upscaler(network: dict[str, TensorEntry], target: Path, dtype: torch.dtype | None) -> list[str]:
    """Write an upscaler as one file, by the names of Real-ESRGAN's."""
    if target.suffix.lower() != ".safetensors" or target.is_dir():
        raise FastsdError("an upscaler is one file; give a name that ends in .safetensors", path=target)
    tensors = [
        OutputTensor(key, dtype or entry.dtype, entry.shape, (partial(_read, entry, dtype or entry.dtype),))
        for key, entry in network.items()
    ]
    with _replacing(target, folder=False) as temporary:
        write_safetensors(temporary, tensors, {"format": "pt"})
    return []


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    check_path(source)
    check_path(target)
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise FastsdError("already exists; {overwrite} replaces it", path=target)
    if target.suffix.lower() in (".ckpt", ".pt", ".bin"):
        raise FastsdError("fastsd writes no pickles; give a file that ends in .safetensors, or a folder", path=target)
    if source.exists() and target.exists() and source.samefile(target):
        raise FastsdError("source and target are the same; give another target", path=target)


def _open(
    path: Path, dtype: torch.dtype | None, prediction: str | None, allow_pickle: bool, ema: bool
) -> SourceCheckpoint:
    entries: dict[str, dict[str, TensorEntry]] = {}
    if path.is_dir():
        if ema:
            raise FastsdError("a folder holds only one set of UNet weights; leave out {ema}", path=path)
        components, files = outline_folder(path, half=dtype not in (None, torch.float32))
        error_paths = {name: error_path(weights) for name, weights in files.items()}
        entries = {name: read_headers(weights) for name, weights in files.items()}
    else:
        components, networks, family = outline_file(path, prediction, allow_pickle, ema)
        if family.vae is None:
            raise FastsdError(
                f"no autoencoder in this file ({family.layout.vae_prefix}*), so it cannot be converted", path=path
            )
        for network in networks.values():
            network.check_complete(path)
            entries[network.name] = dict(network.entries)
        error_paths = dict.fromkeys(entries, path)
    for name, module in components.networks():
        rest = dict(entries[name])
        entries[name] = {
            part.key: pop_entry(rest, part, error_paths[name]) for _, _, parts in sources(module) for part in parts
        }
        refuse_unused(rest)
    return SourceCheckpoint(path, components, entries)


def _as_folder(checkpoint: SourceCheckpoint, name: str, dtype: torch.dtype | None) -> Iterator[OutputTensor]:
    """The tensors of one network in a folder's form."""
    linear = checkpoint.components.unet.config.use_linear_projection
    for key, entry in checkpoint.entries[name].items():
        yield _tensor(key, (entry,), linear, dtype)


def _as_file(
    checkpoint: SourceCheckpoint, dtype: torch.dtype | None
) -> tuple[list[OutputTensor], dict[str, str], list[str]]:
    """The tensors and metadata of a single file, and notes on the settings it does not store."""
    components, path = checkpoint.components, checkpoint.path
    if not isinstance(components.vae, AutoencoderKL):
        raise _only_a_folder(path, "its autoencoder is TAESD, which single files cannot hold")
    layout = _layout(path, components)
    linear = components.unet.config.use_linear_projection
    tensors = []
    for name, _ in components.networks():
        prefix, original_key = _naming(components, layout, name)
        grouped: dict[str, list[tuple[OriginalKey, TensorEntry]]] = {}
        for key, entry in checkpoint.entries[name].items():
            original = original_key(key)
            grouped.setdefault(prefix + original.key, []).append((original, entry))
        for key, parts in grouped.items():
            parts.sort(key=lambda item: item[0].third or 0)
            pieces = tuple(entry.transposed() if original.transposed else entry for original, entry in parts)
            tensors.append(_tensor(key, pieces, linear, dtype, vae_attention=".attn_1." in key and name == "vae"))
    prediction, zero_snr = components.scheduler.prediction_type, components.scheduler.rescale_betas_zero_snr
    metadata = {"format": "pt", "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction}
    if components.few_step is not None:
        metadata["fastsd.few_step"] = components.few_step.kind.name
    if prediction == "v_prediction":
        tensors.append(OutputTensor("v_pred", torch.float32, (0,)))
    if zero_snr:
        tensors.append(OutputTensor("ztsnr", torch.float32, (0,)))
    return tensors, metadata, _compare(path, components, {tensor.key: tensor.shape for tensor in tensors}, metadata)


def _layout(path: Path, components: Components) -> FileLayout:
    folders = [name for name, _ in components.networks() if name.startswith("text_encoder")]
    openclip = components.text_encoders[-1].config.hidden_act == "gelu"
    few_step = components.few_step.kind.name if components.few_step is not None else None
    layout = layout_for(folders, components.xl, openclip, components.vae.config.scaling_factor, few_step)
    if layout is None:
        raise _only_a_folder(path, f"no single-file layout has the text encoders {', '.join(folders)} with this UNet")
    return layout


def _only_a_folder(path: Path, why: str) -> FastsdError:
    """The refusal of a model that a single file cannot hold."""
    return FastsdError(f"{why}; convert to a folder, whose configs say it", path=path)


def _naming(components: Components, layout: FileLayout, name: str) -> tuple[str, Callable[[str], OriginalKey]]:
    """The prefix of a network's keys in a single file, and what maps its keys in a folder to those after the prefix."""
    if name == "unet":
        return layout.unet_prefix, partial(unet_key, unet_table(components.unet.config))
    if name == "vae":
        assert isinstance(components.vae, AutoencoderKL)
        return layout.vae_prefix, partial(vae_key, components.vae.config)
    text = next(text for text in layout.texts if text.folder == name)
    return text.prefix, openclip_key if text.openclip else OriginalKey


def _tensor(
    key: str, entries: tuple[TensorEntry, ...], linear: bool, dtype: torch.dtype | None, vae_attention: bool = False
) -> OutputTensor:
    """The tensor to write under `key`. A matrix that the layout stores as a 1 x 1 convolution gets four dimensions."""
    # A scaled weight of 8 bits fits no 8 bits without its scale, which other layouts lack.
    own = [entry.dtype if entry.scale is None else torch.float16 for entry in entries]
    target_dtype = dtype or own[0]
    if dtype is None and any(other != target_dtype for other in own):
        raise FastsdError(
            f"{key} is assembled from tensors of several dtypes; choose one with {{dtype}}", path=entries[0].path
        )
    shape = entries[0].shape
    if len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]
    if len(shape) == 2:
        empty = torch.empty(shape, dtype=target_dtype, device="meta")
        convolution = vae_attention or len(stored_form(_layer_name(key), empty, linear).shape) == 4
        shape = (*shape, 1, 1) if convolution else shape
    rows = shape[0] * len(entries) if shape else 0
    full = (rows, *shape[1:]) if shape else shape
    return OutputTensor(key, target_dtype, full, tuple(partial(_read, entry, target_dtype) for entry in entries))


def _read(entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
    return read_finite(entry, dtype).to(dtype)


def _layer_name(key: str) -> str:
    """A key with diffusers' names for the original layout's 1 x 1 convolutions."""
    return key.replace(".skip_connection.", ".conv_shortcut.").replace(".nin_shortcut.", ".conv_shortcut.")


def _compare(
    path: Path, components: Components, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]
) -> list[str]:
    """Refuse a model that would be read back as another one; return notes on the settings that the file omits.

    A single file holds no configs, so this derives them from the tensors that would be written, and compares.
    """
    try:
        family = find_family(path, shapes, metadata)
    except FastsdError as error:
        why = f"a single file says by its tensors' shapes what it is, and {error.message}"
        raise _only_a_folder(path, why) from error
    assert family.vae is not None
    pairs: list[tuple[str, object, object]] = [
        ("UNet", components.unet.config, family.unet),
        ("autoencoder", components.vae.config, family.vae),
    ]
    pairs += [
        ("text encoder", encoder.config, text.config)
        for encoder, text in zip(components.text_encoders, family.texts, strict=True)
    ]
    # Not compared: force_upcast gets a note; the end token is always the largest id of CLIP's vocabulary.
    skipped = ("force_upcast", "eos_is_largest_id", "eos_token_id")
    for network, config, read_back in pairs:
        for field, value in vars(config).items():
            if field not in skipped and value != getattr(read_back, field):
                raise _only_a_folder(
                    path,
                    f"a single file cannot store that its {network} has {field} {value!r} (it would be read as "
                    f"{getattr(read_back, field)!r})",
                )
    if components.scaled_image != family.scaled_image:
        raise _only_a_folder(path, "a single file cannot store that its UNet reads the image to edit scaled")
    prediction = components.scheduler.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise _only_a_folder(path, f"a single file cannot store that its network predicts {prediction!r}")
    standard = SchedulerConfig()
    for field in _SCHEDULE:
        if getattr(components.scheduler, field) != getattr(standard, field):
            raise _only_a_folder(
                path,
                f"a single file cannot store that {field} is {getattr(components.scheduler, field)!r} (every "
                f"family has {getattr(standard, field)!r})",
            )
    return list(_notes(components, family))


def _notes(components: Components, family: CheckpointFamily) -> Iterator[str]:
    """The settings that a single file does not store and that differ from what its readers will assume."""
    assert family.vae is not None
    for i, (tokenizer, text) in enumerate(zip(components.tokenizers, family.layout.texts, strict=True)):
        assumed = tokenizer_for(text)
        if len(tokenizer) != len(assumed) or tokenizer.pad_id != assumed.pad_id:
            yield f"tokenizer {i + 1} is not its family's; a single file stores none, so readers use the family's"
    if components.vae.config.force_upcast != family.vae.force_upcast:
        yield "a single file does not store whether its autoencoder needs fp32; readers assume so for SDXL only"
    scheduler = family.scheduler(components.scheduler.prediction_type)
    stated, assumed_too = ({**vars(one), **vars(one.solver)} for one in (components.scheduler, scheduler))
    differing = [name for name, value in stated.items() if name != "solver" and value != assumed_too[name]]
    if components.sample_size != family.sample_size(components.scheduler.prediction_type):
        differing.append("sample_size")
    if differing:
        yield f"a single file does not store {', '.join(differing)}; readers use the values of {family.name}"
    if components.defaults or components.known_words:
        yield "a single file stores no default settings and no list of known words; they are left out"


def write_safetensors(path: Path, tensors: list[OutputTensor], metadata: dict[str, str]) -> None:
    """Write a file tensor by tensor, with one tensor in memory at a time."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.key))  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for tensor in ordered:
        offsets = [end, end + tensor.nbytes]
        header[tensor.key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for piece in tensor.pieces:
                file.write(piece().contiguous().view(-1).view(torch.uint8).numpy().data)
        if file.tell() != 8 + len(text) + end:
            raise RuntimeError(f"{path}: wrote {file.tell()} bytes, the header says {8 + len(text) + end}")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _replacing(target: Path, folder: bool) -> Iterator[Path]:
    """`replace_whole`, with errors that name the target."""
    try:
        with replace_whole(target, folder) as temporary:
            yield temporary
    except OSError as error:
        raise FastsdError(f"cannot be written ({error.strerror})", path=target) from error
