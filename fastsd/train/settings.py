"""The settings of a training run. Each stage has a table of its own, whose dataclass stands beside the stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastsd.errors import FastsdError, about
from fastsd.train import tables
from fastsd.train.limits import check_run, check_stage

OPTIMISERS = ("adamw", "adamw8bit")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("auto", "bf16", "fp32")
DATA_KINDS = ("folder", "idx", "webdataset", "datasets", "digits")


@dataclass(frozen=True)
class DigitsData:
    """How MNIST becomes training images. `scales`, `shear`: see `digits.augment`. `style_share`: `strokes.extremes`."""

    scales: tuple[float, float] = (0.7, 1.15)
    shear: float = 0.2
    style: str = ""  # a key of `digits.STYLES`
    style_share: float = 0.27
    style_word_share: float = 0.5  # see `captions.caption`
    unknown: float = 0.06  # see `captions.caption`


@dataclass(frozen=True)
class Augment:
    """Random changes of every image, all off by default; the run's record lists them."""

    crop: bool = False  # a random part of the image, enlarged by a quarter, instead of the middle of it
    flip: bool = False  # left and right, half of the time
    rotation: float = 0.0  # degrees, at most, to both sides
    colour: float = 0.0  # brightness, contrast and saturation by a factor of 1 - colour to 1 + colour


@dataclass(frozen=True)
class Data:
    """The training images and their captions."""

    path: str
    kind: str = "folder"  # one of `DATA_KINDS`
    caption: str = ""  # of images that have none; empty: they are trained without one
    masks: str = ""  # a folder with a PNG for each image, white where the image counts (`loss.masked`)
    limit: int = 0  # use only the first images of the set; 0: all
    passes: int = 1  # augmented versions of every image in the cache of latents
    replacement: bool = False  # every sample is drawn from all images; else every image comes once in an epoch
    resolution: int = 64  # pixels along the side of the images, or of the square one of the buckets
    buckets: bool = False  # images keep their aspect ratio, as nearly as a bucket of as many pixels allows
    bucket_step: int = 0  # sides of buckets are multiples of it; 0: of what the autoencoder needs
    max_bad: float = 0.01  # images that cannot be read, at most: a share below 1, a number from 1 on
    memory_gb: float = 2.0  # decoded images that are kept in memory
    vocabulary: int = 2048  # tokens of a vocabulary that is learnt from the captions
    augment: Augment = Augment()
    digits: DigitsData = DigitsData()


@dataclass(frozen=True)
class Fit:
    """The optimisation of a stage. A stage ends after `steps` or `max_minutes`, whichever comes first (0: no limit)."""

    steps: int
    max_minutes: float = 0.0
    batch_size: int = 128  # of one step, over all parts, workers and processes
    accumulate: int = 1  # parts of the batch, computed one after another to save memory
    rate: float = 1e-3
    schedule: str = "cosine"  # after the warm-up: to `final_rate` * `rate` at the last step, or "constant"
    final_rate: float = 0.02
    warmup: int = 200  # steps
    optimiser: str = "adamw"  # or "adamw8bit", of the package bitsandbytes, on a GPU
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    clip: float = 1.0  # largest gradient norm; 0: no limit
    average: float = 0.999  # decay of the exponential moving average of the weights; 0: none is kept
    max_nonfinite: int = 10  # steps in a row whose loss or gradient is not finite, at which the run stops
    validate_every: int = 0  # steps between two validations; 0: none
    validate_share: float = 0.0  # of the images, which are not trained on
    sample_every: int = 0  # steps between two sample grids; 0: none


@dataclass(frozen=True)
class PipelineDefaults:
    """The default settings of the exported model."""

    num_inference_steps: int = 25
    guidance_scale: float = 2.0
    sampler: str = "ddim"
    schedule: str = "default"


@dataclass(frozen=True)
class TrainingSettings:
    """A complete run.

    Attributes:
        out: folder of the run. export: folder of the finished model; empty: `model` in `out`.
        stages: the table of each stage, in the order in which they run: that of the file.
    """

    out: str
    data: Data
    export: str = ""
    model: str = ""  # the checkpoint that a stage starts from: a file, a folder, a hub id, or digits
    seed: int = 0
    device: str = "auto"  # auto (a GPU where there is one), cpu, cuda
    threads: int = 0  # on the CPU, workers that split each batch; the count affects the result. 0: one per core
    shard: bool = False  # processes divide weights and optimiser state, for a model that does not fit into one (FSDP2)
    precision: str = "auto"  # of matrix products: auto (bf16 where the processor supports it), bf16 or fp32
    checkpoint_minutes: float = 3.0
    stall_minutes: float = 10.0  # without a finished step, before the log says where the run stands; 0: never
    defaults: PipelineDefaults = PipelineDefaults()
    stages: dict[str, Any] = field(default_factory=dict)


def read_settings(path: str | Path, kinds: Mapping[str, type], changes: Sequence[str] = ()) -> TrainingSettings:
    """Read a TOML file.

    Args:
        kinds: the dataclass of every stage's table, by the stage's name. It has a field `fit`, and may have a method
            `check`, which raises FastsdError where values do not go together.
        changes: texts "key=value", which replace values of the file.

    Raises:
        FastsdError: no such file, not TOML, an unknown or missing key, a value of the wrong type. Names the key.
    """
    file = str(path)
    table = tables.read_toml(Path(path))
    tables.override(table, changes)
    general = {f.name for f in fields(TrainingSettings)} - {"stages"}
    for name in table:
        if name not in kinds and name not in general:
            raise tables.unknown(name, [*general, *kinds], file)
    stages: dict[str, Any] = {}
    for name in [name for name in table if name in kinds]:
        inner = table.pop(name)
        if not isinstance(inner, dict):
            raise FastsdError(f"{name} should be a table, [{name}]", path=file)
        stages[name] = tables.build(kinds[name], inner, file, name + ".")
        _check_fit(stages[name].fit, f"{name}.fit", file)
        check_stage(name, stages[name], file)
        if hasattr(stages[name], "check"):
            with about(path=file):
                stages[name].check()
    if not stages:
        raise FastsdError(f"no stage; the config needs at least one of the tables {', '.join(kinds)}", path=file)
    settings = replace(tables.build(TrainingSettings, table, file), stages=stages)
    _check(settings, file)
    check_run(settings, file)
    return settings


def _check(settings: TrainingSettings, file: str) -> None:
    tables.check_choice("precision", settings.precision, PRECISIONS, file)
    tables.check_choice("data.kind", settings.data.kind, DATA_KINDS, file)
    data = settings.data
    for key, value in (("passes", data.passes), ("resolution", data.resolution)):
        if value < 1:
            raise FastsdError(f"data.{key} is {value}; it should be at least 1", path=file)


def _check_fit(fit: Fit, prefix: str, file: str) -> None:
    tables.check_choice(f"{prefix}.optimiser", fit.optimiser, OPTIMISERS, file)
    tables.check_choice(f"{prefix}.schedule", fit.schedule, SCHEDULES, file)
    for name in ("steps", "batch_size", "accumulate", "max_nonfinite"):
        if getattr(fit, name) < 1:
            raise FastsdError(f"{prefix}.{name} is {getattr(fit, name)}; it should be at least 1", path=file)
    for name in ("average", "validate_share"):
        if not 0 <= getattr(fit, name) < 1:
            raise FastsdError(f"{prefix}.{name} is {getattr(fit, name)}; it should be from 0 to below 1", path=file)
    if fit.validate_every and not fit.validate_share:
        raise FastsdError(f"{prefix}.validate_every needs {prefix}.validate_share, such as 0.05", path=file)
