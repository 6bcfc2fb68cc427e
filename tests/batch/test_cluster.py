"""Batch jobs on Ray, as far as that needs no Ray: what is refused."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cli import refused


def test_what_is_not_there_changes_nothing(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "x"}\n')
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    job = ("batch", "prompts.jsonl", "--out", "out")
    refused(cli(*job, "--ray", f"127.0.0.1:{free}"), f"--ray 127.0.0.1:{free}: no cluster of Ray there: connection")
    for wrong in ("somewhere", "ray://127.0.0.1:10001", "127.0.0.1:x"):
        refused(cli(*job, "--ray", wrong), "it should be HOST:PORT")
    refused(cli(*job, "--ray", "--store", "memory://x"), "it is the memory of one process")
    for flag in ("--workers", "--threads"):
        refused(cli(*job, flag, "2"), f"{flag} is 2; given without --ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(cli(*job, "--ray"), "--ray: it needs ray; pip install 'fastsd[ray]'")
    assert [path.name for path in Path().iterdir()] == ["prompts.jsonl"]
