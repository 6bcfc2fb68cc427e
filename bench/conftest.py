"""`pytest bench/` runs every benchmark once as a check; `pytest bench/ --benchmark` measures. See bench/README.md."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import options
from bench.measure import Outcome
from bench.session import Session
from fastsd.errors import FastsdError

# The order of importance, for --budget. A file that is not listed comes last.
ORDER = ("bench_denoise", "bench_parts", "bench_images", "bench_modes", "bench_kinds", "bench_cold", "bench_kernels")
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastsd benchmarks")
    for name, text in options.SWITCHES.items():
        group.addoption(f"--{name}", action="store_true", help=text)
    for name, text in options.HELP.items():
        group.addoption(f"--{name}", default=None, help=text)


def pytest_configure(config: pytest.Config) -> None:
    try:
        parsed = options.parse(**{name: config.getoption(name) for name in (*options.HELP, *options.SWITCHES)})
    except FastsdError as error:
        pytest.exit(f"error: {error}", returncode=2)
    config.stash[SESSION] = Session(parsed)
    if parsed.measuring and parsed.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # for the peers; fastsd selects its convolutions itself
    if not parsed.measuring and config.pluginmanager.hasplugin("benchmark"):
        config.option.benchmark_disable = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parsed = metafunc.config.stash[SESSION].options
    axes = {"model": parsed.models, "batch": parsed.batches, "steps": parsed.steps, "dtype": parsed.dtypes}
    for name, values in axes.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=[str(v).removeprefix("torch.") for v in values], scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(ORDER)}
    benchmarks = [item for item in items if item.path.parent.name == "bench" and item.path.stem.startswith("bench_")]
    if not benchmarks:
        return
    parsed = benchmarks[0].config.stash[SESSION].options

    def position(item: pytest.Item) -> tuple[int, int, int]:
        """By model and dtype first, since only one model stays in memory; then by importance."""
        params = item.callspec.params if hasattr(item, "callspec") else {}
        model, dtype = params.get("model"), params.get("dtype")
        return (
            parsed.models.index(model) if model in parsed.models else len(parsed.models),
            parsed.dtypes.index(dtype) if dtype in parsed.dtypes else len(parsed.dtypes),
            rank.get(item.path.stem, len(rank)),
        )

    ordered = iter(sorted(benchmarks, key=position))
    selected = set(benchmarks)
    items[:] = [next(ordered) if item in selected else item for item in items]


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]


@pytest.fixture(autouse=True)
def within_budget(request: pytest.FixtureRequest, bench: Session) -> Iterator[None]:
    """Skip the benchmark if the budget is spent; afterwards free GPU memory, also after running out of it.

    A process of diffusers under torch.compile runs no benchmark that captures graphs of ours.
    """
    if bench.options.compiled_alone and request.path.stem not in ("bench_parts", "bench_images"):
        pytest.skip(f"a process with {options.COMPILED} measures nothing else")
    if bench.remaining() <= 0:
        bench.not_run.append(request.node.name)
        pytest.skip("not run: the budget is spent")
    yield
    if bench.options.device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):  # the GPU no longer responds
            torch.cuda.empty_cache()


@pytest.fixture
def publish(request: pytest.FixtureRequest, bench: Session) -> Callable[[list[Outcome]], None]:
    """Pass the samples of the first candidate to pytest-benchmark, for its own options and files.

    The candidates have been timed in turns by then. pytest-benchmark gets a clock that replays those samples.
    """

    def pass_on(outcomes: list[Outcome]) -> None:
        samples = outcomes[0].samples
        if not samples or not request.config.pluginmanager.hasplugin("benchmark"):
            return
        readings = _readings(samples)
        request.node.add_marker(pytest.mark.benchmark(timer=lambda: next(readings)))
        benchmark = request.getfixturevalue("benchmark")
        medians = {o.name: o.spread.median if o.spread else o.problem for o in outcomes}
        benchmark.extra_info.update(medians)
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)

    return pass_on


def _readings(samples: list[float]) -> Iterator[float]:
    """The readings of a clock at the start and the end of each sample."""
    now = 0.0
    for seconds in samples:
        yield now
        now += seconds
        yield now


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if not session.options.measuring:
        return
    terminalreporter.section("fastsd benchmarks")
    for table in session.tables:
        terminalreporter.write_line(table)
    for name in session.not_run:
        terminalreporter.write_line(f"not run, the budget of {session.options.budget:g} s was spent: {name}")
    if session.written:
        session.results.data["not_run"] = session.not_run
        session.results.write()
        terminalreporter.write_line(f"written to {session.written}")
