"""Where a batch job's images go: a folder or a URL; the job goes on from either."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from fastsd.batch.store import FolderStore, Store, UrlStore, open_store
from fastsd.errors import FastsdError
from tests.support.cli import refused


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"file": f"{tmp_path.as_uri()}/job%201", "memory": f"memory://{tmp_path}/job"}[request.param]


def test_what_is_written_is_there(url: str) -> None:
    store: Store = open_store(url)
    assert isinstance(store, FolderStore if url.startswith("file") else UrlStore)
    assert not store.names() and store.lacks(["00000/1.png"]) == {"00000/1.png"}
    store.write("00000/1.png", b"old")
    store.write("00000/1.png", b"new")
    store.write("00001/2.png", b"two")
    assert sorted(store.names()) == ["00000", "00001"]
    assert store.lacks(["00001/2.png", "00000/2.png", "00002/1.png", "00000/1.png"]) == {"00000/2.png", "00002/1.png"}
    path = f"{store.root}/00000/1.png" if isinstance(store, UrlStore) else store.folder / "00000" / "1.png"
    with fsspec.open(f"memory://{path}" if isinstance(store, UrlStore) else path) as file:
        assert file.read() == b"new"


@pytest.mark.parametrize(
    "url, said",
    [
        ("results", "it should be a URL"),
        ("file://other/folder", "it should be file:///folder"),
        ("nothing://x", "Protocol not known"),
    ],
)
def test_a_place_that_is_none(url: str, said: str) -> None:
    with pytest.raises(FastsdError, match=said):
        open_store(url)


@pytest.mark.heavy
def test_a_job_goes_on_in_its_store(cli: Callable, model: Path, url: str) -> None:
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in "abc"))
    words = ("batch", "prompts.jsonl", "--out", "out", "-m", model, "-b", 1, "--store", url)
    ran = cli(*words)
    assert (ran.code, ran.err) == (0, "")
    names = [json.loads(line)["files"][0]["path"] for line in Path("out/manifest.jsonl").read_text().splitlines()[1:]]
    store = open_store(url)
    assert len(names) == 3 and not store.lacks(names) and not list(Path("out").rglob("*.png"))
    if isinstance(store, UrlStore):
        store.files.rm(f"{store.root}/{names[1]}")
    else:
        (store.folder / names[1]).unlink()
    again = cli(*words)
    assert again.code == 0 and "the images of 1 lines that were done are gone" in again.err
    assert len(Path("out/manifest.jsonl").read_text().splitlines()) == 5 and not store.lacks(names)
    refused(cli(*words[:2], "--out", "other", *words[4:]), "--store", "it holds other files")
    refused(cli(*words[:-2]), "it began with another")


def test_an_error_of_the_store_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"memory://{tmp_path}")
    assert isinstance(store, UrlStore)

    class Refused(Exception):
        """As cloud packages have."""

    def refuse(*_: object) -> None:
        raise Refused("no credentials\nand much more")

    monkeypatch.setattr(store.files, "pipe_file", refuse)
    with pytest.raises(FastsdError, match="^--store memory:.*: no credentials$"):
        store.write("00000/1.png", b"x")


@pytest.mark.heavy
def test_a_store_that_another_job_took_meanwhile(cli: Callable, model: Path, url: str) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n')
    words = ("batch", "prompts.jsonl", "-m", model, "--store", url)
    assert cli(*words, "--out", "first").code == 0
    head, _ = Path("first/manifest.jsonl").read_text().splitlines()
    Path("first/manifest.jsonl").write_text(head + "\n")  # as if it had been killed before its first image
    store = open_store(url)
    if isinstance(store, UrlStore):
        store.files.rm(store.root, recursive=True)
    else:
        shutil.rmtree(store.folder)
    assert cli(*words, "--out", "second").code == 0
    image = store.read("00000/00000001.png")
    refused(cli(*words, "--out", "first"), "--store", "it holds the images of another job")
    assert store.read("00000/00000001.png") == image


@pytest.mark.heavy
def test_a_job_without_a_model_has_not_begun(cli: Callable, model: Path, url: str) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n')
    words = ("batch", "prompts.jsonl", "--out", "out", "--store", url, "-m")
    refused(cli(*words, "none-such"), "--model none-such")
    assert not open_store(url).names()
    assert cli(*words, model).code == 0
