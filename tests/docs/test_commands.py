"""Every command of fastsd on a page runs and ends with exit code 0, or this file says why it does not run.

A page's commands run from top to bottom in one folder, in which everything that they name exists
(`tests/support/page_files.py`), by tiny random models or by the bundled one.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from fastsd.cli import COMMANDS, command_module, flags, main
from fastsd.cli.parser import Parser
from tests.support import page_files
from tests.support.pages import PAGES, SHELL, blocks, commands, is_command, page_name
from tests.support.project import ROOT, tomllib

# Not run, only read by the real parser: the command, or a flag in it, and why.
NOT_RUN = {
    "--ray": "needs a cluster of Ray; tests/batch has what needs none",
    "serve": "stays up until it is stopped; tests/server starts it",
    "torchrun": "several processes; tests/train/test_processes.py starts them",
    "tune": "needs a GPU",
    "verify": "takes minutes in Triton's interpreter; tests/verify runs its parts",
}
# What a run takes beside the page's own words, so that it is over in a second: by command, "" for generating an image.
# A flag that stands on the page is left as it is.
SHORT = {
    "": {"--steps": "2", "--width": "64", "--height": "64"},
    "evaluate": {"--count": "10", "--reference": "50", "--bootstrap": "0", "--settings": "steps=2"},
    "compare": {"--count": "10", "--reference": "50", "--bootstrap": "0"},
}
SIZED = ("--image", "--depth", "--control-image", "--control-canny", "--control-color", "--from-image")  # by an image
# The same for a training: values of its config, and of each of its stages, as far as it has them.
SHORT_TRAINING = {"data.limit": "64", "data.passes": "1", "data.resolution": "64"}
SHORT_STAGE = {"fit.steps": "2", "fit.batch_size": "4", "sample.steps": "2", "pairs.count": "8", "pairs.steps": "2"}
# Notes that a page's reader is right to get; another one says that the command does not do what the page promises.
NOTES = ("few-step model (", "repeated by the rules of A1111", "the model was trained at 64x64; at 320x64")
WITH_COMMANDS = [page for page in PAGES if commands(page)]


def words_of(line: str) -> list[str]:
    """The words after the program's name. Of optional flags in brackets, all are given."""
    line = re.sub(r"[\[\]](?=--|$)|\](?= )", "", line) if "[--" in line else line
    words = shlex.split(line, comments=True)
    return words[words.index("fastsd") + 1 :]


def why_not_run(line: str) -> str | None:
    """The reason of `NOT_RUN`, if the command is in it."""
    words = words_of(line)
    named = {line.split()[0], words[0], *(word for word in words if word.startswith("--"))}
    return next((reason for word, reason in NOT_RUN.items() if word in named), None)


def read(words: list[str]) -> None:
    """What the program does with its words before it loads anything: the flags exist, and their values are valid."""
    if words[0].startswith("-"):
        flags.parse(flags.make_parser(COMMANDS), words)
        return
    parser = Parser(prog=words[0])
    command_module(words[0]).add_arguments(parser)
    parser.parse(words[1:])


def shortened(words: list[str]) -> list[str]:
    """The words of a command, and those of `SHORT` or `SHORT_TRAINING`."""
    command = "" if words[0].startswith("-") else words[0]
    if command == "train":
        config = tomllib.loads(Path(words[words.index("--config") + 1]).read_text(encoding="utf-8"))
        values = dict(SHORT_TRAINING)
        for stage, table in config.items():
            if isinstance(table, dict) and "fit" in table:
                values |= {f"{stage}.{key}": value for key, value in SHORT_STAGE.items() if key.split(".")[0] in table}
        return words + [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    if command == "compare" and words[1].endswith(".json"):  # reports, beside which flags of models are refused
        return words
    more = {flag: value for flag, value in SHORT.get(command, {}).items() if flag not in words}
    if any(flag in words for flag in SIZED):
        more = {flag: value for flag, value in more.items() if flag not in ("--width", "--height")}
    return words + [word for pair in more.items() for word in pair]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    page_files.write(folder)
    return folder


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=page_name)
def test_commands_are_read(page: Path) -> None:
    for line in commands(page):
        try:
            read(words_of(line))
        except Exception as error:
            raise AssertionError(f"{page_name(page)}: {line}") from error


@pytest.mark.heavy
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=page_name)
def test_commands_run(
    page: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(files, tmp_path, symlinks=True, dirs_exist_ok=True, copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    for written in re.findall(r" --out (\S+)", "\n".join(commands(page))):
        shutil.rmtree(written, ignore_errors=True)  # another page reads it, this one makes it
    for line in commands(page):
        if why_not_run(line):
            continue
        code = main(shortened(words_of(line)))
        said = capsys.readouterr().err
        where = f"{page_name(page)}: {line}\n{said}"
        assert code == 0, (
            f"this command fails: {where}\n"
            "What it names must exist: add it to a table of tests/support/page_files.py, or make it by a command above."
            " What takes more than a second or two goes into SHORT; what cannot run, into NOT_RUN, with the reason."
        )
        notes = [text for text in said.splitlines() if text.startswith("note: ")]
        surprising = [text for text in notes if not text.removeprefix("note: ").startswith(NOTES)]
        assert not surprising, f"a note that is not in NOTES: {where}"


def test_every_reason_is_needed() -> None:
    found = {why_not_run(line) for page in WITH_COMMANDS for line in commands(page)} - {None}
    assert found == set(NOT_RUN.values())


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_no_command_is_misspelt(page: Path) -> None:
    """A line that begins with an interpreter and names fastsd, but is none of its commands, no test above reads."""
    lines = [line.strip() for text in blocks(page, SHELL) for line in text.splitlines()]
    starts = [line for line in lines if re.match(r"(\w+=\S+ )*python\S* .*\bfastsd\b", line)]
    assert [line for line in starts if not is_command(line) and "-m pip " not in line] == []


def test_pages_with_commands_are_found() -> None:
    """Were none found, nothing above would fail."""
    names = {page_name(page) for page in WITH_COMMANDS}
    assert names >= {"README.md", "prompts.md", "checkpoints.md", "training.md", "show.md"}
    assert 'python -m fastsd --prompt "a thick eight slanted right" --count 4 --seed 7' in commands(ROOT / "README.md")
