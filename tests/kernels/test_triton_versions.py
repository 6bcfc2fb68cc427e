"""The oldest Triton that the package allows: `make test` puts it into a folder, where every kernel is compiled with it.

`tests/bench/test_dryrun_ways.py` compiles them.
"""

from __future__ import annotations

from fastsd.kernels import dispatch
from tests.support.project import OLDEST_TRITON, TRITON_FOLDER, dry_run


def test_make_puts_the_oldest_triton_where_this_looks_for_it() -> None:
    installs = [line for line in dry_run("test") if "triton==" in line]
    assert len(installs) == 1 and f"triton=={OLDEST_TRITON};" in installs[0]
    assert f"--target .venv/{TRITON_FOLDER.name}.part" in installs[0]


def test_the_bounds_are_the_same_everywhere() -> None:
    assert ".".join(map(str, dispatch.OLDEST_TRITON)) == OLDEST_TRITON
