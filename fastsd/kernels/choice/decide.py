"""Which way computes a call on a GPU: a known choice, or the fastest of those that are right here.

At the first call of a GPU, an op and a key, every way is run in a child process if the GPU was never seen before
(`probe`), compared with the specification (`check`) and timed (`measure`); then the choice stays, in this process and
in the table on disk (`table`). Without a device that takes times, the first way that takes a call is used.
"""

from __future__ import annotations

import atexit
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastsd.cuda.capture import ran_out_of_memory
from fastsd.errors import FastsdError
from fastsd.files import cache_folder
from fastsd.kernels import dispatch
from fastsd.kernels.choice import table as tables
from fastsd.kernels.choice.check import Checker, Unjudged
from fastsd.kernels.choice.faults import device_is_lost, installation_is_incomplete, reason_of
from fastsd.kernels.choice.machine import CudaMachine
from fastsd.kernels.choice.measure import Machine, best, times
from fastsd.kernels.choice.op import GpuOp, Key, OpCandidate, Way, key_text
from fastsd.kernels.choice.probe import Prober
from fastsd.kernels.choice.table import Place, TableEntry

log = logging.getLogger(__name__)

SAVED_EVERY = 2.0  # seconds between two writes of the table, and once more when the process ends
PAUSE = 10.0  # seconds without a new call, after which the next one belongs to another image size
BUDGET = 1.0  # seconds that the clock may take for an image size before it hurries

machine: Machine = CudaMachine()  # tests put a played one here
lock = threading.RLock()
said: set[tuple[str, ...]] = set()  # what was warned of
_gpus: dict[str, GpuChoices] = {}  # by device
_current = threading.local()  # has `mode`, the thread's ChoiceMode


@dataclass(frozen=True)
class ChoiceMode:
    """How choices are made in this thread.

    Attributes:
        reproducible: of tables only the committed one is asked, and nothing is timed.
        probe: on a GPU never seen before, every way runs in a child process first.
        thorough: every launch that may be worth a trial is timed, once in this process, whatever is known.
        ends: the `time.monotonic()` after which `thorough` is over.
        tell: is called with each choice that was timed.
    """

    reproducible: bool = False
    probe: bool = True
    thorough: bool = False
    ends: float = math.inf
    tell: Callable[[Place, TableEntry], None] | None = None


def mode() -> ChoiceMode:
    """The mode of this thread."""
    return getattr(_current, "mode", ChoiceMode())


@contextmanager
def choosing(wanted: ChoiceMode) -> Iterator[None]:
    """Inside this context choices are made in this mode, in this thread."""
    previous = mode()
    _current.mode = wanted
    try:
        yield
    finally:
        _current.mode = previous


def way_for(op: GpuOp, key: Key, args: Sequence[Any], excluded: dict[str, str]) -> tuple[Way, bool]:
    """The way to compute a call, and whether it stays.

    Args:
        excluded: reasons by way, of those that failed in this process.
    """
    x = args[0]
    if machine.measures(x):
        if machine.capturing():  # nothing can be compared now: PyTorch's own op is right, and no slower than itself
            return op.own, False
        # A training's autocast would compute the specification, the truth, in 16 bits.
        exact = torch.autocast(x.device.type, enabled=False)
        with lock, torch.cuda.device_of(x), torch.inference_mode(), exact:
            return gpu_of(x.device).way_for(op, key_text(key), args, excluded)
    return next(Way(one) for one in taking(op, args) if not one.measured and one.name not in excluded), True


def taking(op: GpuOp, args: Sequence[Any]) -> Iterator[OpCandidate]:
    """The candidates that take the call. A refusal of one that should take every call is told.

    Raises:
        FastsdError: such a refusal, while the backend `triton` is forced.
    """
    for candidate in op.in_order(args):
        reason = candidate.refuses(*args)
        if reason is None:
            yield candidate
        elif not candidate.partial and not candidate.measured:
            dispatch.fall_back(op.name, reason)


