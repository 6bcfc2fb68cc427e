"""Observe every op that the models call, with its arguments, while a pipeline runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastsd import kernels
from fastsd.kernels.choice.call import Call, Op


@functools.cache
def ops() -> dict[str, Op]:
    """Every op in `fastsd.kernels`: each function with an `<op>_ref` in the same module."""
    by_name = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        if info.ispkg:
            continue
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for name, reference in vars(module).items():
            stem = name.removesuffix("_ref")
            if stem != name and getattr(reference, "__module__", "") == module.__name__ and hasattr(module, stem):
                by_name[stem] = Op(stem, getattr(module, stem))
    return by_name


def has_kernel(op: str) -> bool:
    """Whether a Triton kernel computes `op`, at least in part."""
    return importlib.util.find_spec(f"{kernels.__name__}.triton.{op}") is not None


@contextmanager
def observed(on_call: Callable[[Call], Any]) -> Iterator[None]:
    """Inside this context `on_call` receives every op call of fastsd's modules, before it runs.

    Calls between ops, and calls by `on_call` itself, are not observed. Not thread-safe: the context replaces the ops in
    the namespaces of the modules.
    """
    inside = False

    def replacement(op: Op) -> Callable[..., Any]:
        @functools.wraps(op.run)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return op.run(*args, **kwargs)
            inside = True
            try:
                on_call(Call.bind(op, *args, **kwargs))
                return op.run(*args, **kwargs)
            finally:
                inside = False

        return run

    replacements = {op.run: replacement(op) for op in ops().values()}
    bindings = [
        (module, name, value)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("fastsd.") and module_name != __name__
        for name, value in list(vars(module).items())
        if inspect.isfunction(value) and value in replacements
    ]
    try:
        for module, name, value in bindings:
            setattr(module, name, replacements[value])
        yield
    finally:
        for module, name, value in bindings:
            setattr(module, name, value)
