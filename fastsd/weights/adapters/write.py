"""Writing adapters: the mirror of `file.py`, with the names of `layer_names.py` and the suffixes of `roles.py`.

- kohya: one file, keys as kohya's trainer and LyCORIS write them, `alpha` beside each layer, `ss_*` and `modelspec.*`
  in its metadata. Every program reads it.
- diffusers: `pytorch_lora_weights.safetensors`, keys as diffusers saves them, with PEFT's configs in its metadata.
- peft: a folder with one adapter of PEFT for each network.

PEFT's forms state alpha / rank in a config, which some programs do not read. There the factor is multiplied into a
tensor, and the config says alpha = rank, so that every reader computes the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fastsd.components import Components
from fastsd.errors import FastsdError, nearest
from fastsd.files import reason, write_whole
from fastsd.weights.adapters.layer_names import kohya_name
from fastsd.weights.adapters.locate import CONFIG, DIFFUSERS_WEIGHTS, WEIGHTS
from fastsd.weights.adapters.peft_config import METADATA
from fastsd.weights.adapters.roles import KOHYA_SUFFIXES, PEFT_SUFFIXES
from fastsd.weights.layouts.ldm_names import unet_key, unet_table
from fastsd.weights.layouts.names import stored_form

FORMATS = ("kohya", "diffusers", "peft")
# The dtypes of a file's tensors.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# The tensor that alpha / rank is multiplied into, in PEFT's forms.
_SCALED = ("up", "kron_w1")


@dataclass(frozen=True)
class StoredLayer:
    """What a file stores of one layer.

    Attributes:
        network: "unet", "text_encoder" or "text_encoder_2".
        name: the layer's, in a diffusers folder.
        shape: of its weight here, `[out, in]` or `[out, in, k, k]`.
        tensors: by role (`fastsd.weights.adapters.roles`); matrices are `[rows, columns]`.
        rank: of the change.
        alpha: the change is multiplied by alpha / rank.
    """

    network: str
    name: str
    shape: tuple[int, ...]
    tensors: Mapping[str, torch.Tensor]
    rank: int
    alpha: float


def write_adapter(
    path: str | Path,
    form: str,
    layers: Iterable[StoredLayer],
    components: Components,
    metadata: Mapping[str, str] | None = None,
    dtype: str = "fp16",
    overwrite: bool = False,
) -> Path:
    """Write an adapter.

    Args:
        path: a `.safetensors` file for kohya; a folder for diffusers and peft.
        form: a name of `FORMATS`.
        layers: what it changes.
        components: the checkpoint that it is for, which says how its layers are stored.
        metadata: for kohya, `ss_*` and others; for the others, added to theirs.
        dtype: a name of `DTYPES`.
        overwrite: replace an existing file.

    Returns:
        The file, or for peft the folder.

    Raises:
        FastsdError: an unknown form or dtype, a kind that the form lacks, an existing file, values that are not finite.
    """
    for name, value, known in (("format", form, FORMATS), ("dtype", dtype, tuple(DTYPES))):
        if value not in known:
            raise FastsdError(f"it should be {', '.join(known)}{nearest(value, known)}", argument=name, value=value)
    path, layers = Path(path), list(layers)
    _check(layers)
    writer = _Writer(components, DTYPES[dtype])
    if form == "kohya":
        if path.suffix != ".safetensors":
            raise FastsdError("it should end in .safetensors", path=path)
        data = _with_hash(writer.kohya(layers), metadata or {})
        _write(path, data, overwrite)
        return path
    if form == "diffusers":
        if any("kron_w1" in layer.tensors for layer in layers):
            raise FastsdError(
                "diffusers opens no LoKr of Stable Diffusion in its own form; kohya and peft hold it",
                argument="format", value=form,
            )  # fmt: skip
        file = path / DIFFUSERS_WEIGHTS[0]
        tensors, configs = writer.peft(layers, prefixed=True)
        packed = {f"{network}.{key}": value for network, config in configs.items() for key, value in config.items()}
        told = {**(metadata or {}), "format": "pt", METADATA: json.dumps(packed, indent=2, sort_keys=True)}
        _write(file, save(tensors, told), overwrite)
        return file
    for network in dict.fromkeys(layer.network for layer in layers):
        own = [layer for layer in layers if layer.network == network]
        tensors, configs = writer.peft(own, prefixed=False)
        _write(path / network / WEIGHTS[0], save(tensors, {**(metadata or {}), "format": "pt"}), overwrite)
        _write(path / network / CONFIG, json.dumps(configs[network], indent=2, sort_keys=True).encode(), overwrite)
    return path


def _write(file: Path, data: bytes, overwrite: bool) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, data, overwrite)
    except FileExistsError as error:
        raise FastsdError("exists; it is not replaced", path=file) from error
    except OSError as error:
        raise FastsdError(f"cannot be written: {reason(error)}", path=file) from error


def _check(layers: Sequence[StoredLayer]) -> None:
    for layer in layers:
        for role, tensor in layer.tensors.items():
            if not bool(tensor.isfinite().all()):
                raise FastsdError(f"{layer.network}.{layer.name} holds NaN or infinite values ({role}); not written")


class _Writer:
    """The tensors of a file by key, for one checkpoint."""

    def __init__(self, components: Components, dtype: torch.dtype):
        self.config = components.unet.config
        self.xl = components.xl
        self.table = unet_table(self.config)
        self.dtype = dtype

    def kohya(self, layers: Sequence[StoredLayer]) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for layer in layers:
            original = None
            if layer.network == "unet":
                original = unet_key(self.table, f"{layer.name}.weight").key.rpartition(".")[0]
            name = kohya_name(layer.network, layer.name, original, self.xl)
            for role, tensor in layer.tensors.items():
                key = f"{name}.{KOHYA_SUFFIXES[role]}"
                tensors[key] = self._stored(layer, role, tensor)
            tensors[f"{name}.{KOHYA_SUFFIXES['alpha']}"] = torch.tensor(layer.alpha, dtype=self.dtype, device="cpu")
        return tensors

    def peft(
        self, layers: Sequence[StoredLayer], prefixed: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
        """The tensors, and PEFT's config of each network; `prefixed`: by its name, as in diffusers' files."""
        tensors: dict[str, torch.Tensor] = {}
        for layer in layers:
            name = f"{layer.network}.{layer.name}" if prefixed else f"base_model.model.{_short(layer)}"
            for role, tensor in layer.tensors.items():
                stored = tensor * (layer.alpha / layer.rank) if role in _SCALED else tensor
                suffix = PEFT_SUFFIXES[role]
                if role == "magnitude" and layer.network != "unet" and prefixed:
                    suffix += ".weight"  # without it diffusers leaves out those of text encoders (transformers 5)
                tensors[f"{name}.{suffix}"] = self._stored(layer, role, stored, peft=True)
        networks = dict.fromkeys(layer.network for layer in layers)
        return tensors, {name: _peft_config([la for la in layers if la.network == name]) for name in networks}

    def _stored(self, layer: StoredLayer, role: str, tensor: torch.Tensor, peft: bool = False) -> torch.Tensor:
        """A tensor in the shape that a file has for it: of a convolution, if the folder stores the layer as one."""
        probe = torch.empty(layer.shape, dtype=torch.float32, device="meta")
        convolution = stored_form(f"{layer.name}.weight", probe, self.config.use_linear_projection).ndim == 4
        if role == "magnitude":
            if peft:
                tensor = tensor.view(1, -1, 1, 1) if convolution else tensor
            else:
                tensor = tensor.view(-1, *(1,) * (3 if convolution else 1))
        elif convolution and tensor.ndim == 2 and role in ("down", "up", "kron_w2"):
            tensor = tensor[:, :, None, None]
        return tensor.to("cpu", self.dtype).contiguous()


def _short(layer: StoredLayer) -> str:
    """The layer's name without `text_model.`, a level of text encoders that transformers 5 has not; PEFT's patterns
    match the ends of names."""
    return layer.name.removeprefix("text_model.")


def _peft_config(layers: Sequence[StoredLayer]) -> dict[str, Any]:
    """PEFT's config of one network."""
    ranks = {_short(layer): layer.rank for layer in layers}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    lokr = any("kron_w1" in layer.tensors for layer in layers)
    config: dict[str, Any] = {
        "peft_type": "LOKR" if lokr else "LORA",
        "r": usual,
        "alpha" if lokr else "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "target_modules": sorted(ranks),
        "inference_mode": True,
    }
    if lokr:
        return config | {"module_dropout": 0.0, "rank_dropout": 0.0, "decompose_both": False, "decompose_factor": -1}
    return config | {
        "use_dora": any("magnitude" in layer.tensors for layer in layers),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "lora_bias": False,
        "bias": "none",
    }


def _with_hash(tensors: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file whose metadata holds the SHA-256 of its tensors, as kohya's and model sites' do."""
    plain = save(tensors)
    digest = hashlib.sha256(memoryview(plain)[8 + int.from_bytes(plain[:8], "little") :]).hexdigest()
    told = {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    return save(tensors, {**metadata, **told})
