"""The lines of a batch job's file, as they are asked for: JSON Lines, CSV or Parquet, one line at a time.

A line that cannot be read is a `BadLine` among the others, so that it costs none of them. A file of a million lines
takes the memory of one, or of one group of Parquet's.
"""

from __future__ import annotations

import csv
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastsd.cli.flags import flag_of
from fastsd.cli.parser import one_line
from fastsd.errors import FastsdError, describe, nearest
from fastsd.files import reason
from fastsd.parameters import PARAMETERS, of_call
from fastsd.parameters.kinds import Whole

MAX_LINE = 2**20  # bytes of a line of JSON; a prompt has at most 100,000 characters
PARQUET_ROWS = 1024  # read at a time
ID = "id"  # a text of the user's own, which the manifest repeats
UPSCALE = "upscale"  # how the image is enlarged once it is there
_WHOLE_AS_FLOAT = re.compile(r"\s*([+-]?\d+)\.0*\s*", re.A)  # as pandas writes a column that has empty cells
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class AskedLine:
    """One line: its number, from 1, and its fields."""

    number: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class BadLine:
    """A line that asks for nothing: its number, what is wrong with it, and its fields where they were read."""

    number: int
    error: FastsdError
    fields: dict[str, Any] | None = None

    @property
    def said(self) -> str:
        """What is wrong, by the names of the fields and the job's flags."""
        return one_line(describe(self.error, _field_or_flag))


def _field_or_flag(argument: str) -> str:
    name = argument.partition("[")[0].partition(".")[0]  # controls[0].weight, upscale.scale
    row = PARAMETERS.get(name)
    return argument if name == UPSCALE or (row is not None and row.of == "call") else flag_of(argument)


def read_lines(path: Path) -> Iterator[AskedLine | BadLine]:
    """The lines of a file, by the ending of its name.

    Raises:
        FastsdError: no such file, an ending that is none of these, a column that is no parameter.
    """
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in SUFFIXES:
        raise FastsdError(f"the file should end in {', '.join(SUFFIXES)}", argument="prompts", path=path)
    try:
        yield from map(_storable, readers.get(path.suffix.lower(), _read_jsonl)(path))
    except OSError as error:
        raise FastsdError(reason(error), argument="prompts", path=path) from error


