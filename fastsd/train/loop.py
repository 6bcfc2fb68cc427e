"""The training loop of every stage: AdamW, averaged weights, checkpoints that resume bit for bit."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsd.errors import FastsdError
from fastsd.runtime.devices import cpu_has_bf16
from fastsd.train import checkpoint
from fastsd.train.settings import Fit

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[str], None]


@dataclass(frozen=True)
class RandomStreams:
    """The random numbers of one worker in one step.

    They depend only on seed, stage, step and worker, so checkpoints need no generator state.
    """

    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def create(cls, seed: int, stage: str, step: int, worker: int = 0) -> RandomStreams:
        root = np.random.SeedSequence([seed, *stage.encode(), step, worker])
        generator = torch.Generator("cpu").manual_seed(int(root.generate_state(1, np.uint64)[0] >> 1))
        return cls(np.random.default_rng(root), generator)


Metrics = dict[str, float]
# The loss of a stage: takes the random streams and the size of a worker's batch, returns the scalar to minimise and the
# metrics for the log.
Loss = Callable[[RandomStreams, int], tuple[torch.Tensor, Metrics]]


def learning_rate(fit: Fit, step: int) -> float:
    """Linear warm-up, then cosine decay from `rate` to `final_rate * rate` at the last step."""
    if step < fit.warmup:
        return fit.rate * (step + 1) / fit.warmup
    progress = min((step - fit.warmup) / max(fit.steps - fit.warmup, 1), 1.0)
    return fit.rate * (fit.final_rate + (1 - fit.final_rate) * 0.5 * (1 + math.cos(math.pi * progress)))


class Stage:
    """A model in training: its weights, their moving average, the optimiser state and the progress.

    Attributes:
        model: the model in training.
        average: a copy with exponentially averaged weights (Polyak averaging). The export uses it.
        step: number of finished steps. minutes: time spent on them.
        finished: whether the step or time limit is reached.
    """

    def __init__(self, name: str, model: nn.Module, fit: Fit, seed: int, file: Path):
        self.name, self.model, self.fit, self.seed, self.file = name, model, fit, seed, file
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=fit.rate, weight_decay=fit.weight_decay)
        self.step, self.minutes, self.finished = 0, 0.0, False

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state: dict[str, Any] = {
            "step": self.step,
            "minutes": self.minutes,
            "finished": self.finished,
            "seed": self.seed,
        }
        state |= {"model": self.model.state_dict(), "average": self.average.state_dict()}
        checkpoint.save(state | {"optimiser": self.optimiser.state_dict()}, self.file)

    def restore(self) -> bool:
        """Load the checkpoint; returns whether there is one.

        Raises:
            FastsdError: the checkpoint is from a run with other models or another seed.
        """
        if not self.file.is_file():
            return False
        state: dict[str, Any] = checkpoint.load(self.file)
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.minutes, seed = state["step"], state["minutes"], state["seed"]
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise FastsdError(
                f"does not match this config ({reason:.120}); use another --out", path=self.file
            ) from None
        if seed != self.seed:
            raise FastsdError(f"was trained with seed = {seed}, not {self.seed}; use another --out", path=self.file)
        # Training continues if the config now allows more steps or minutes.
        self.finished = state["finished"] and self._limit_reached()
        return True

    def run(self, loss: Loss, workers: Workers, report: Report, save_minutes: float, precision: str) -> None:
        """Train until the stage is finished, with a checkpoint every `save_minutes` and at the end."""
        self.model.train()
        started = saved = time.monotonic()
        before = self.minutes
        means = RunningMeans()
        with training_numerics():
            while not self.finished:
                rate = learning_rate(self.fit, self.step)
                for group in self.optimiser.param_groups:
                    group["lr"] = rate
                metrics = self._compute_gradients(loss, workers, precision)
                norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.fit.clip))
                if not math.isfinite(norm):
                    raise FastsdError(f"the gradient of step {self.step} is not finite; lower fit.rate", path=self.name)
                self.optimiser.step()
                self._update_average()
                self.step += 1
                self.minutes = before + (time.monotonic() - started) / 60
                self.finished = self._limit_reached()

                means.add(metrics | {"norm": norm})
                if self.step % 50 == 0 or self.finished:
                    progress = f"{self.name} {self.step}/{self.fit.steps}  {self.minutes:.1f} min"
                    report(f"{progress}  rate {rate:.2e}  {means.take()}")
                if self.finished or time.monotonic() - saved > save_minutes * 60:
                    self.save()
                    saved = time.monotonic()

    def _compute_gradients(self, loss: Loss, workers: Workers, precision: str) -> Metrics:
        """Set the parameters' gradients to those of the mean loss; each worker computes a part of the batch."""
        parameters = list(self.model.parameters())
        sizes = split_evenly(self.fit.batch_size, workers.count)

        def work(worker: int) -> tuple[tuple[torch.Tensor, ...], Metrics]:
            weight = sizes[worker] / self.fit.batch_size
            with autocast(precision):
                value, metrics = loss(RandomStreams.create(self.seed, self.name, self.step, worker), sizes[worker])
            return torch.autograd.grad(value * weight, parameters), {k: v * weight for k, v in metrics.items()}

        results = workers.map(work, range(len(sizes)))
        by_parameter = zip(*(gradients for gradients, _ in results), strict=True)
        for parameter, gradients in zip(parameters, by_parameter, strict=True):
            # Summed in the order of the workers, not of completion: the result is the same on every run.
            parameter.grad = sum(gradients[1:], gradients[0])
        return {name: sum(metrics[name] for _, metrics in results) for name in results[0][1]}

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the average towards the weights; faster at first, so that it soon forgets the initial weights."""
        weight = 1 - min(self.fit.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), weight)

    def _limit_reached(self) -> bool:
        return self.step >= self.fit.steps or 0 < self.fit.max_minutes <= self.minutes


class Workers:
    """Data-parallel threads, for use in a `with` statement. Each thread runs its operations on a single core.

    Two threads that split every operation synchronise some hundred times per step. On a busy machine each wait costs a
    time slice: 5 to 11 seconds per step were measured, instead of 0.7. Two threads that split the batch synchronise
    once per step.
    """

    def __init__(self, count: int):
        self.count = count

    def __enter__(self) -> Workers:
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads_before)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results in the order of `items`."""
        return list(self._pool.map(function, items))


