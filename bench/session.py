"""The state of one benchmark session: options, budget, result file, models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import measure, record
from bench.ceilings import Ceilings, measure_ceilings
from bench.clocks import GpuWatch
from bench.families import FAMILIES, TINY, ModelFamily
from bench.measure import Candidate, Limit, Outcome
from bench.models import random_components
from bench.options import COMPILED, Options
from bench.roofline import KINDS, Work, binding
from fastsd.bundled import BUNDLED
from fastsd.components import Components
from fastsd.runtime.devices import autoencoder_dtype, dtype_name
from fastsd.weights import load_folder

ROUNDS_SHARE = 0.25  # of the remaining time, the largest part that one benchmark may use for its rounds
MAX_ROUNDS_SECONDS = 30.0  # for the rounds of one benchmark


@dataclass
class Session:
    """One session."""

    options: Options
    started: float = field(default_factory=time.perf_counter)
    not_run: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    _results: record.Results | None = None
    _components: tuple[Any, Components] | None = None
    _ceilings: dict[torch.dtype, Ceilings] = field(default_factory=dict)

    @property
    def results(self) -> record.Results:
        """The result file; opened when the first result is known."""
        if self._results is None:
            path = self.options.results or record.default_path(self.options.device)
            self._results = record.Results(path, self.options.device, self.options.flags())
        return self._results

    @property
    def written(self) -> Path | None:
        """The path of the result file, if there is one yet."""
        return self._results.path if self._results else None

    def remaining(self) -> float:
        """The remaining seconds of the budget; infinite without a budget."""
        if self.options.budget is None:
            return float("inf")
        return self.options.budget - (time.perf_counter() - self.started)

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """The peak rates of the device; measured once for each dtype, and written to the result file."""
        if dtype not in self._ceilings:
            ceilings = self._ceilings[dtype] = measure_ceilings(self.options.device, dtype)
            finite = {name: rate if math.isfinite(rate) else None for name, rate in vars(ceilings).items()}
            self.results.data["ceilings"][dtype_name(dtype)] = finite
        return self._ceilings[dtype]

    def family(self, model: str) -> ModelFamily:
        """The configs of a family by name; without `--benchmark`, always those of the tiny model."""
        return FAMILIES[model] if self.options.measuring else TINY

    def size(self, model: str, components: Components) -> int:
        """The side of the images in pixels."""
        return self.options.size or components.sample_size * components.vae.config.downscale

    def components(self, model: str, dtype: torch.dtype) -> Components:
        """The model, created or loaded; only the last one stays in memory."""
        key = (model, dtype)
        if self._components is None or self._components[0] != key:
            self._components = None  # freed before the next one is created
            device = self.options.device
            if self.options.model is not None or model == "digits":
                components = load_folder(self.options.model or BUNDLED["digits"], dtype, device)
                widen(components, dtype, device)
            else:
                components = pipeline_components(self.family(model), dtype, device)
            self._components = (key, components)
        return self._components[1]

    def run_benchmark(
        self,
        benchmark: str,
        reference: Callable[[], torch.Tensor],
        candidates: list[Candidate],
        dtype: torch.dtype,
        depth: int,
        work: list[Work] | None = None,
        limit: float | None = None,
        psnr: bool = False,
        missing: dict[str, str] | None = None,
        **labels: Any,
    ) -> list[Outcome]:
        """Check, time, print and record the candidates.

        Args:
            benchmark: its name.
            reference, candidates: see `measure.run_candidates`. The first is fastsd, except under `compiled_alone`.
            dtype, depth: for the tolerance, unless `limit` is given.
            work: for the floor.
            missing: peers that cannot take part, and the reason. labels: model, size, batch, steps.

        Raises:
            AssertionError: fastsd failed.
        """
        measuring = self.options.measuring
        candidates = self._taking_part(candidates, missing)
        bound = self._limit_if_measurable(work, dtype) if measuring and work is not None else None
        watch = GpuWatch()

        def add(outcome: Outcome) -> None:
            fields = record.outcome_fields(outcome) | watch.fields()
            if bound is not None:
                fields |= self._work_fields(work or [], dtype, bound) | record.achieved(bound, outcome)
            self.results.add(benchmark=benchmark, **labels, dtype=dtype_name(dtype), **fields)

        seconds = min(MAX_ROUNDS_SECONDS, ROUNDS_SHARE * self.remaining())
        with watch if measuring and self.options.device.type == "cuda" else nullcontext():
            outcomes = measure.run_candidates(
                reference,
                candidates,
                measure.tolerance(dtype, depth) if limit is None else limit,
                self.options.device,
                seconds,
                measuring=measuring,
                psnr=psnr,
                deadline=time.perf_counter() + self.remaining(),
                on_first=lambda outcome: add(replace(outcome, cut="stopped before the first round")),
            )
        if seconds < MAX_ROUNDS_SECONDS:
            _note_cut(outcomes)
        outcomes += [Outcome(name, problem=reason) for name, reason in (missing or {}).items()]
        title = " ".join([benchmark, *(f"{k}={v}" for k, v in labels.items()), dtype_name(dtype)])
        self.tables.append("\n".join([title, *measure.lines(outcomes, bound)]))
        if measuring:
            for outcome in outcomes:
                add(outcome)
        if outcomes[0].problem and outcomes[0].name.startswith("fastsd"):
            raise AssertionError(f"{title}: {outcomes[0].name}: {outcomes[0].problem}")
        return outcomes

    def _taking_part(self, candidates: list[Candidate], missing: dict[str, str] | None) -> list[Candidate]:
        """Those of this process; without any, and without a reason to tell, the benchmark is skipped."""
        if not self.options.compiled_alone:
            return candidates
        candidates = [candidate for candidate in candidates if candidate.name == COMPILED]
        if not candidates and not missing:
            pytest.skip(f"no candidate {COMPILED}")
        return candidates

    def add_kinds(self, labels: dict[str, Any], shares: dict[str, float]) -> bool:
        """Split the time of the record with these labels by kind of op; returns whether the record has a time."""
        row = self.results.find(labels)
        if row is None or not row.get("seconds"):
            return False
        median = row["seconds"]["median"]
        self.results.add(**row | {"kinds": {kind: float(f"{share * median:.4g}") for kind, share in shares.items()}})
        return True

    def _limit_if_measurable(self, work: list[Work], dtype: torch.dtype) -> Limit | None:
        """The limit; None if the ceilings cannot be measured, since times are still useful then."""
        try:
            return self.limit(work, dtype)
        except Exception as error:
            self.tables.append(f"no limits: {type(error).__name__}: {str(error)[:160].partition(chr(10))[0]}")
            return None

    def limit(self, work: list[Work], dtype: torch.dtype) -> Limit:
        """The least time, operations and bytes of `work` on this device."""
        ceilings, size = self.ceilings(dtype), dtype.itemsize
        return Limit(
            seconds=sum(w.floor(ceilings, size) for w in work),
            flops=sum(w.flops for w in work),
            bytes=sum(w.elements for w in work) * size,
            binds=binding(work, ceilings, size),
        )

    def _work_fields(self, work: list[Work], dtype: torch.dtype, bound: Limit) -> dict[str, Any]:
        """The fields of a record that describe the work: operations, bytes, the limit that binds, the floors."""
        ceilings = self.ceilings(dtype)
        kinds = {kind: [w for w in work if w.kind == kind] for kind in KINDS}
        floors = {kind: sum(w.floor(ceilings, dtype.itemsize) for w in part) for kind, part in kinds.items()}
        floors = {kind: float(f"{floor:.4g}") for kind, floor in floors.items() if floor}
        return {
            "floor": float(f"{bound.seconds:.5g}"),
            "by_kind": floors,
            "flops": bound.flops,
            "bytes": bound.bytes,
            "binds": bound.binds,
        }


def pipeline_components(family: ModelFamily, dtype: torch.dtype, device: torch.device) -> Components:
    """A model of random weights as a pipeline holds it."""
    components = random_components(family, dtype, device)
    widen(components, dtype, device)
    return components


def widen(components: Components, dtype: torch.dtype, device: torch.device) -> None:
    """Give the autoencoder its dtype, as `Pipeline.from_pretrained` does."""
    components.vae.to(autoencoder_dtype(dtype, device, components.vae.config.force_upcast))


def _note_cut(outcomes: list[Outcome]) -> None:
    """Say which outcomes have fewer rounds than usual, for want of time."""
    for outcome in outcomes:
        if 0 < len(outcome.samples) < measure.MAX_ROUNDS:
            outcome.cut = f"cut to {len(outcome.samples)} rounds by the budget"
