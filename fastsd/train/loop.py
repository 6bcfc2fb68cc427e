"""The training loop of every stage: optimisers, averaged weights, checkpoints that resume bit for bit."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsd.errors import FastsdError
from fastsd.train import checkpoint
from fastsd.train.figures import Figures
from fastsd.train.optimisers import Average, learning_rate, make_optimiser
from fastsd.train.parts import Part, split, training_numerics
from fastsd.train.sharding import divided, divided_state, shard, whole
from fastsd.train.stage import Batch, Metrics, Stage
from fastsd.train.stall import StallWatch

VALIDATION_STEP = 2**31  # the step that random numbers of the validation are keyed by; no training is as long


class Player:
    """A network that a stage trains: its parameters that require a gradient, their averages, their optimiser."""

    def __init__(self, module: nn.Module, stage: Stage):
        self.sharded, self.main = stage.sharded, stage.job.processes.main
        if self.sharded:
            shard(module, stage.job.device, stage.job.processes.count)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.module, self.names, self.parameters = module, list(named), list(named.values())
        self.average = Average(self.parameters, stage.fit.average)
        self.optimiser = make_optimiser(stage.fit, self.parameters, stage.job.device)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on. With divided weights, all processes have to call it."""
        average = dict(zip(self.names, self.average.values)) if self.average.decay else {}
        return whole(
            {
                "model": {name: p.detach() for name, p in zip(self.names, self.parameters)},
                "buffers": dict(self.module.named_buffers()),
                "average": average,
                "optimiser": self.optimiser.state_dict(),
            },
            kept=self.main,
        )

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned.

        Raises:
            KeyError, RuntimeError, ValueError: it is of another network.
        """
        tensors = dict(zip(self.names, self.parameters)) | dict(self.module.named_buffers())
        _copy(state["model"] | state["buffers"], tensors)
        if self.average.decay:
            _copy(state["average"], dict(zip(self.names, self.average.values)))
        optimiser = state["optimiser"]
        self.optimiser.load_state_dict(divided_state(optimiser, self.parameters) if self.sharded else optimiser)


class Trainer:
    """A stage in training.

    Attributes:
        step: number of finished steps. minutes: time spent on them.
        skipped: steps whose loss or gradient was not finite, which changed nothing.
        finished: whether the step or time limit is reached.
    """

    def __init__(self, stage: Stage, file: Path):
        self.stage, self.job, self.fit, self.file = stage, stage.job, stage.fit, file
        if stage.sharded and self.fit.sample_every:
            raise FastsdError(
                f"{stage.name}.fit.sample_every should be 0 with shard: no process has the whole network to sample with"
            )
        self.players = {name: Player(module, stage) for name, module in stage.trained.items()}
        self.step, self.minutes, self.skipped, self.finished = 0, 0.0, 0, False
        self.skipped_in_a_row = 0
        if self.fit.batch_size < self._part_count and self.job.processes.count > 1:
            raise FastsdError(
                f"{stage.name}.fit.batch_size is {self.fit.batch_size}; it should be at least {self._part_count},"
                " a sample for each part of each process"
            )

    def save(self) -> None:
        """Write the checkpoint atomically, in the main process."""
        players = {name: player.state() for name, player in self.players.items()}
        if not self.job.processes.main:
            return
        counts = {
            "step": self.step,
            "minutes": self.minutes,
            "finished": self.finished,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seed": self.job.settings.seed,
        }
        checkpoint.save(counts | players, self.file)

    def restore(self) -> bool:
        """Load the checkpoint; returns whether there is one.

        Raises:
            FastsdError: the checkpoint is from a run with other models or another seed.
        """
        if not self.file.is_file():
            return False
        state = checkpoint.load(self.file)
        try:
            for name, player in self.players.items():
                player.restore(state[name])
            self.step, self.minutes, seed = state["step"], state["minutes"], state["seed"]
            self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise FastsdError(
                f"does not match this config ({reason:.120}); use another --out", path=self.file
            ) from None
        if seed != self.job.settings.seed:
            raise FastsdError(
                f"was trained with seed = {seed}, not {self.job.settings.seed}; use another --out", path=self.file
            )
        # Training continues if the config now allows more steps or minutes.
        self.finished = state["finished"] and self._limit_reached()
        return True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context, the networks have their averaged weights."""
        with ExitStack() as stack:
            for player in self.players.values():
                stack.enter_context(player.average.in_place())
            yield

    def run(self, figures: Figures) -> None:
        """Train until the stage is finished, with a checkpoint every `checkpoint_minutes` and at the end.

        Raises:
            Stopped: the run was asked to end; the checkpoint is written.
            FastsdError: `max_nonfinite` steps in a row were not finite; their last batch is saved.
        """
        for player in self.players.values():
            player.module.train()
        save_minutes = self.job.settings.checkpoint_minutes
        started = saved = time.monotonic()
        before = self.minutes
        watch = StallWatch(self.job.settings.stall_minutes, self._say)
        with training_numerics(self.job.device), watch:
            while not self.finished:
                watch.moved(f"step {self.step + 1} of {self.stage.name}")
                metrics = self._take_step()
                self.step += 1
                self.minutes = before + (time.monotonic() - started) / 60
                self.finished = self.job.processes.any(self._limit_reached(), self.job.device)
                if self.job.processes.any(self.job.stop.is_set(), self.job.device):
                    self.job.stop.set()
                metrics |= self._validated()
                if self.job.processes.main:
                    self._show_samples()
                    figures.add(metrics)
                due = self.finished or self.job.stop.is_set() or time.monotonic() - saved > save_minutes * 60
                if self.job.processes.any(due, self.job.device):  # each may hold a share of what is saved
                    self.save()
                    saved = time.monotonic()
                if not self.finished:
                    self.job.check_stop()

    def _say(self, line: str) -> None:
        """Report a line of any process: of the others, on stderr."""
        if self.job.processes.main:
            self.job.report(line)
        else:
            print(f"process {self.job.processes.rank}: {line}", file=sys.stderr, flush=True)

    def _take_step(self) -> Metrics:
        """One update of every network. A step that is not finite changes no weights."""
        rate = learning_rate(self.fit, self.step)
        parts = split(self.job.settings.seed, self.stage.stream, self.step, self.fit.batch_size, self._part_count)
        batches: dict[int, Batch] = {}
        metrics: Metrics = {"rate": rate}
        finite = True
        for name, player in self.players.items():
            metrics |= self._compute_gradients(name, player, parts, batches)
            norm = self._clip(player)
            metrics["norm" if len(self.players) == 1 else f"{name}_norm"] = norm
            finite = finite and math.isfinite(norm)
            if not finite:
                break
            for group in player.optimiser.param_groups:
                group["lr"] = rate
            player.optimiser.step()
        for player in self.players.values():
            player.optimiser.zero_grad(set_to_none=True)
            if finite:
                player.average.update(self.step)
        self._count_skipped(finite, batches)
        return metrics

    @property
    def _part_count(self) -> int:
        return self.job.workers.count * self.fit.accumulate * self.job.processes.count

    def _compute_gradients(self, name: str, player: Player, parts: list[Part], batches: dict[int, Batch]) -> Metrics:
        """Set the gradients to those of the mean loss; every worker computes a part of the batch at a time."""

        def work(part: Part) -> tuple[tuple[torch.Tensor | None, ...], Metrics]:
            weight = part.size / part.of
            if self.job.workers.count == 1:  # for dropout; threads would share this generator
                torch.manual_seed(part.random.torch.initial_seed())
            with self.job.autocast():
                if part.index not in batches:
                    batches[part.index] = self.stage.batch(part)
                value, metrics = self.stage.loss(name, batches[part.index], part)
            if not value.requires_grad:  # the network takes no part in this step
                return (None,) * len(player.parameters), metrics
            metrics = {k: v * weight for k, v in metrics.items()}
            if player.sharded:  # the backward pass sums up into `grad` the mean over the processes
                (value * weight * self.job.processes.count).backward()
                return (None,) * len(player.parameters), metrics
            return torch.autograd.grad(value * weight, player.parameters, allow_unused=True), metrics

        totals: Metrics = {}
        processes, workers = self.job.processes, self.job.workers
        own = parts[processes.rank :: processes.count]
        for first in range(0, len(own), workers.count):
            # Summed in the order of the parts, not of completion: the result is the same on every run.
            for gradients, metrics in workers.map(work, own[first : first + workers.count]):
                for parameter, gradient in zip(player.parameters, gradients, strict=True):
                    if gradient is not None:  # not added in place: two parameters may share one gradient's memory
                        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                for key, value in metrics.items():
                    totals[key] = totals.get(key, 0.0) + value
        if not player.sharded:
            processes.add_up_gradients(player.parameters)
        return processes.sums(totals, self.job.device)

    def _clip(self, player: Player) -> float:
        """Limit the gradient's norm; returns what it was."""
        limit = self.fit.clip or math.inf
        return float(whole(torch.nn.utils.clip_grad_norm_(player.parameters, limit)))

    def _count_skipped(self, finite: bool, batches: dict[int, Batch]) -> None:
        """Stop where too many steps in a row were not finite."""
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.job.report(f"{self.stage.name} step {self.step}: loss or gradient not finite, skipped")
        if self.skipped_in_a_row >= self.fit.max_nonfinite:
            path = self.file.with_name(f"{self.stage.name}-nonfinite.pt")
            checkpoint.save({"step": self.step, "batches": list(batches.values())}, path)
            raise FastsdError(
                f"{self.skipped_in_a_row} steps in a row up to step {self.step} had a loss or gradient that is not"
                f" finite; their last batch is saved here; lower {self.stage.name}.fit.rate",
                path=path,
            )

    def _validated(self) -> Metrics:
        """The figures of the validation, where it is time for one."""
        fit = self.fit
        if not fit.validate_every or not (self.step % fit.validate_every == 0 or self.finished):
            return {}
        with self.averaged():
            return {f"val_{name}": value for name, value in self.validate().items()}

    def _show_samples(self) -> None:
        """Write a sample grid, where it is time for one."""
        fit = self.fit
        if fit.sample_every and (self.step % fit.sample_every == 0 or self.finished):
            with self.averaged(), torch.no_grad():
                image = self.stage.grid()
            if image is not None:
                folder = self.job.out / "samples"
                folder.mkdir(exist_ok=True)
                image.save(folder / f"{self.stage.name}-{self.step:07d}.png")

    @torch.no_grad()
    def validate(self) -> Metrics:
        """The figures of the first network's loss on images that are not trained on, always with the same noise."""
        name = next(iter(self.players))
        seed, stream = self.job.settings.seed, self.stage.stream
        parts = split(seed, stream, VALIDATION_STEP, self.fit.batch_size, self._part_count, validation=True)

        def work(part: Part) -> Metrics:
            with torch.no_grad(), self.job.autocast():
                _, metrics = self.stage.loss(name, self.stage.batch(part), part)
            return {k: v * part.size / part.of for k, v in metrics.items()}

        processes = self.job.processes
        results = self.job.workers.map(work, parts[processes.rank :: processes.count])
        return processes.sums({key: sum(r[key] for r in results) for key in results[0]}, self.job.device)

    def _limit_reached(self) -> bool:
        return self.step >= self.fit.steps or 0 < self.fit.max_minutes <= self.minutes


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    """Copy tensors by name; the names and shapes must agree."""
    if source.keys() != target.keys():
        odd = sorted(source.keys() ^ target.keys())
        raise ValueError(f"{len(odd)} tensors differ in name, such as {odd[0]}")
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise ValueError(f"{name} is {list(source[name].shape)} there and {list(tensor.shape)} here")
        tensor.copy_(divided(source[name], tensor))
