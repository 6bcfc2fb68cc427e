"""A complete training run: every stage of a config, and the export."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from fastsd.errors import FastsdError
from fastsd.files import reason, remove_leftovers, replace_whole
from fastsd.runtime.devices import undisturbed
from fastsd.train import record
from fastsd.train.arrow import list_dataset
from fastsd.train.captioned import CaptionedImages
from fastsd.train.digit_images import DigitImages
from fastsd.train.figures import Figures
from fastsd.train.images import TrainingImages
from fastsd.train.loop import Trainer
from fastsd.train.packed import list_idx, list_shards
from fastsd.train.parts import Workers
from fastsd.train.processes import Processes
from fastsd.train.settings import TrainingSettings, read_settings
from fastsd.train.sources import Sample, list_folder
from fastsd.train.stage import Stage, Stopped, TrainingJob
from fastsd.train.stages.adversarial import AdversarialStage
from fastsd.train.stages.finetune import FinetuneStage
from fastsd.train.stages.lora import LoraStage
from fastsd.train.stages.textual_inversion import InversionStage
from fastsd.train.stages.unet import UNetStage
from fastsd.train.stages.vae import VaeStage
from fastsd.train.tables import check_choice

# The stages that a config can name, by the name of their table.
STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (VaeStage, UNetStage, LoraStage, FinetuneStage, InversionStage, AdversarialStage)
}

# How the samples of each kind of data are listed.
LISTS: dict[str, Callable[[Path, str], list[Sample]]] = {
    "folder": list_folder,
    "idx": list_idx,
    "webdataset": list_shards,
    "datasets": list_dataset,
}


def open_images(settings: TrainingSettings, report: Callable[[str], None]) -> TrainingImages:
    """The training data.

    Raises:
        FastsdError: they are missing or damaged.
    """
    data = settings.data
    if data.kind == "digits":
        return DigitImages(data)
    multiple = max((table.multiple for table in settings.stages.values() if hasattr(table, "multiple")), default=8)
    return CaptionedImages(LISTS[data.kind](Path(data.path), data.caption), data, multiple, report)


def read_config(path: str | Path, changes: Sequence[str] = ()) -> TrainingSettings:
    """A config, with the tables of all stages; see `settings.read_settings`."""
    return read_settings(path, {name: stage.table for name, stage in STAGES.items()}, changes)


class TrainingRun:
    """The stages of one run and the files in its folder.

    `<stage>.pt` are the checkpoints of the stages, config.toml and record.json say what made them, metrics.jsonl has
    the figures of every step, events/ the same for TensorBoard, samples/ the sample grids, log.txt the report.
    """

    def __init__(self, settings: TrainingSettings, out: Path, processes: Processes):
        self.settings, self.out, self.processes = settings, out, processes
        images = open_images(settings, self.report)
        device = torch.device("cuda", processes.local) if uses_cuda(settings) else torch.device("cpu")
        workers = Workers((settings.threads or torch.get_num_threads()) if device.type == "cpu" else 1)
        if settings.shard and processes.count > 1 and workers.count > 1:
            raise FastsdError(f"threads is {workers.count}; with shard it should be 1", argument="threads")
        self.job = TrainingJob(settings, out, images, workers, self.report, device, processes=processes)
        torch.manual_seed(settings.seed)  # the initial weights
        self.trainers: list[Trainer] = []
        for name, table in settings.stages.items():
            stage = STAGES[name](table, self.job)
            with torch.device("cpu"), processes.main_first():
                stage.build()
            self.trainers.append(Trainer(stage, out / f"{name}.pt"))
            if settings.shard and processes.count > 1 and not stage.shardable:
                self.report(
                    f"{name}: every process keeps the whole of what it trains; shard has no effect on this stage"
                )

    def report(self, line: str) -> None:
        """Print a line with the time, and append it to log.txt."""
        if not self.processes.main:
            return
        line = f"{time.strftime('%H:%M:%S')}  {line}"
        print(line, flush=True)
        with open(self.out / "log.txt", "a", encoding="utf-8") as log:
            log.write(line + "\n")

    def train(self) -> None:
        """Train every stage; a restored stage continues from its checkpoint.

        Raises:
            Stopped: the process was asked to end; the checkpoint is written.
        """
        counts = {name: sum(p.numel() for p in m.parameters()) for name, m in self.job.modules.items()}
        self.report("parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
        with self.job.workers, _until_sigterm(self.job.stop):
            for trainer in self.trainers:
                if not trainer.finished:
                    with self.processes.main_first():
                        trainer.stage.prepare()
                    figures = Figures(self.out, trainer, self.report)
                    with figures if self.processes.main else nullcontext():
                        trainer.run(figures)
                self._use_averages(trainer)
                trainer.stage.finish()

    def restore(self) -> bool:
        """Load the checkpoints; returns whether there are any."""
        restored = [trainer.restore() for trainer in self.trainers]
        return any(restored)

    def export(self, folder: Path) -> None:
        """Write the averaged weights of the last stage that has a model; an existing model in `folder` is replaced."""
        ours = any(trainer.stage.exported(folder) for trainer in self.trainers)
        if folder.exists() and any(folder.iterdir()) and not ours:
            raise FastsdError("exists and is not a model; choose another folder", argument="--export", path=folder)
        with replace_whole(folder, folder=True) as part:
            for trainer in reversed(self.trainers):
                if trainer.stage.export(part):
                    size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
                    name, step = trainer.stage.name, trainer.step
                    break
            else:
                return
        self.report(f"exported {name} at step {step} to {folder}, {size / 1e6:.2f} MB")

    def use_averages(self) -> None:
        """Give every network its averaged weights for good, as the export does."""
        for trainer in self.trainers:
            self._use_averages(trainer)

    def _use_averages(self, trainer: Trainer) -> None:
        for player in trainer.players.values():
            player.average.exchange()
            player.module.eval()


@contextmanager
def _until_sigterm(stop: threading.Event) -> Iterator[None]:
    """Within the context, SIGTERM sets `stop` instead of ending the process. Only the main thread can arrange it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@undisturbed()
