"""What one run of the benchmarks knows: its options, its budget, its result file, the models it has made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import measure, record
from bench.ceilings import Ceilings, measure_ceilings
from bench.families import FAMILIES, TINY, Family, choose
from bench.measure import Candidate, Limit, Outcome
from bench.models import random_components
from bench.roofline import KINDS, Work, binding
from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.pipeline import BUNDLED
from fastsd.runtime.devices import dtype_name, resolve_device, resolve_dtype
from fastsd.weights import load_folder

PEERS = ("pytorch", "diffusers", "diffusers-channels-last", "diffusers-compiled")
LEAST_BUDGET = 10.0  # seconds; in less, not even the smallest model is made and checked
SHARE = 0.25  # of the time that is left, what one contest may use for its rounds
MEASURES = 30.0  # seconds of rounds that one contest uses at most


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    measuring: bool
    models: tuple[str, ...]
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    peers: tuple[str, ...]
    size: int | None
    budget: float | None
    model: Path | None
    profile: bool
    results: Path | None
    device: torch.device

    def flags(self) -> dict[str, Any]:
        """As they stand in a result file."""
        return {
            "models": list(self.models),
            "batch": list(self.batches),
            "steps": list(self.steps),
            "dtype": [dtype_name(dtype) for dtype in self.dtypes],
            "peers": list(self.peers),
            "size": self.size,
            "budget": self.budget,
            "model": str(self.model) if self.model else None,
        }


def check_options(values: dict[str, Any]) -> Options:
    """Options from the text that the command line gave; None is the default.

    Raises:
        FastsdError: one line that names the option.
    """
    device = resolve_device("auto")
    cuda, measuring = device.type == "cuda", bool(values["benchmark"])
    models = choose(values["models"] or ("sd15,sdxl,sd21,digits" if cuda else "sd15,digits"))
    names = values["dtype"] or dtype_name(resolve_dtype("auto", device))
    peers = _names(values["peers"] or ("pytorch,diffusers,diffusers-compiled" if cuda else ",".join(PEERS[1:3])))
    for peer in peers:
        if peer not in (*PEERS, "none"):
            raise FastsdError(f"--peers: there is no {peer!r}; there are {', '.join(PEERS)}, none")
    budget = _number("--budget", values["budget"], LEAST_BUDGET) if values["budget"] else None
    size = int(_number("--size", values["size"], 64)) if values["size"] else None
    if size is not None and size % 64:
        raise FastsdError(f"--size is {size}; it should be a multiple of 64")
    path = Path(values["model"]) if values["model"] else None
    if path is not None and not (path / "model_index.json").is_file():
        raise FastsdError(f"--model: {path} is no model folder; it holds no model_index.json")
    return Options(
        measuring=measuring,
        models=tuple(models) if measuring else ("tiny",),
        batches=_counts("--batch", values["batch"] or ("1,4,8" if cuda else "1")) if measuring else (2,),
        steps=_counts("--steps", values["steps"] or ("20,30,50" if cuda else "4")) if measuring else (2,),
        dtypes=tuple(resolve_dtype(name, device) for name in _names(names)) if measuring else (torch.float32,),
        peers=tuple(peer for peer in peers if peer != "none"),
        size=size,
        budget=budget,
        model=path,
        profile=bool(values["profile"]),
        results=Path(values["results"]) if values["results"] else None,
        device=device,
    )


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _counts(option: str, text: str) -> tuple[int, ...]:
    return tuple(int(_number(option, part, 1)) for part in _names(text))


def _number(option: str, text: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not value >= least:
        raise FastsdError(f"{option} is {text!r}; it should be a number of at least {least:g}")
    return value


@dataclass
class Session:
    """One run."""

    options: Options
    started: float = field(default_factory=time.perf_counter)
    not_run: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    _results: record.Results | None = None
    _components: tuple[Any, Components] | None = None
    _ceilings: dict[torch.dtype, Ceilings] = field(default_factory=dict)

    @property
    def results(self) -> record.Results:
        """The file, begun when the first figure is known."""
        if self._results is None:
            path = self.options.results or record.default_path(self.options.device)
            self._results = record.Results(path, self.options.device, self.options.flags())
        return self._results

    @property
    def written(self) -> Path | None:
        return self._results.path if self._results else None

    def remaining(self) -> float:
        """Seconds of the budget; infinite without one."""
        if self.options.budget is None:
            return float("inf")
        return self.options.budget - (time.perf_counter() - self.started)

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """Measured once for each dtype, and noted in the file."""
        if dtype not in self._ceilings:
            found = self._ceilings[dtype] = measure_ceilings(self.options.device, dtype)
            finite = {name: rate if math.isfinite(rate) else None for name, rate in vars(found).items()}
            self.results.data["ceilings"][dtype_name(dtype)] = finite
        return self._ceilings[dtype]

    def family(self, model: str) -> Family:
        """The configs of a model by name; of the digits model, or with `--model`, by its components."""
        return FAMILIES[model] if self.options.measuring else TINY

    def size(self, model: str, components: Components) -> int:
        """Pixels of a side."""
        return self.options.size or components.sample_size * components.vae.config.downscale

    def components(self, model: str, dtype: torch.dtype) -> Components:
        """The model, made or read; only the last one is kept."""
        key = (model, dtype)
        if self._components is None or self._components[0] != key:
            self._components = None  # before the next is made
            device = self.options.device
            if self.options.model is not None or model == "digits":
                made = load_folder(self.options.model or BUNDLED, dtype, device)
                if dtype == torch.float16 and made.vae.config.force_upcast:
                    made.vae.float()  # as `Pipeline.from_pretrained` does
            else:
                made = random_components(self.family(model), dtype, device)
            self._components = (key, made)
        return self._components[1]

    def contest(
        self,
        contest: str,
        reference: Callable[[], torch.Tensor],
        candidates: list[Candidate],
        dtype: torch.dtype,
        depth: int,
        work: list[Work] | None = None,
        limit: float | None = None,
        psnr: bool = False,
        per: int = 1,
        extra: dict[str, dict[str, Any]] | None = None,
        missing: dict[str, str] | None = None,
        **labels: Any,
    ) -> list[Outcome]:
        """Gate, time, print and record.

        Args:
            contest: its name.
            reference, candidates: see `measure.hold`; the first candidate is fastsd, whose red gate is an error.
            dtype, depth: for the tolerance, unless `limit` is given.
            work: for the floor.
            per: how many units of the work one run does.
            extra: more fields for a candidate's record, by its name.
            missing: peers that cannot take part, and why.
            labels: model, size, batch, steps.
        """
        measuring, device = self.options.measuring, self.options.device
        bound = self._bound(work, dtype, per) if measuring and work is not None else None
        limit = measure.tolerance(dtype, depth) if limit is None else limit

        def note(outcome: Outcome) -> None:
            fields = record.outcome_fields(outcome) | (extra or {}).get(outcome.name, {})
            if bound is not None:
                fields |= self._limits(work or [], dtype, per, bound) | record.achieved(bound, outcome)
            self.results.add(contest=contest, **labels, dtype=dtype_name(dtype), **fields)

        def early(outcome: Outcome) -> None:
            note(replace(outcome, cut="stopped before the first round"))

        seconds, deadline = min(MEASURES, SHARE * self.remaining()), time.perf_counter() + self.remaining()
        outcomes = measure.hold(
            reference,
            candidates,
            limit,
            device,
            seconds,
            measuring=measuring,
            psnr=psnr,
            deadline=deadline,
            early=early,
        )
        for outcome in outcomes:
            if seconds < MEASURES and 0 < len(outcome.samples) < measure.ROUNDS:
                outcome.cut = f"cut to {len(outcome.samples)} rounds by the budget"
        outcomes += [Outcome(name, problem=why) for name, why in (missing or {}).items()]
        title = " ".join([contest, *(f"{k}={v}" for k, v in labels.items()), dtype_name(dtype)])
        self.tables.append("\n".join([title, *measure.lines(outcomes, bound)]))
        if measuring:
            for outcome in outcomes:
                note(outcome)
        if outcomes[0].problem:
            raise AssertionError(f"{title}: {outcomes[0].name}: {outcomes[0].problem}")
        return outcomes

    def amend_kinds(self, labels: dict[str, Any], shares: dict[str, float]) -> bool:
        """Split the seconds of the record with these labels by kind; whether it is there and has a speed."""
        found = self.results.find(labels)
        if found is None or not found.get("seconds"):
            return False
        median = found["seconds"]["median"]
        self.results.add(**found | {"kinds": {kind: float(f"{share * median:.4g}") for kind, share in shares.items()}})
        return True

    def _bound(self, work: list[Work], dtype: torch.dtype, per: int) -> Limit | None:
        """The limit; a device whose best cannot be measured still has times."""
        try:
            return self.limit(work, dtype, per)
        except Exception as error:
            self.tables.append(f"no limits: {type(error).__name__}: {str(error)[:160].partition(chr(10))[0]}")
            return None

    def limit(self, work: list[Work], dtype: torch.dtype, per: int = 1) -> Limit:
        """What `per` times this work needs at least on this device."""
        ceilings, size = self.ceilings(dtype), dtype.itemsize
        return Limit(
            seconds=sum(w.floor(ceilings, size) for w in work) * per,
            flops=sum(w.flops for w in work) * per,
            bytes=sum(w.elements for w in work) * size * per,
            binds=binding(work, ceilings, size),
        )

    def _limits(self, work: list[Work], dtype: torch.dtype, per: int, bound: Limit) -> dict[str, Any]:
        """What a record says of the work: operations, bytes, what binds, the floor in seconds, whole and by kind."""
        ceilings = self.ceilings(dtype)
        kinds = {kind: [w for w in work if w.kind == kind] for kind in KINDS}
        floors = {kind: sum(w.floor(ceilings, dtype.itemsize) for w in part) * per for kind, part in kinds.items()}
        floors = {kind: float(f"{floor:.4g}") for kind, floor in floors.items() if floor}
        return {
            "floor": float(f"{bound.seconds:.5g}"),
            "by_kind": floors,
            "flops": bound.flops,
            "bytes": bound.bytes,
            "binds": bound.binds,
        }
