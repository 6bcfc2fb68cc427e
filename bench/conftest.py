"""`pytest bench/` checks every benchmark once, in small; `pytest bench/ --benchmark` measures. See bench/README.md."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.measure import Outcome
from bench.session import Session, check_options
from fastsd.errors import FastsdError

# What --budget runs first. A file that is not listed comes last.
ORDER = ("bench_parts", "bench_images", "bench_ways", "bench_kinds", "bench_cold", "bench_kernels")
OPTIONS = {
    "--models": "families to measure: sd15, sd21, sdxl, digits (default: sd15,sdxl,sd21,digits; on a CPU sd15,digits)",
    "--batch": "pictures drawn together (default 1,4,8; on a CPU 1)",
    "--size": "pixels of a side (default: what the model was trained at)",
    "--steps": "denoising steps of a picture (default 20,30,50; on a CPU 4)",
    "--dtype": "fp32, fp16, bf16 (default: what fastsd takes on this device)",
    "--peers": "pytorch, diffusers, diffusers-channels-last, diffusers-compiled, none",
    "--budget": "seconds; the most important first, what does not fit is listed as not run",
    "--model": "a folder with real weights instead of random ones",
    "--results": "the result file (default bench/results/<gpu or cpu>/<date>-<commit>.json)",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastsd benchmarks")
    group.addoption("--benchmark", action="store_true", help="measure; without it every benchmark runs once, tiny")
    group.addoption("--profile", action="store_true", help="also write a profile of each network's step")
    for name, text in OPTIONS.items():
        group.addoption(name, default=None, help=text)


def pytest_configure(config: pytest.Config) -> None:
    names = ["benchmark", "profile", *(name.lstrip("-") for name in OPTIONS)]
    try:
        options = check_options({name: config.getoption(name) for name in names})
    except FastsdError as error:
        pytest.exit(f"error: {error}", returncode=2)
    config.stash[SESSION] = Session(options)
    if options.measuring and options.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # for peers; fastsd has its convolutions chosen by itself
    if not options.measuring and config.pluginmanager.hasplugin("benchmark"):
        config.option.benchmark_disable = True


SESSION = pytest.StashKey[Session]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.stash[SESSION].options
    axes = {"model": options.models, "batch": options.batches, "steps": options.steps, "dtype": options.dtypes}
    for name, values in axes.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=[str(v).removeprefix("torch.") for v in values], scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(ORDER)}
    here = [item for item in items if item.path.parent.name == "bench" and item.path.stem.startswith("bench_")]
    if not here:
        return
    options = here[0].config.stash[SESSION].options

    def place(item: pytest.Item) -> tuple[int, int, int]:
        """Model by model and dtype by dtype, since only one is kept in memory; then by importance."""
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        model, dtype = chosen.get("model"), chosen.get("dtype")
        return (
            options.models.index(model) if model in options.models else len(options.models),
            options.dtypes.index(dtype) if dtype in options.dtypes else len(options.dtypes),
            rank.get(item.path.stem, len(rank)),
        )

    ordered = iter(sorted(here, key=place))
    chosen = set(here)
    items[:] = [next(ordered) if item in chosen else item for item in items]


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]


@pytest.fixture(autouse=True)
def within_budget(request: pytest.FixtureRequest, bench: Session) -> Iterator[None]:
    """Skips what the budget leaves no time for; gives back the memory of what ran out of it, before the next."""
    if bench.remaining() <= 0:
        bench.not_run.append(request.node.name)
        pytest.skip("not run: the budget is spent")
    yield
    if bench.options.device.type == "cuda":
        gc.collect()
        with contextlib.suppress(RuntimeError):  # a GPU that answers no more
            torch.cuda.empty_cache()


@pytest.fixture
def replay(request: pytest.FixtureRequest, bench: Session) -> Callable[[list[Outcome]], None]:
    """Hand the first candidate's samples to pytest-benchmark, so that its own options and files know them.

    The contest has measured already, its candidates in turn; pytest-benchmark's clock then reads out those times.
    """

    def hand_over(outcomes: list[Outcome]) -> None:
        samples = outcomes[0].samples
        if not samples or not request.config.pluginmanager.hasplugin("benchmark"):
            return
        readings = _readings(samples)
        request.node.add_marker(pytest.mark.benchmark(timer=lambda: next(readings)))
        benchmark = request.getfixturevalue("benchmark")
        medians = {o.name: o.spread.median if o.spread else o.problem for o in outcomes}
        benchmark.extra_info.update(medians)
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)

    return hand_over


def _readings(samples: list[float]) -> Iterator[float]:
    """A clock's readings at the start and end of each sample."""
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