def ways_of(candidates: Sequence[OpCandidate], args: Sequence[Any], thorough: bool) -> list[Way]:
    """The ways of candidates that take the call: each with its launches, a few or, `thorough`, all."""
    return [
        Way(one, launch)
        for one in candidates
        if thorough or not one.tuned
        for launch in (one.launches(thorough, *args) if one.launches is not None else (None,))
    ]


def gpu_of(device: torch.device) -> GpuChoices:
    """The choices of a device of this process."""
    name = str(device)
    if name not in _gpus:
        _gpus[name] = GpuChoices(device)
    return _gpus[name]


def describe(device: torch.device) -> str:
    """Where the choices of a device are kept, in a line."""
    if device.type != "cuda":
        return "the first candidate of each op: nothing is timed on a CPU"
    identity = machine.identity(device)
    known, given = tables.load(identity), tables.shared(identity)
    return f"{len(known.entries)} in {tables.table_path(identity)}, {len(given)} that were given for this GPU"


def forget() -> None:
    """Forget, in this process, what was chosen and said."""
    for gpu in _gpus.values():
        gpu.close()
    _gpus.clear()
    said.clear()


def say(message: str, *about: str) -> None:
    """Warn once of each subject."""
    if about not in said:
        said.add(about)
        log.warning("%s", message)


def tell_incomplete(error: Exception) -> None:
    """Say once that Triton cannot compile here, and what it needs."""
    say(
        f"kernels cannot be compiled here ({reason_of(error)}); PyTorch's own ops compute instead. Triton needs a "
        "C compiler (gcc or clang, or CC), Python's headers, and a cache folder with space",
        "installation",
    )


@dataclass
class Trial:
    """What is known of the ways of one call."""

    op: GpuOp
    place: Place
    args: Sequence[Any]
    ways: list[Way]
    excluded: dict[str, str] = field(default_factory=dict)
    doubted: dict[str, str] = field(default_factory=dict)  # left out by this process alone
    doubted_before: dict[str, str] = field(default_factory=dict)  # by an earlier process: once more, and for good
    uncertain: bool = False  # a way could not be compared or timed, for want of memory or a compiler

    @property
    def left(self) -> list[Way]:
        """The ways that are not left out; PyTorch's own op is always one."""
        out = self.excluded | self.doubted
        return [way for way in self.ways if way.label not in out or way == self.op.own]

    @functools.cached_property
    def checker(self) -> Checker:
        return Checker(self.op, self.args)


