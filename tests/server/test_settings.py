from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastsd.cli.parser import Parser
from fastsd.server import settings
from fastsd.server.app import make_app
from fastsd.server.settings import ServerSettings
from tests.support.cli import refused
from tests.support.empty_model import EmptySettings, empty_engine
from tests.support.server import walk

KEY = "a key of some length"


def read(*words: str) -> ServerSettings:
    parser = Parser(prog="fastsd serve")
    settings.add_arguments(parser)
    return settings.read(parser.parse(words))


def test_the_server_is_alone_with_its_machine_by_default() -> None:
    own = read()
    assert (own.host, own.port, own.locked, own.queue, own.drain) == ("127.0.0.1", 7860, False, 32, 30.0)
    assert own.cors == own.hosts == () and own.model is None and own.options == {}
    assert "allow_pickle" not in settings.LOADING


def test_flags_become_settings(tmp_path: Path) -> None:
    words = ("--model", "x.safetensors", "--dtype", "fp16", "--no-graphs", "--vae-tiling", "--lora-dir", str(tmp_path))
    own = read(*words, "--max-body", "3", "--max-images", "2", "--host", "0.0.0.0", "--api-key", KEY)
    assert own.model == "x.safetensors" and own.options == {"dtype": "fp16", "graphs": False} and own.tiling is True
    assert own.limits.body == 3 * 2**20 and own.limits.images == 2 and own.lora_dir == str(tmp_path) and own.locked


def test_the_root_path_has_no_slash_at_its_end_and_is_told_from_every_path_of_the_server() -> None:
    assert [read(*words).root_path for words in ((), ("--root-path", "/"), ("--root-path", "/a/b.c/"))] == [
        "",
        "",
        "/a/b.c",
    ]
    app = make_app(ServerSettings(), empty_engine, EmptySettings())
    assert {route.path.split("/")[1] for route in walk(app.routes)} == set(settings.OWN_PATHS)


def test_names_are_compared_as_browsers_send_them() -> None:
    own = read("--cors", "https://Chat.Example/", "--allow-host", "Images.Example", "--allow-host", "[::2]")
    assert own.cors == ("https://chat.example",) and own.hosts == ("images.example", "[::2]")
    assert read("--host", "[::1]").host == "::1"  # in brackets only where an address is written


def test_a_key_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_API_KEY", KEY)
    assert read("--host", "0.0.0.0").api_key == KEY


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--host", "0.0.0.0"), "--host: 0.0.0.0 can be reached by other machines; it needs --api-key"),
        (("--host", "192.168.1.2"), "it needs --api-key"),
        (("--host", "example.com"), "it needs --api-key"),
        (("--api-key", "short"), "--api-key: 5 characters; it should have at least 12"),
        (("--api-key", ""), "--api-key: 0 characters; it should have at least 12"),
        (("--allow-host", "https://images.example/"), "it should be a name alone, without scheme, port or path"),
        (("--allow-host", "images.example:7860"), "it should be a name alone"),
        (("--user", "ada"), "--user: given without --password"),
        (("--root-path", "fastsd"), "--root-path is 'fastsd'; it should be a path, such as /fastsd"),
        (("--root-path", "/a//b"), "--root-path is '/a//b'; it should be a path"),
        (("--root-path", "/.."), "--root-path is '/..'; it should be a path"),
        (("--root-path", "/a?b"), "--root-path is '/a?b'; it should be a path"),
        (("--root-path", "/v1/images"), "this server has paths of its own that begin so"),
        (("--password", "a very long password"), "--password: given without --user"),
        (("--cors", "*"), "it should be an origin, such as https://chat.example"),
        (("--cors", "https://chat.example/path"), "it should be an origin"),
        (("--port", "70000"), "--port is '70000'; it should be a whole number from 0 to 65535"),
        (("--queue", "0"), "--queue is '0'"),
        (("--drain", "soon"), "--drain is 'soon'"),
        (("--models-dir", "/no/such"), "--models-dir /no/such: no such folder"),
        (("--max-replicas", "2"), "--max-replicas is 2; given without --ray"),
        (("--ray", "--min-replicas", "3"), "--min-replicas is 3; it should be --max-replicas (1) at most"),
        (("--ray", "--root-path", "/x"), "--root-path is '/x'; not supported with --ray"),
        (("--ray", "--port", "0"), "--port is 0; with --ray it should be a number of your choice"),
        (("--allow-pickle",), "--allow-pickle: unknown flag"),
        (("--quue", "3"), "did you mean --queue?"),
        (("--model", "no/such/model"), "--model no/such/model: no such file or folder"),
        (("--dtype", "fp4"), "--dtype is 'fp4'; it should be one of auto, fp32, fp16, bf16, fp8, fp8-emulated"),
    ],
)
def test_bad_flags_are_one_line(cli: Callable[..., Any], words: tuple[str, ...], said: str) -> None:
    refused(cli("serve", *words), said)