@torch.enable_grad()
def train(
    config: str | Path,
    out: str | Path | None = None,
    export: str | Path | None = None,
    resume: bool = False,
    export_only: bool = False,
    changes: Sequence[str] = (),
) -> None:
    """Train a model from a config, resume a run, or only export it.

    Args:
        config: a TOML file, see `settings.TrainingSettings`. out, export: folders that override those of the config.
        resume: continue from the checkpoints in `out`; without it, an existing run there is an error.
        export_only: export the last checkpoints without training.
        changes: texts "key=value" that replace values of the config.

    Raises:
        FastsdError: invalid config, missing data, an existing run without `resume`, none with it, nothing to export.
    """
    settings = read_config(config, changes)
    folder = Path(out or settings.out)
    names = [f"{name}.pt" for name in settings.stages]
    exists = any((folder / name).is_file() for name in names)
    if exists and not (resume or export_only):
        raise FastsdError(
            f"--out {folder}: already contains a run; continue it with --resume, or choose another folder"
        )
    if resume and not exists:
        raise FastsdError(f"--out {folder}: no run there to resume; without --resume one begins")
    if export_only and not exists:
        raise FastsdError("nothing to export yet; nothing is trained", path=folder)
    if exists and (before := folder / record.CONFIG).is_file():
        # Read as of today: a key that the run's version did not know has its default.
        record.check_same(folder, read_config(before), settings)
    try:
        with Processes.joined(uses_cuda(settings)) as processes:
            _run(settings, folder, Path(export or settings.export or folder / "model"), resume, export_only, processes)
    except OSError as error:
        raise FastsdError(reason(error), path=error.filename or folder) from error
    except RuntimeError as error:  # PyTorch's error for a GPU is a subclass, its error for the CPU is not
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise FastsdError(
            "not enough memory; what helps: a smaller fit.batch_size or a larger fit.accumulate (parts one after"
            " another), recompute in a table of the UNet's, a smaller data.resolution, a smaller model"
        ) from error


def uses_cuda(settings: TrainingSettings) -> bool:
    """Whether the run is on a GPU.

    Raises:
        FastsdError: another device than auto, cpu or cuda, or no GPU.
    """
    check_choice("device", settings.device, ("auto", "cpu", "cuda"), None)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise FastsdError('device is "cuda", and PyTorch finds no GPU; use "auto" or "cpu"')
    return settings.device != "cpu" and torch.cuda.is_available()


def _run(
    settings: TrainingSettings, out: Path, export: Path, resume: bool, export_only: bool, processes: Processes
) -> None:
    """One process's share of a run."""
    out.mkdir(parents=True, exist_ok=True)
    if processes.main:
        remove_leftovers(out)
    run = TrainingRun(settings, out, processes)
    restored = (resume or export_only) and run.restore()
    try:
        if export_only:
            run.use_averages()
        else:
            if processes.main:
                record.write_record(out, settings, run.job.images.record())
            if restored:
                run.report("resumed: " + ", ".join(f"{t.stage.name} at step {t.step}" for t in run.trainers))
            run.train()
        if processes.main:
            if any(trainer.stage.sharded for trainer in run.trainers):
                run = _whole_run(settings, out)
            run.export(export)
    except Stopped:
        run.report("stopped by SIGTERM, and saved; continue with --resume")


def _whole_run(settings: TrainingSettings, out: Path) -> TrainingRun:
    """The finished run in this process alone, from the checkpoints: what can be exported."""
    run = TrainingRun(settings, out, Processes())
    run.restore()
    run.use_averages()
    return run
