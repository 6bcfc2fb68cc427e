"""The training loop of every stage: AdamW, averaged weights, checkpoints from which it goes on bit for bit."""

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

A = TypeVar("A")
B = TypeVar("B")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Chance:
    """The random numbers of one share of one step. They depend on seed, stage, step and share alone, so nothing of
    them needs saving."""

    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, stage: str, step: int, share: int = 0) -> Chance:
        root = np.random.SeedSequence([seed, *stage.encode(), step, share])
        own = torch.Generator().manual_seed(int(root.generate_state(1, np.uint64)[0] >> 1))
        return cls(np.random.default_rng(root), own)


# A stage's loss for a share of one step's batch, of the size given: the scalar to go down, and figures for the log.
Figures = dict[str, float]
Loss = Callable[[Chance, int], tuple[torch.Tensor, Figures]]


def learning_rate(fit: Fit, step: int) -> float:
    """Linear warm-up from step 0, then half a cosine from `rate` to `final_rate * rate` at the last step."""
    if step < fit.warmup:
        return fit.rate * (step + 1) / fit.warmup
    done = min((step - fit.warmup) / max(fit.steps - fit.warmup, 1), 1.0)
    return fit.rate * (fit.final_rate + (1 - fit.final_rate) * 0.5 * (1 + math.cos(math.pi * done)))


class Stage:
    """A model being fitted: its weights, their moving average, the optimiser, and how far it is.

    Attributes:
        model: what is trained. average: a copy whose weights follow the model's (Polyak averaging); this is exported.
        step: finished steps. minutes: time spent in them. finished: the steps or the time are used up.
    """

    def __init__(self, name: str, model: nn.Module, fit: Fit, seed: int, file: Path):
        self.name, self.model, self.fit, self.seed, self.file = name, model, fit, seed, file
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=fit.rate, weight_decay=fit.weight_decay)
        self.step, self.minutes, self.finished = 0, 0.0, False

    def save(self) -> None:
        """Write the stage's checkpoint, atomically."""
        state: dict[str, Any] = {
            "step": self.step,
            "minutes": self.minutes,
            "finished": self.finished,
            "seed": self.seed,
        }
        state |= {"model": self.model.state_dict(), "average": self.average.state_dict()}
        checkpoint.save(state | {"optimiser": self.optimiser.state_dict()}, self.file)

    def restore(self) -> bool:
        """Go back to the checkpoint where there is one.

        Raises:
            FastsdError: it belongs to a run with other models or another seed.
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
            raise FastsdError(f"{self.file}: does not fit this config ({reason:.120}); use another --out") from None
        if seed != self.seed:
            raise FastsdError(f"{self.file}: was trained with seed = {seed}, not {self.seed}; use another --out")
        # More steps or minutes in the config than when it was written: go on.
        self.finished = state["finished"] and self._used_up()
        return True

    def run(self, loss: Loss, workers: Workers, report: Report, save_minutes: float, precision: str) -> None:
        """Train until the stage is finished, with a checkpoint every `save_minutes` and at the end."""
        self.model.train()
        started = saved = time.monotonic()
        before = self.minutes
        log = Means()
        with numerics():
            while not self.finished:
                rate = learning_rate(self.fit, self.step)
                for group in self.optimiser.param_groups:
                    group["lr"] = rate
                figures = self._gradient(loss, workers, precision)
                norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.fit.clip))
                if not math.isfinite(norm):
                    raise FastsdError(f"{self.name}: the gradient of step {self.step} is not finite; lower fit.rate")
                self.optimiser.step()
                self._follow()
                self.step += 1
                self.minutes = before + (time.monotonic() - started) / 60
                self.finished = self._used_up()

                log.add(figures | {"norm": norm})
                if self.step % 50 == 0 or self.finished:
                    where = f"{self.name} {self.step}/{self.fit.steps}  {self.minutes:.1f} min"
                    report(f"{where}  rate {rate:.2e}  {log.take()}")
                if self.finished or time.monotonic() - saved > save_minutes * 60:
                    self.save()
                    saved = time.monotonic()

    def _gradient(self, loss: Loss, workers: Workers, precision: str) -> Figures:
        """Leave the gradient of the batch's mean loss in the parameters: each worker takes a share of the batch."""
        parameters = list(self.model.parameters())
        sizes = split(self.fit.batch_size, workers.count)

        def work(share: int) -> tuple[tuple[torch.Tensor, ...], Figures]:
            weight = sizes[share] / self.fit.batch_size
            with autocast(precision):
                value, figures = loss(Chance.of(self.seed, self.name, self.step, share), sizes[share])
            return torch.autograd.grad(value * weight, parameters), {k: v * weight for k, v in figures.items()}

        shares = workers.map(work, range(len(sizes)))
        for place, gradients in zip(parameters, zip(*(gradients for gradients, _ in shares), strict=True), strict=True):
            place.grad = sum(gradients[1:], gradients[0])  # in the order of the shares, whoever was ready first
        return {name: sum(figures[name] for _, figures in shares) for name in shares[0][1]}

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights; faster at first, so that the initial weights are soon forgotten."""
        share = 1 - min(self.fit.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), share)

    def _used_up(self) -> bool:
        return self.step >= self.fit.steps or 0 < self.fit.max_minutes <= self.minutes


class Workers:
    """A few threads, each of which computes alone, inside a `with`.

    Two threads that share every operation wait for each other some hundred times a step; on a machine that does other
    work too, each wait costs a time slice (measured: 5 to 11 seconds a step instead of 0.7). Two that each take half of
    the batch meet once.
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

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Results in the order of `items`."""
        return list(self._pool.map(function, items))


class Means:
    """Means of figures over the steps since they were last taken."""

    def __init__(self) -> None:
        self._totals: Figures = {}
        self._count = 0

    def add(self, figures: Figures) -> None:
        for name, figure in figures.items():
            self._totals[name] = self._totals.get(name, 0.0) + figure
        self._count += 1

    def take(self) -> str:
        line = "  ".join(f"{name} {total / self._count:.4f}" for name, total in self._totals.items())
        self._totals, self._count = {}, 0
        return line


def split(total: int, parts: int) -> list[int]:
    """`total` as at most `parts` sizes that differ by at most one, none of them 0."""
    parts = min(total, parts)
    return [total // parts + (i < total % parts) for i in range(parts)]


def uses_bf16(precision: str) -> bool:
    """What "auto" stands for on this processor."""
    return precision == "bf16" or (precision == "auto" and cpu_has_bf16())


def autocast(precision: str) -> torch.autocast:
    """Products in bf16 where `precision` says so; weights, sums and the loss stay fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=uses_bf16(precision))


@contextmanager
def numerics() -> Iterator[None]:
    """Repeatable arithmetic, and the attention that is fastest for maps of at most 64 tokens.

    PyTorch's fused CPU attention takes 43 % of a bf16 training step at 64 tokens; the plain one makes the step 1.5
    times as fast (measured on a Zen 5 core).
    """
    deterministic: Any = torch.utils.deterministic  # a module that makes itself a class; checkers do not see it
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]
