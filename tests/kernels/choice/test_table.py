"""The table of choices: readable, whole or not at all, shared between processes and machines; damaged ones are told."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from fastsd.cli import main
from fastsd.errors import FastsdError
from fastsd.kernels.choice import table as tables
from fastsd.kernels.choice.op import GpuOp, OpCandidate, Way
from fastsd.kernels.choice.table import ChoiceTable, TableEntry, entry_of
from fastsd.kernels.launch.flash_attn import FewKeys, Tile
from fastsd.kernels.launch.flash_attn_gradients import AttentionGradients
from tests.support.played_gpu import IDENTITY
from tests.support.told import told

OP = GpuOp(
    "played_table",
    lambda x: x,
    (
        OpCandidate("triton", lambda x: x, launch_types=(Tile, FewKeys, AttentionGradients)),
        OpCandidate("torch", lambda x: x),
    ),
)
WAYS = [
    Way(OP.candidates[0], Tile(128, 64, 8, 3, True, 128, (64, 0))),
    Way(OP.candidates[0], FewKeys(64, 2, 4, 2, (32, 16), (64, 16))),
    Way(OP.candidates[0], AttentionGradients(Tile(64, 32, 4, 2), Tile(32, 64, 8, 2, parts=(32, 16)), 128)),
    Way(OP.candidates[0]),
    OP.own,
]
PLACES = [("played_table", f"float16 2x{n}x8x40, -, True") for n in range(len(WAYS))]
ENTRIES = {place: entry_of(way, {way.label: 12.34}, {}, {"ours": "it was killed"}) for place, way in zip(PLACES, WAYS)}
TABLE = ChoiceTable(IDENTITY, ENTRIES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "COMMITTED", tmp_path / "committed")
    return tmp_path / "cache"


def test_a_saved_table_loads_exactly(cache: Path) -> None:
    file = tables.save(TABLE)
    loaded = tables.load(IDENTITY)
    assert loaded.entries == ENTRIES
    assert [loaded.entries[place].way(OP) for place in PLACES] == WAYS
    assert file.name.startswith("choices-nvidia-h200-played-") and not list(cache.glob("*.tmp"))


def test_a_cache_that_cannot_be_looked_up_is_an_empty_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a folder that others may not read. Writing to it says why (`GpuChoices.save`)."""
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / ("a" * 300)))
    assert tables.load(IDENTITY).entries == {} and tables.shared(IDENTITY) == {}
    with pytest.raises(OSError, match="too long"):
        tables.save(TABLE)


def test_it_can_be_read_by_people(cache: Path) -> None:
    text = tables.save(TABLE).read_text()
    for value in (*IDENTITY.values(), "fastsd choices 1"):
        assert str(value) in text
    lines = [line for line in text.splitlines() if '"op"' in line]
    assert len(lines) == len(ENTRIES) and '"rows": 128' in text
    assert json.loads(text)["choices"][0]["key"] == PLACES[0][1]


@pytest.mark.parametrize("name", tables.IDENTITY)
def test_other_versions_have_a_file_of_their_own(name: str) -> None:
    other = {**IDENTITY, name: "other"}
    assert tables.table_path(other) != tables.table_path(IDENTITY)
    tables.save(TABLE)
    if name == "gpu":
        assert tables.load(other).entries == {}
    else:
        with told(match=f"measured anew, at their first use: {name} .*, now other") as lines:
            assert tables.load(other).entries == {}
        assert len(lines) == 1
    tables.save(ChoiceTable(other, {}))
    assert tables.load(other).entries == {} and tables.load(IDENTITY).entries == ENTRIES


def edited(text: str) -> str:
    return text.replace('"rows": 128', '"rows": 64')


