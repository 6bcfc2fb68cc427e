"""The command line: `fastsd --prompt "..."`, `fastsd train ...`, `fastsd evaluate ...`."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from fastsd.cli import flags
from fastsd.cli.parser import Parser, one_line
from fastsd.cli.said import UnsaidError, checked_output, silence
from fastsd.errors import FastsdError, describe
from fastsd.files import reason
from fastsd.parameters import nearest

# A command is the module of that name, in fastsd or, for those in BESIDE, in fastsd.cli; or the one that CALLED names.
# It has add_arguments(parser) and run(args), may have elsewhere() (see `Parser`), and is imported when it is called.
COMMANDS = {
    "batch": "what each line of a file asks for; goes on after a kill",
    "serve": "a web page, and the APIs of A1111 and OpenAI",
    "mcp": "tools for an assistant: generate an image, edit one",
    "upscale": "enlarge images by an ESRGAN",
    "data": "make a data set to train on: emoji",
    "train": "train a model from a config file",
    "evaluate": "measure how good a model's images are",
    "compare": "two models or settings, side by side and in figures",
    "show": "what happens inside: noise, steps, attention, latents",
    "inspect": "what a model file is: family, prediction, keys, hashes",
    "convert": "between folder and single file, or precisions",
    "verify": "prove on this machine that the fast path is right",
    "tune": "measure launches on this GPU and use the best",
}
BESIDE = ("inspect", "convert", "upscale")
CALLED = {"compare": "evaluate.comparison", "serve": "server", "mcp": "server.mcp"}  # modules of another name
UNSAID, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; None for the process's own.

    Returns:
        The exit code: 0, or 2 for bad input with one line on stderr (`FASTSD_DEBUG=1` shows the traceback too), or 130
        after Ctrl-C, or 1 where standard output cannot be written, and where a command says so. A mistake in fastsd
        itself is an exception, and stays one.
    """
    with checked_output():
        return _exit_code(list(sys.argv[1:] if argv is None else argv))


def _exit_code(words: list[str]) -> int:
    """`main`, with streams that can be written to or say why not."""
    try:
        try:
            code = _run(words)
        except SystemExit as stop:  # --help and --version
            code = stop.code if isinstance(stop.code, int) else 0
        sys.stdout.flush()
        return code
    except FastsdError as error:
        return _complain(describe(error, flags.flag_of))
    except MemoryError:
        return _complain("not enough memory; close other programs, or ask for smaller or fewer images")
    except KeyboardInterrupt:
        print("fastsd: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (UnsaidError, BrokenPipeError) as error:
        silence()
        if isinstance(error, UnsaidError) and not isinstance(error.error, BrokenPipeError):  # else its reader has gone
            _complain(f"standard output cannot be written: {reason(error.error)}")
        return UNSAID


def _run(words: list[str]) -> int:
    """Run the command that the first word names; without one, generate."""
    if not words or words[0].startswith("-"):
        if "--help-all" in words:
            print(flags.make_parser(COMMANDS, everything=True).format_help(), end="")
            return 0
        from fastsd.cli.generate import generate

        return generate(flags.parse(flags.make_parser(COMMANDS), words))
    if words[0] not in COMMANDS:
        raise FastsdError(
            f'{words[0]!r} is no command{nearest(words[0], COMMANDS)}; to generate an image: fastsd --prompt "..."'
        )
    command = command_module(words[0])
    elsewhere: dict[str, str] = getattr(command, "elsewhere", dict)()
    parser = Parser(elsewhere, prog=f"fastsd {words[0]}", description=COMMANDS[words[0]])
    command.add_arguments(parser)
    return command.run(parser.parse(words[1:])) or 0


def command_module(name: str) -> Any:
    """The module of a command."""
    module = CALLED.get(name, name)
    return importlib.import_module(f"fastsd.{'cli.' if module in BESIDE else ''}{module}")


def _complain(message: str) -> int:
    """One line on stderr, after the traceback where FASTSD_DEBUG asks for it."""
    if os.environ.get("FASTSD_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    print(f"fastsd: error: {one_line(message)}", file=sys.stderr)
    return BAD_INPUT
