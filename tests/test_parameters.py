"""Every parameter is stated once: a new row is found in the call, the flags, the metadata and A1111's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastsd.cli import flags
from fastsd.cli.reference import reference
from fastsd.errors import FastsdError
from fastsd.generate.request import plan
from fastsd.generate.result import used_settings
from fastsd.image import infotext, metadata
from fastsd.parameters import PARAMETERS, check_call, check_needs
from fastsd.parameters.kinds import HOW, Number, Parameter
from fastsd.pipeline import Pipeline
from tests.support.cli import settings
from tests.support.pipelines import tiny_pipeline

SHARPNESS = Parameter(
    "sharpness",
    Number(low=0, high=2),
    "how sharp the image is",
    ("--sharpness",),
    HOW,
    1.0,
    excludes=("mask_image", "a mask has its own"),
    label="Sharpness",
)


@pytest.fixture
def sharpness(monkeypatch: pytest.MonkeyPatch) -> Parameter:
    """The one row that a new parameter needs."""
    monkeypatch.setitem(PARAMETERS, "sharpness", SHARPNESS)
    return SHARPNESS


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


def test_the_call_checks_it(sharpness: Parameter, pipe: Pipeline) -> None:
    assert check_call({"prompt": "x"}).sharpness == 1.0
    assert check_call({"prompt": "x", "sharpness": 1}).sharpness == 1.0
    with pytest.raises(FastsdError, match="^sharpness is 3; it should be a number from 0 to 2$") as caught:
        pipe("x", sharpness=3)
    assert (caught.value.argument, caught.value.value) == ("sharpness", 3)
    with pytest.raises(FastsdError, match="^sharpness: given with mask_image; a mask has its own$"):
        check_needs({"sharpness", "mask_image", "image"})
    with pytest.raises(FastsdError, match="^sharpnes: no such argument; did you mean sharpness?"):
        pipe("x", sharpnes=1)


def test_the_work_sees_it(sharpness: Parameter, pipe: Pipeline) -> None:
    request = plan(pipe.components, pipe.defaults, {"prompt": "x", "sharpness": 1.5})
    assert request.settings.sharpness == 1.5 and request.passes[0].settings.sharpness == 1.5
    assert used_settings(request)["sharpness"] == 1.5


def test_the_command_line_has_it(sharpness: Parameter) -> None:
    parser = flags.make_parser({})
    assert "--sharpness X" in parser.format_help() and "how sharp the image is (default: 1)" in parser.format_help()
    assert flags.parse(parser, ["--sharpness", "0.5"]).sharpness == 0.5
    with pytest.raises(FastsdError) as caught:
        flags.parse(parser, ["--sharpness", "3"])
    assert flags.flag_of(caught.value.argument) == "--sharpness"


def test_images_hold_it(sharpness: Parameter) -> None:
    texts = metadata.write_texts({"prompt": "x", "sharpness": 1.5, "seed": 1, "num_inference_steps": 3})
    assert "Sharpness: 1.5" in texts["parameters"]
    assert metadata.read_texts(texts)[0]["sharpness"] == 1.5
    assert metadata.read_texts({"parameters": texts["parameters"]})[0]["sharpness"] == 1.5
    assert "Sharpness" not in infotext.write_parameters({"prompt": "x", "sharpness": 1.0})


def test_an_image_repeats_with_it(sharpness: Parameter, cli: Any, model: Any) -> None:
    first = cli("-p", "x", "-m", model, "-s", 1, "--sharpness", 1.5).paths[0]
    assert settings(first)["sharpness"] == 1.5
    assert settings(cli("--from-image", first).paths[0])["sharpness"] == 1.5
    assert settings(cli("--from-image", first, "--sharpness", 0.5).paths[0])["sharpness"] == 0.5


def test_the_reference_lists_it(sharpness: Parameter) -> None:
    assert "| `sharpness` | `--sharpness` |" in reference()


def test_every_row_is_sound() -> None:
    seen: set[str] = set()
    for row in flags.known():
        assert not seen & set(row.flags), row.name
        seen |= set(row.flags)
    for row in PARAMETERS.values():
        for other in (row.needs, row.excludes):
            assert other is None or other[0] in {*PARAMETERS, *flags.CLI}, row.name
        if row.default is not None and isinstance(row.kind, Number):
            assert row.kind.check(row.default) == row.default


def test_the_page_is_the_table() -> None:
    """`make reference` writes it."""
    page = Path(__file__).parent.parent / "docs" / "reference.md"
    assert page.read_text(encoding="utf-8") == reference()