class GpuChoices:
    """The choices of one GPU in this process, and their table."""

    def __init__(self, device: torch.device):
        self.device = device
        self.identity = machine.identity(device)
        self.table = tables.load(self.identity)
        self.shared = tables.shared(self.identity)
        self.committed = tables.shared(self.identity, committed_only=True)
        self.unseen = not self.table.entries and not tables.shared(self.identity, proven=True)
        self._revised: set[Place] = set()
        self._settled: set[Place] = set()  # places whose doubts are of this process
        self._prober: Prober | None = None
        self._saved, self._changed = time.monotonic(), False
        self._spent, self._ended = 0.0, -PAUSE  # seconds that the clock took for this image size, and when it did last
        atexit.register(self.save)

    def way_for(self, op: GpuOp, key: str, args: Sequence[Any], excluded: dict[str, str]) -> tuple[Way, bool]:
        """See `way_for` above."""
        how, place = mode(), (op.name, key)
        thorough = how.thorough and time.monotonic() < how.ends
        candidates = list(taking(op, args))
        if len(candidates) == 1:
            return op.own, True
        own = self.table.entries.get(place, TableEntry())
        before: dict[str, str] = {}
        if own.doubted and place not in self._settled and how.probe and not how.reproducible:
            self._settled.add(place)  # the choice is made once more, with the ways that were doubted
            before, own = own.doubted, replace(own, candidate=None, doubted={})
        given = self.committed.get(place) if how.reproducible else self.shared.get(place)
        known = given if how.reproducible or own.candidate is None else own
        trial = Trial(op, place, args, ways_of(candidates, args, thorough), {**own.excluded, **excluded})
        trial.doubted, trial.doubted_before = dict(own.doubted), before
        if known is not None:
            way = known.way(op)
            if way is not None and way.candidate in candidates and way.label not in trial.excluded and not thorough:
                if known.checked or way == op.own:
                    return way, True
                return self._from_table(trial, way, known)
        if how.reproducible:
            return self._first_right(trial)
        return self._measured(trial)

    def _from_table(self, trial: Trial, way: Way, known: TableEntry) -> tuple[Way, bool]:
        """A choice that was made elsewhere, once it is compared with the specification here."""
        self._probe(trial, [way])
        if way not in trial.left or self._faults(trial, way):
            return self._first_right(trial) if mode().reproducible else self._measured(trial)
        if not mode().reproducible:
            self._note(trial.place, replace(known, checked=True, excluded=trial.excluded))
        return way, True

    def _first_right(self, trial: Trial) -> tuple[Way, bool]:
        """The first way in the order of preference that is right here."""
        self._probe(trial, trial.left)
        for way in trial.left:
            if way == trial.op.own or (not way.candidate.measured and not self._faults(trial, way)):
                return way, True
        raise AssertionError("PyTorch's own op takes every call")

    def _measured(self, trial: Trial) -> tuple[Way, bool]:
        """The fastest way that is right here."""
        own = trial.op.own
        self._probe(trial, trial.left)
        machine.synchronize(self.device)  # what went wrong before is no fault of these ways
        # A candidate may be PyTorch's own op under another name, preferred where nothing is measured.
        others = (way for way in trial.left if way.candidate.run is not own.candidate.run)
        right = [*(way for way in others if not self._faults(trial, way)), own]
        seconds = self._seconds(trial, right)
        way = best(seconds, own)
        if trial.uncertain:  # it may be better with more memory or other numbers: chosen for this process alone
            return way, True
        microseconds = {one.label: round(1e6 * time, 2) for one, time in seconds.items()}
        entry = tables.entry_of(way, microseconds, trial.excluded, trial.doubted)
        self._note(trial.place, entry, revised=trial.place in self.table.entries)
        tell = mode().tell
        if tell is not None:
            tell(trial.place, entry)
        return way, True

    def _probe(self, trial: Trial, ways: Sequence[Way]) -> None:
        """Run ways in a child process first, on a GPU never seen before and while tuning."""
        how = mode()
        if not how.probe or not (self.unseen or how.thorough or trial.doubted_before):
            return
        if self._prober is None:
            self._prober = Prober(self.device)
            if self.unseen and not how.thorough:
                say(
                    f"{self.identity['gpu']} is new here: every way to compute an op runs in a process of its own "
                    "first, which takes a minute or more, once (--no-probe, or probe=False, leaves it out)",
                    "new",
                )
        others = [way for way in ways if way != trial.op.own]
        for label, fault in self._prober.faults(trial.op, trial.args, others).items():
            if fault.lasting or label in trial.doubted_before:
                again = " again" if label in trial.doubted_before else ""
                self._exclude(trial, label, f"it fails in a process of its own{again}: {fault.reason}")
            else:
                trial.doubted[label] = fault.reason
                self._settled.add(trial.place)
                say(
                    f"{trial.op.name}: candidate {label!r} is left out for now: {fault.reason}; the next start tries "
                    f"it once more; for {trial.place[1]}",
                    *(trial.op.name, label.partition(" ")[0], "doubted"),
                )
        if self._prober.broken is not None:
            say(f"kernels are not tried in a process of their own, which cannot start: {self._prober.broken}", "probe")

    def _faults(self, trial: Trial, way: Way) -> bool:
        """Whether a way is wrong or fails here, or cannot be compared; it is then excluded."""
        try:
            checker = trial.checker
        except Exception as error:  # PyTorch's own op or the specification: no fault of this way
            if device_is_lost(error):
                raise
            trial.excluded[way.label], trial.uncertain = f"not compared: {reason_of(error)}", True
            if not ran_out_of_memory(error):
                say(f"{trial.op.name}: nothing is compared for {trial.place[1]}: {reason_of(error)}", *trial.place)
            return True
        try:
            fault = checker.fault(way)
            machine.synchronize(self.device)
        except FastsdError:
            raise
        except Exception as error:
            if isinstance(error, Unjudged) or ran_out_of_memory(error):
                trial.excluded[way.label], trial.uncertain = f"not compared: {reason_of(error)}", True
                return True
            if installation_is_incomplete(error):
                trial.excluded[way.label], trial.uncertain = reason_of(error), True
                tell_incomplete(error)
                return True
            if device_is_lost(error):
                self._lost(trial, way, error)
            if way.candidate.measured:
                trial.excluded[way.label] = reason_of(error)
            else:
                self._exclude(trial, way.label, f"it fails on this machine ({reason_of(error)})")
            return True
        if fault is not None:
            self._exclude(trial, way.label, f"it is wrong on {self.identity['gpu']} ({fault})")
        return fault is not None

    def _exclude(self, trial: Trial, label: str, reason: str) -> None:
        trial.excluded[label] = reason
        op, key = trial.place
        name = label.partition(" ")[0]
        say(f"{op}: candidate {label!r} is excluded: {reason}; for {key}", op, name, reason[:24])

    def _lost(self, trial: Trial, way: Way, error: Exception) -> None:
        """The GPU cannot be used by this process any more. The next process shall know why."""
        op, key = trial.place
        reason = f"it faults the GPU: {reason_of(error)}"
        self._note(trial.place, TableEntry(excluded={**trial.excluded, way.label: reason}), revised=True)
        self.save()
        raise FastsdError(
            f"{op}: candidate {way.label!r} faults the GPU ({reason_of(error)}); it is not used again: start once more"
        ) from error

    def _seconds(self, trial: Trial, ways: Sequence[Way]) -> dict[Way, float]:
        """The times of the ways, of which PyTorch's own op is one; of it alone nothing is measured."""
        if len(ways) == 1:
            return {ways[0]: 0.0}
        args = trial.op.copied(trial.args)
        started = time.monotonic()
        if started - self._ended > PAUSE:
            self._spent = 0.0
        samplers = []
        try:
            for way in ways:
                samplers.append(machine.sampler(functools.partial(way.run, args)))
            taken = times(samplers, hurried=self._spent > BUDGET and not mode().thorough)
            return dict(zip(ways, taken, strict=True))
        except RuntimeError as error:
            if device_is_lost(error) and way != trial.op.own:
                self._lost(trial, way, error)
            if not ran_out_of_memory(error):
                raise
            trial.uncertain = True
            return {trial.op.own: 0.0}
        finally:
            machine.release()
            self._ended = time.monotonic()
            self._spent += self._ended - started

    def _note(self, place: Place, entry: TableEntry, revised: bool = False) -> None:
        self.table.entries[place] = entry
        if revised:
            self._revised.add(place)
        self._changed = True
        if time.monotonic() - self._saved > SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """Write the table, if it changed. Where it cannot be written, say so once."""
        with lock:
            if not self._changed:
                return
            self._saved, self._changed = time.monotonic(), False
            try:
                tables.save(self.table, self._revised)
            except OSError as error:
                say(f"the choices cannot be kept in {cache_folder()}: {error.strerror}", "save")

    def close(self) -> None:
        """End the child, and write no more."""
        if self._prober is not None:
            self._prober.close()
        self._changed = False
        atexit.unregister(self.save)