def changed(name: str, value: object) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), name: value})


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "no table of choices"),
    "open brace": (lambda text: "{", "cut off or damaged"),
    "list": (lambda text: "[]", "no table of choices"),
    "null": (lambda text: "null", "no table of choices"),
    "half": (lambda text: text[: len(text) // 2], "cut off or damaged"),
    "edited": (edited, "damaged: its checksum does not match"),
    "no checksum": (changed("check", None), "damaged: its checksum does not match"),
    "format": (changed("format", "fastsd choices 9"), "its format is 'fastsd choices 9', and this fastsd reads"),
    "another JSON": (lambda text: '{"format": 3}', "no table of choices"),
    "no GPU": (lambda text: "".join(line for line in text.splitlines() if '"gpu"' not in line), "damaged"),
    "choices": (changed("choices", 7), "damaged"),
    "entries": (lambda text: json.dumps({**json.loads(text), "choices": [{}], "check": "0"}), "damaged"),
    "zeros": (lambda text: "\x00" * 100, "no table of choices"),
    "text": (lambda text: "a boat on a lake", "no table of choices"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_table_is_told_in_a_line_and_replaced(kind: str) -> None:
    damage, words = DAMAGE[kind]
    file = tables.save(TABLE)
    file.write_text(damage(file.read_text()))
    with told(match=words) as lines:
        assert tables.load(IDENTITY).entries == {}
    (line,) = lines
    assert str(file) in line and "measured anew" in line and "\n" not in line
    tables.save(TABLE)
    assert tables.load(IDENTITY).entries == ENTRIES


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_to_import_is_an_error_of_one_line(
    kind: str, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = DAMAGE[kind]
    (file := tmp_path / "shared.json").write_text(damage(TABLE.text()))
    assert main(["tune", "--import", str(file)]) == 2
    error = capsys.readouterr().err
    assert words in error and "shared.json" in error and error.count("\n") == 1
    assert not cache.exists()


def test_a_file_that_is_not_there_or_no_text_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image := tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    for file, words in ((tmp_path / "none.json", "no such file"), (tmp_path, "is a directory"), (image, "no table of")):
        assert main(["tune", "--import", str(file)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_a_file_without_an_end_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (large := tmp_path / "large.json").touch()
    os.truncate(large, 2**40)  # of zeros, which take no space
    os.mkfifo(pipe := tmp_path / "pipe.json")  # reading it would wait for ever
    for file, words in ((large, "at most 64 MiB"), (pipe, "no regular file"), (Path("/dev/zero"), "no regular file")):
        assert main(["tune", "--import", str(file)]) == 2
        error = capsys.readouterr().err
        assert words in error and file.name in error and error.count("\n") == 1


def test_what_is_exported_is_imported_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables.save(TABLE)
    assert tables.export(IDENTITY, tmp_path / "shared.json") == len(ENTRIES)
    elsewhere = {**IDENTITY, "torch": "2.14", "driver": "9"}
    assert tables.shared(elsewhere) == {}
    assert main(["tune", "--import", str(tmp_path / "shared.json")]) == 0
    said = capsys.readouterr().out
    assert f"{len(ENTRIES)} choices for NVIDIA H200 (played)" in said and said.count("\n") == 1
    known = tables.shared(elsewhere)
    assert [known[place].way(OP) for place in PLACES] == WAYS
    assert not any(entry.checked for entry in known.values())  # each is compared with the specification there
    assert tables.shared({**elsewhere, "torch": IDENTITY["torch"]}, proven=True).keys() == known.keys()
    assert tables.shared(elsewhere, proven=True) == {}  # kernels of another torch never ran
    assert tables.shared({**IDENTITY, "gpu": "another"}) == {}


def test_nothing_to_export_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="nothing was measured on NVIDIA H200"):
        tables.export(IDENTITY, tmp_path / "shared.json")
    tables.save(TABLE)
    with pytest.raises(FastsdError, match="no such file or folder"):
        tables.export(IDENTITY, tmp_path / "missing" / "shared.json")


def test_committed_tables_hold_for_their_gpu_and_imported_ones_come_first(tmp_path: Path) -> None:
    place = PLACES[0]
    (tmp_path / "committed").mkdir()
    (tmp_path / "committed" / "h200.json").write_text(ChoiceTable(IDENTITY, {place: TableEntry("torch")}).text())
    (tmp_path / "committed" / "bad.json").write_text("{")
    (tmp_path / "shared.json").write_text(ChoiceTable(IDENTITY, {place: TableEntry("triton")}).text())
    with told(match="bad.json: it is cut off or damaged.*; it is not used"):
        assert tables.shared(IDENTITY)[place].candidate == "torch"
    tables.import_file(tmp_path / "shared.json")
    (tmp_path / "committed" / "bad.json").unlink()
    assert tables.shared(IDENTITY)[place].candidate == "triton"
    assert tables.shared(IDENTITY, committed_only=True)[place].candidate == "torch"


def test_the_tables_of_the_package_are_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    files = sorted(tables.COMMITTED.glob("*"))
    assert files, "the folder and its README are part of the package"
    for file in files:
        if file.name != "README.md":
            known = tables.read_file(file)
            assert known.entries and known.text() == file.read_text()


def test_what_another_process_chose_first_stays(cache: Path) -> None:
    place = PLACES[0]
    tables.save(ChoiceTable(IDENTITY, {place: TableEntry("torch")}))
    tables.save(ChoiceTable(IDENTITY, {place: TableEntry("triton"), PLACES[1]: TableEntry("triton")}))
    assert tables.load(IDENTITY).entries[place].candidate == "torch"
    assert tables.load(IDENTITY).entries[PLACES[1]].candidate == "triton"
    tables.save(ChoiceTable(IDENTITY, {place: TableEntry("triton")}), revised={place})
    assert tables.load(IDENTITY).entries[place].candidate == "triton"


def save_some(n: int) -> None:
    for i in range(10):
        tables.save(ChoiceTable(IDENTITY, {("op", f"{n} {i}"): TableEntry("torch")}))


def test_processes_that_write_at_the_same_time_lose_nothing(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=save_some, args=(n,)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(tables.load(IDENTITY).entries) == 30


def test_a_failed_write_leaves_the_old_table(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    tables.save(TABLE)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            tables.save(ChoiceTable(IDENTITY, {("op", "key"): TableEntry("torch")}))
    assert tables.load(IDENTITY).entries == ENTRIES and not list(cache.glob(".fastsd*"))


def test_an_entry_keeps_its_fields() -> None:
    entry = TableEntry("torch", None, {"torch": 1.5}, True, {"triton": "it is wrong"})
    place = ("op", "key")
    assert ChoiceTable.read(ChoiceTable(IDENTITY, {place: entry}).text()).entries == {place: entry}
    assert asdict(entry)["excluded"] == {"triton": "it is wrong"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"op": 1},
        {"candidate": 5},
        {"launch": "abc"},
        {"checked": "yes"},
        {"microseconds": [1]},
        {"microseconds": {"torch": "fast"}},
        {"excluded": None},
        {"excluded": ["ours"]},
    ],
    ids=str,
)
def test_a_table_whose_checksum_is_right_and_whose_choices_are_none_is_refused(wrong: dict[str, object]) -> None:
    choices = [{"op": "linear", "key": "k", **wrong}]
    with pytest.raises(FastsdError, match="cut off or damaged"):
        ChoiceTable.read(signed(choices, {}))


@pytest.mark.parametrize("name", ["", "a" * 400, ["a"], None], ids=lambda name: str(name)[:4])
def test_a_table_whose_gpu_cannot_name_a_file_is_refused(name: object) -> None:
    assert ChoiceTable.read(signed([{"op": "linear", "key": "k"}], {})).entries
    with pytest.raises(FastsdError, match="cut off or damaged"):
        ChoiceTable.read(signed([{"op": "linear", "key": "k"}], {"gpu": name}))


def test_a_file_of_brackets_alone_is_refused() -> None:
    with pytest.raises(FastsdError, match="no table of choices"):
        ChoiceTable.read("[" * 100_000)


def signed(choices: list[dict[str, object]], head: dict[str, object]) -> str:
    """A file with these choices, and a checksum that matches."""
    check = tables._checksum([json.dumps(one) for one in choices])
    identity = dict.fromkeys(tables.IDENTITY, "x")
    return json.dumps({"format": tables.FORMAT, **identity, **head, "check": check, "choices": choices})