def _storable(line: AskedLine | BadLine) -> AskedLine | BadLine:
    """The line; a bad one without fields where the manifest, which is JSON in UTF-8, cannot hold them."""
    for name, value in (line.fields or {}).items():
        try:
            json.dumps({name: value}, allow_nan=False, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            error = FastsdError("the text is not valid UTF-8", argument=name.encode(errors="replace").decode())
        except ValueError:
            error = FastsdError("it should be a finite number", argument=name)
        except TypeError:
            error = FastsdError("it should be a text, a number, true, false, a list or an object", argument=name)
        else:
            continue
        return BadLine(line.number, error)
    return line


def _read_jsonl(path: Path) -> Iterator[AskedLine | BadLine]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            if len(raw) > MAX_LINE:
                _skip_rest(file, raw)
                yield BadLine(number, FastsdError(f"it is longer than {MAX_LINE} bytes"))
            elif raw.strip(b"\xef\xbb\xbf \t\r\n"):
                yield _parse(number, raw)


def _skip_rest(file: BinaryIO, raw: bytes) -> None:
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(MAX_LINE)


def _parse(number: int, raw: bytes) -> AskedLine | BadLine:
    try:
        found = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        return BadLine(number, FastsdError("the text is not valid UTF-8"))
    except json.JSONDecodeError as error:
        return BadLine(number, FastsdError(f"not JSON: {error.msg} at character {error.pos + 1}"))
    except (ValueError, RecursionError) as error:
        return BadLine(number, FastsdError(f"not JSON: {error}"))
    if not isinstance(found, dict):
        return BadLine(number, FastsdError('it should be an object, such as {"prompt": "a lighthouse"}'))
    return AskedLine(number, found)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _read_csv(path: Path) -> Iterator[AskedLine | BadLine]:
    """A header of parameters, then a line each; an empty cell is not given. Bytes that are no UTF-8 stay recognisable
    (surrogates), so that the line that holds them is named."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        feed = (line for line in file)
        reader = csv.reader(feed)
        names = next(reader, [])
        for separator, said in ((";", "';'"), ("\t", "tabs")):
            if len(names) == 1 and separator in names[0]:
                raise FastsdError(
                    f"its columns are separated by {said}; commas are read", argument="prompts", path=path
                )
        _check_columns(names, path)
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadLine(number, FastsdError(f"not CSV: {error}"))
                continue
            # The reader asks for more lines than there are inside quotes alone.
            if inspect.getgeneratorstate(feed) == inspect.GEN_CLOSED:
                opened = reader.line_num - cells[-1].count("\n") + cells[-1].endswith("\n")
                message = f"the quote that opens in line {opened} is not closed; the rest of the file is in it"
                yield BadLine(number, FastsdError(message))
            elif cells:
                yield _parse_cells(number, names, cells)


def _parse_cells(number: int, names: list[str], cells: list[str]) -> AskedLine | BadLine:
    if len(cells) > len(names):
        return BadLine(number, FastsdError(f"it has {len(cells)} cells and the header {len(names)}"))
    given = {name: cell for name, cell in zip(names, cells, strict=False) if cell != ""}
    fields: dict[str, Any] = {}
    for name, cell in given.items():
        try:
            fields[name] = cell if name == ID else _value_of(name, cell)
        except FastsdError as error:
            return BadLine(number, error, dict(given))
    return AskedLine(number, fields)


def _value_of(name: str, cell: str) -> Any:
    """What a cell stands for; lists and objects are JSON in it."""
    if name == UPSCALE:
        return _json_of(name, cell)
    row = PARAMETERS[name]
    if isinstance(row.default, bool) or row.kind.stored is bool:
        words = {"true": True, "false": False, "1": True, "0": False}
        if cell.strip().lower() not in words:
            raise FastsdError("it should be true or false", argument=name, value=cell)
        return words[cell.strip().lower()]
    if cell.lstrip()[:1] in ("[", "{") and name not in ("prompt", "negative_prompt"):
        return _json_of(name, cell)
    if isinstance(row.kind, Whole) and (written := _WHOLE_AS_FLOAT.fullmatch(cell)):
        return row.parse(written[1])
    return row.parse(cell)


def _json_of(name: str, cell: str) -> Any:
    try:
        return json.loads(cell, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise FastsdError("it should be JSON", argument=name, value=cell) from None


def _read_parquet(path: Path) -> Iterator[AskedLine | BadLine]:
    """A column a parameter; a null is not given. Lines are its rows, from 1."""
    path.stat()  # a missing file is said as any other
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise FastsdError("Parquet needs pyarrow: pip install 'fastsd[batch]'", argument="prompts", path=path) from None
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, path)
            number = 0
            for rows in file.iter_batches(PARQUET_ROWS):
                for fields in rows.to_pylist():
                    number += 1
                    yield AskedLine(number, {name: value for name, value in fields.items() if value is not None})
    except pyarrow.ArrowException as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FastsdError(f"not Parquet that can be read: {said}", argument="prompts", path=path) from error


def _check_columns(names: list[str], path: Path) -> None:
    """Refuse a table whose columns are no parameters: each line would be wrong for the same reason."""
    known = {row.name for row in of_call()} | {ID, UPSCALE}
    for name in names:
        if name not in known:
            wrong = f"the column {name[:60]!r} is no parameter of a call{nearest(name, known)}"
            raise FastsdError(wrong, argument="prompts", path=path)
        if names.count(name) > 1:
            raise FastsdError(f"the column {name!r} stands twice", argument="prompts", path=path)
    if "prompt" not in names:
        raise FastsdError("there is no column prompt", argument="prompts", path=path)
