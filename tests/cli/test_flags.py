"""The flags: limits, help, unknown words."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastsd
from fastsd.cli import COMMANDS, command_module, flags, main
from fastsd.cli.parser import Parser, one_line
from fastsd.errors import FastsdError, describe
from fastsd.sampling.samplers import RARE, SAMPLERS, SCHEDULES
from tests.support.cli import refused, settings, write_image


def help_text(columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return flags.make_parser(COMMANDS).format_help()


@pytest.mark.parametrize("columns", [80, 100])
def test_help_fits_two_screens(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = help_text(columns, monkeypatch).splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= columns


def test_help_names_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(help_text(100, monkeypatch).split())
    assert all(f" {name} " in f"{text} " for name in (*SAMPLERS, *SCHEDULES) if name not in RARE)
    long = " ".join(flags.make_parser(COMMANDS, everything=True).format_help().split())
    assert all(f" {name} " in f"{long} " for name in (*SAMPLERS, *SCHEDULES)) and {*SAMPLERS, *SCHEDULES} >= RARE
    assert "examples:" in text and all(f"fastsd {command}" in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_model_has_its_short_flag_in_every_command(command: str) -> None:
    parser = Parser(prog=command)
    command_module(command).add_arguments(parser)
    named = [action.option_strings for action in parser._actions if "--model" in action.option_strings]
    assert all("-m" in names for names in named)


def test_rare_flags_are_in_the_long_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--help-all"]) == 0
    long, short = capsys.readouterr().out, help_text(80, monkeypatch)
    assert all(f"{row.flag}" in long for row in flags.known())
    assert "--help-all" in short and "--ensd" in long and "--ensd" not in short


def test_every_example_in_help_parses() -> None:
    import shlex

    for line in flags.EXAMPLES.splitlines()[1:]:
        program, *words = shlex.split(line)
        assert program == "fastsd" and flags.make_parser({}).parse(words)


def test_aliases_mean_the_same() -> None:
    parse = flags.make_parser({}).parse
    for one, other in (
        ("-p x", "--prompt x"),
        ("-n x", "--negative-prompt x"),
        ("-m x", "--model x"),
        ("-W 64 -H 8", "--width 64 --height 8"),
        ("-s 1", "--seed 1"),
        ("-b 2", "--batch-size 2"),
        ("-o x", "--output x"),
        ("--cfg-scale 3", "--guidance 3"),
        ("--sampling-method x", "--sampler x"),
        ("--init-img x", "--image x"),
    ):
        assert parse(one.split()) == parse(other.split()) != parse([])


BAD = [
    *[("--steps", value) for value in ("0", "1001", "2.5", "many", "nan", "")],
    *[("--guidance", value) for value in ("-1", "100.1", "nan", "inf", "x")],
    *[("--cfg-scale", value) for value in ("-1", "1e400")],
    *[("--guidance-rescale", value) for value in ("-0.1", "1.1", "nan")],
    *[("--width", value) for value in ("0", "-64", "8200", "99999999999999999999", "64.5")],
    *[("--height", value) for value in ("7", "1e3")],
    *[("--seed", value) for value in ("-2", str(2**64), "x", "9" * 5000)],
    *[("--count", value) for value in ("0", "1001", "-1")],
    *[("--batch-size", value) for value in ("0", "1001")],
    *[("--strength", value) for value in ("-0.1", "1.1", "nan", "half")],
    *[("--eta", value) for value in ("2", "nan")],
    *[("--clip-skip", value) for value in ("0", "x")],
    *[("--device", value) for value in ("tpu", "cuda:", "cuda:-1")],
    *[("--dtype", value) for value in ("fp4", "float")],
    *[("--sampler", value) for value in ("eular", "")],
    ("--schedule", "karas"),
]


@pytest.mark.parametrize(("flag", "value"), BAD, ids=[f"{flag} {value[:20]}" for flag, value in BAD])
def test_a_bad_value_is_one_line_with_the_flag(cli: Callable, flag: str, value: str) -> None:
    ran = cli("--prompt", "x", flag, value)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("fastsd: error: ") and ran.err.count("\n") == 1 and len(ran.err) < 300
    assert re.search(rf"{flag}\b", ran.err)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "x", "--stpes", "20"], "--stpes: unknown flag; did you mean --steps?"),
        (["--prompt", "x", "--zzzzzz=1"], "--zzzzzz: unknown flag"),
        (["--prompt", "x", "--step", "3"], "--step: unknown flag; did you mean --steps?"),
        (["--out", "x.png", "--prompt", "x", "--stpes", "3"], "--stpes: unknown flag; did you mean --steps?"),
        (["train", "--confg", "x"], "--confg: unknown flag; did you mean --config?"),  # and no word on --config
        (["upscale", "--upscalr=x.pth"], "--upscalr: unknown flag; did you mean --upscaler?"),
        (["batch", "x", "--out", "y", "--steps", "3"], "--steps: unknown flag; a line of the file has it as num_infer"),
        (["train", "--config", "--a dash"], "--config --a dash: no such file"),  # a text with a space is a value
        (["--prompt", "x", "-o", "-"], "--output: nothing is written to stdout; name a folder or a file"),
        (["train", "--config", "x", "--out", "-"], "--out: nothing is written to stdout; name a folder or a file"),
        (["--prompt", "a", "cat"], "'cat' belongs to no flag"),
        (["--prompt"], "--prompt: takes a value; one that starts with a dash is written --prompt=VALUE"),
        (["trian", "--config", "x"], "'trian' is no command; did you mean train?"),
        (["a cat"], 'fastsd --prompt "..."'),
        (["--prompt", "x", "--steps", "1\n2"], r"--steps is '1\n2'; it should be a whole number"),
    ],
)
def test_what_is_unknown_is_said_with_the_nearest(cli: Callable, words: list[str], said: str) -> None:
    ran = cli(*words)
    assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "x", "--image", "http://x/y.png"], "--image http://x/y.png"),
        (["--from-image", "HTTPS://x/y.png"], "--from-image HTTPS://x/y.png"),
        (["--prompt", "x", "--control", "/", "--control-image", "http://x/y.png"], "--control-image http://x/y.png"),
        (["upscale", "http://x/y.png", "--upscaler", "x.pth"], "http://x/y.png"),
        (["--prompt", "x", "--model", "http://x/y.safetensors"], "--model http:/"),
        (["--prompt", "x", "--lora", "http://x/y.safetensors"], "--lora http:/"),
        (["--prompt", "x", "--embedding", "http://x/y.pt"], "--embedding http:/"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_urls_are_not_fetched(cli: Callable, words: list[str], said: str) -> None:
    refused(cli(*words), f"error: {said}", ": URLs are not fetched; download the file and give its path")


@pytest.mark.heavy
@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_seeds_up_to_those_of_comfyui(cli: Callable, model: Path, seed: int) -> None:
    words = ["--prompt", "x", "--model", model, "--steps", 1, "--seed", seed]
    (first,) = cli(*words).paths
    (again,) = cli("--from-image", first).paths
    assert settings(again)["seed"] == settings(first)["seed"] == seed
    assert again.read_bytes() == first.read_bytes()
    if seed == 2**64 - 1:
        refused(cli(*words, "--count", 2), "--seed is 18446744073709551615; it leaves no seeds for 2 images")


def test_an_unknown_sampler_names_the_nearest(cli: Callable) -> None:
    assert "--sampler: 'eular' is unknown; did you mean euler" in cli("--prompt", "x", "--sampler", "eular").err


def test_version_and_help(cli: Callable) -> None:
    assert cli("--version").out == f"fastsd {fastsd.__version__}\n"
    for words in (["--help"], ["train", "--help"]):
        ran = cli(*words)
        assert ran.code == 0 and ran.out.startswith("usage: fastsd") and ran.err == ""


def test_help_loads_no_torch() -> None:
    code = "import sys; from fastsd.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_arguments_become_flags() -> None:
    for argument, flag in {
        "num_inference_steps": "--steps",
        "mask_image": "--mask",
        "controls": "--control",
        "controls[0].net": "--control 1",
        "controls[1].weight": "--control-weight of --control 2",
        "--train-flag": "--train-flag",
    }.items():
        assert flags.flag_of(argument) == flag
    error = FastsdError("at most 4; {batch_size} 2 would fit", argument="num_images_per_prompt", value=9)
    assert describe(error, flags.flag_of) == "--count is 9; at most 4; --batch-size 2 would fit"
    assert str(error) == "num_images_per_prompt is 9; at most 4; batch_size 2 would fit"
    assert describe(FastsdError("no such file", argument="vae", path="/a/vae/x"), flags.flag_of) == (
        "--vae /a/vae/x: no such file"
    )


def test_nothing_breaks_the_line() -> None:
    assert one_line("a\nb\r\x1b[31m\u2028é猫\udc80") == r"a\nb\r\x1b[31m\u2028é猫\udc80"


@pytest.mark.heavy
@pytest.mark.parametrize(
    "flag",
    [
        "--model",
        "--vae",
        "--refiner",
        "--preview-decoder",
        "--lora",
        "--lora-dir",
        "--embedding",
        "--embedding-dir",
        "--control",
        "--image",
        "--mask",
        "--from-image",
        "--output",
    ],
)
def test_a_path_that_cannot_be_looked_up_is_one_line(cli: Callable, model: Path, flag: str) -> None:
    photo = write_image(Path("photo.png"))
    beside: dict[str, tuple] = {
        "--model": (),
        "--preview-decoder": ("--preview", 1),
        "--mask": ("--image", photo),
        "--control": ("--control-image", photo),
    }
    words = ("-p", "x", *beside.get(flag, ()), *(() if flag == "--model" else ("-m", model)))
    refused(cli(*words, flag, "a" * 300), flag)


def test_the_commands_refuse_such_paths_too(cli: Callable, model: Path) -> None:
    refused(cli("inspect", "a" * 300), "name too long")
    refused(cli("convert", "a" * 300, "b.safetensors"), "name too long")
    refused(cli("convert", model, "a" * 300), "name too long")