class RunningMeans:
    """Means of the metrics over the steps since the last `take`."""

    def __init__(self) -> None:
        self._totals: Metrics = {}
        self._count = 0

    def add(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._totals[name] = self._totals.get(name, 0.0) + value
        self._count += 1

    def take(self) -> str:
        line = "  ".join(f"{name} {total / self._count:.4f}" for name, total in self._totals.items())
        self._totals, self._count = {}, 0
        return line


def split_evenly(total: int, parts: int) -> list[int]:
    """Split `total` into at most `parts` positive sizes that differ by at most one."""
    parts = min(total, parts)
    return [total // parts + (i < total % parts) for i in range(parts)]


def uses_bf16(precision: str) -> bool:
    """Whether training computes in bf16; "auto" means bf16 where the processor supports it."""
    return precision == "bf16" or (precision == "auto" and cpu_has_bf16())


def autocast(precision: str) -> torch.autocast:
    """Matrix products in bf16 where `precision` says so; weights, sums and the loss stay fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=uses_bf16(precision))


@contextmanager
def training_numerics() -> Iterator[None]:
    """Deterministic algorithms, and the attention backend that is fastest for at most 64 tokens.

    PyTorch's fused CPU attention takes 43 % of a bf16 training step at 64 tokens; the math backend makes the step 1.5
    times as fast (measured on a Zen 5 core).
    """
    deterministic: Any = torch.utils.deterministic  # the module replaces its class at run time; mypy cannot see that
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]
