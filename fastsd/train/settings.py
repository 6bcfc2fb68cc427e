"""The settings of a training run: a TOML file as frozen dataclasses, validated key by key."""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fastsd.config import CLIPConfig, SchedulerConfig, UNetConfig, VAEConfig
from fastsd.errors import FastsdError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """The training images. `scales`, `shear`: see `digits.augment`. `style_share`: see `strokes.extremes`."""

    mnist: str
    scales: tuple[float, float] = (0.7, 1.15)
    shear: float = 0.2
    style_share: float = 0.27
    passes: int = 3  # augmented versions of every image in the cache of latents
    limit: int = 0  # use only the first images of the set; 0: all


@dataclass(frozen=True)
class Fit:
    """The optimisation of a stage: AdamW, warm-up, cosine decay to `final_rate` of the rate, averaged weights.

    A stage ends after `steps` or after `max_minutes`, whichever comes first (0 minutes: no time limit).
    """

    steps: int
    max_minutes: float = 0.0
    batch_size: int = 128
    rate: float = 1e-3
    final_rate: float = 0.02
    warmup: int = 200
    weight_decay: float = 1e-4
    clip: float = 1.0  # largest gradient norm
    average: float = 0.999  # decay of the exponential moving average


@dataclass(frozen=True)
class Autoencoder:
    """Stage 1. Loss: L1 + MSE + `edge_weight` * L1 of neighbour differences + `kl_weight` * KL per pixel."""

    model: VAEConfig
    fit: Fit
    kl_weight: float = 0.03
    edge_weight: float = 1.0


@dataclass(frozen=True)
class Diffusion:
    """Stage 2: UNet and text encoder. `empty`, `unknown`, `style_word_share`: see `captions.caption`."""

    unet: UNetConfig
    text: CLIPConfig
    scheduler: SchedulerConfig
    fit: Fit
    empty: float = 0.12
    unknown: float = 0.06
    style_word_share: float = 0.5


@dataclass(frozen=True)
class PipelineDefaults:
    """The default settings of the exported model."""

    num_inference_steps: int = 25
    guidance_scale: float = 2.0
    sampler: str = "ddim"
    schedule: str = "default"


@dataclass(frozen=True)
class TrainingSettings:
    """A complete run. `out`: folder of the run. `export`: folder of the finished model."""

    out: str
    export: str
    data: Data
    autoencoder: Autoencoder
    diffusion: Diffusion
    defaults: PipelineDefaults = PipelineDefaults()
    seed: int = 0
    threads: int = 0  # workers that split each batch; the count affects the result. 0: one per core
    precision: str = "auto"  # of matrix products: auto (bf16 where the processor supports it), bf16 or fp32
    checkpoint_minutes: float = 3.0


def read_settings(path: str | Path) -> TrainingSettings:
    """Read a TOML file.

    Raises:
        FastsdError: no such file, not TOML, an unknown or missing key, a value of the wrong type. Names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise FastsdError("no such file; configs/digits.toml trains the bundled model", argument="--config", path=path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FastsdError(f"not TOML: {error}", path=path) from None
    settings = _build(TrainingSettings, table, str(path), "")
    _check(settings, path)
    return settings


def _check(settings: TrainingSettings, path: Path) -> None:
    if settings.precision not in ("auto", "bf16", "fp32"):
        raise FastsdError(f"precision is {settings.precision!r}; it should be auto, bf16 or fp32", path=path)
    for stage in ("autoencoder", "diffusion"):
        fit: Fit = getattr(settings, stage).fit
        for name in ("steps", "batch_size"):
            if getattr(fit, name) < 1:
                raise FastsdError(f"{stage}.fit.{name} is {getattr(fit, name)}; it should be at least 1", path=path)
    text, unet = settings.diffusion.text, settings.diffusion.unet
    if text.hidden_size != unet.cross_attention_dim:
        raise FastsdError(
            f"diffusion.text.hidden_size is {text.hidden_size}; it should be"
            f" diffusion.unet.cross_attention_dim, {unet.cross_attention_dim}",
            path=path,
        )
    if settings.data.passes < 1:
        raise FastsdError(f"data.passes is {settings.data.passes}; it should be at least 1", path=path)


def _build(kind: type[T], table: dict[str, Any], file: str, prefix: str) -> T:
    """Build a dataclass from `table`. Every key must be a field; a field without a default is required."""
    known: dict[str, Field[Any]] = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for key in table:
        if key not in known:
            raise FastsdError(f"unknown key {prefix}{key}; known keys: {', '.join(known)}", path=file)
    values = {}
    for name, field in known.items():
        if name in table:
            values[name] = _value(hints[name], table[name], file, prefix + name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise FastsdError(f"the key {prefix}{name} is missing", path=file)
    return kind(**values)


def _value(kind: Any, value: Any, file: str, key: str) -> Any:
    if hasattr(kind, "__dataclass_fields__"):
        if not isinstance(value, dict):
            raise FastsdError(f"{key} should be a table, [{key}]", path=file)
        return _build(kind, value, file, key + ".")
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if not isinstance(value, list) or (inner[-1] is not Ellipsis and len(value) != len(inner)):
            raise FastsdError(f"{key} is {value!r}; it should be a list of {len(inner)} values", path=file)
        return tuple(_value(inner[0], item, file, key) for item in value)
    if isinstance(kind, UnionType):  # X | None, where a file cannot say None
        kind = get_args(kind)[0]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise FastsdError(f"{key} is {value!r}; it should be {_NAMES.get(kind, kind)}", path=file)
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
