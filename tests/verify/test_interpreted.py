"""Every Triton kernel passes in the interpreter."""

from __future__ import annotations

import pytest

from fastsd.verify.interpreted import DTYPES, check_in_interpreter
from tests.support.verification import failures


@pytest.mark.heavy
def test_every_kernel_passes() -> None:
    pytest.importorskip("triton", reason="no Triton for this platform")
    results = check_in_interpreter()
    assert {"advance", "geglu", "groupnorm_silu", "layernorm"} <= {result.name for result in results}
    for name, way in (("layernorm", "ahead"), ("layernorm", "owed"), ("groupnorm_silu", "ahead")):
        assert any(way in result.shape.split() for result in results if result.name == name), (name, way)
    assert {result.backend for result in results} == {"triton"}
    assert {result.note for result in results} == set(DTYPES)
    assert not failures(results) and all(result.passed for result in results)
