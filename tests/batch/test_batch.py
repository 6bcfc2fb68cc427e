"""Batch jobs: the images of each line are those of a run alone; bad lines cost no other; a job goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from fastsd.batch import manifest as manifests
from fastsd.batch.engine import failure
from fastsd.batch.lines import AskedLine, BadLine, read_lines
from fastsd.batch.requests import make_request
from fastsd.errors import FastsdError
from fastsd.generate.control import Control
from fastsd.generate.image_prompts import ImagePrompt
from fastsd.image.files import read_text
from fastsd.pipeline import Pipeline
from tests.support import tiny
from tests.support.cli import pixels, refused, settings, write_image
from tests.support.ip_adapters import write_adapter
from tests.support.pipelines import MASK, PHOTO, tiny_components
from tests.support.upscalers import write_upscaler

ASKED: list[dict[str, Any]] = [
    {"prompt": "a cat", "seed": 3, "id": "first"},
    {"prompt": "a dog", "seed": 8, "width": 72},
    {"prompt": "a fox", "negative_prompt": "fog", "seed": 4, "num_images_per_prompt": 2},
    {"prompt": "an owl", "guidance_scale": 2.5, "sampler": "Euler a"},
]


def write(lines: list[Any], path: str = "prompts.jsonl") -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    Path(path).write_text("\n".join(texts) + "\n")
    return Path(path)


def records(folder: str = "out") -> dict[int, list[dict[str, Any]]]:
    """The manifest's lines, by the lines that they are about."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in Path(folder, manifests.NAME).read_text().splitlines()[1:]:
        record = json.loads(line)
        found.setdefault(record["line"], []).append(record)
    return found


def files_of(record: dict[str, Any], folder: str = "out") -> list[Path]:
    return [Path(folder, one["path"]) for one in record["files"]]


@pytest.mark.heavy
def test_each_image_is_the_one_of_a_run_alone(cli: Callable, model: Path) -> None:
    ran = cli("batch", write(ASKED), "--out", "out", "-m", model, "--dtype", "fp32", "--seed", 1)
    assert (ran.code, ran.err) == (0, "") and ran.out == "4 done, 0 failed: out/manifest.jsonl\n"
    found, pipe = records(), Pipeline.from_pretrained(model, dtype="fp32")
    assert sorted(found) == [1, 2, 3, 4] and all(len(each) == 1 for each in found.values())
    assert found[1][0]["id"] == "first"
    for line, asked in enumerate(ASKED, start=1):
        record = found[line][0]
        call = {name: value for name, value in asked.items() if name != "id"} | {"seed": record["seed"]}
        assert record["request"] == asked and record["seed"] == asked.get("seed", record["seed"])
        for image, path, one in zip(pipe(**call).images, files_of(record), record["files"], strict=True):
            # A batch of another size sums in another order: half a level may round either way.
            assert np.abs(pixels(path).astype(int) - np.asarray(image).astype(int)).max() <= 1
            kept = settings(path)
            assert (kept["prompt"], kept["seed"]) == (asked["prompt"], one["seed"])
            assert kept.get("negative_prompt", "") == asked.get("negative_prompt", "")


@pytest.mark.heavy
def test_a_line_has_the_notes_on_its_own_text_alone(cli: Callable) -> None:
    steps = {"num_inference_steps": 1}
    asked = [{"prompt": text} | steps for text in ("eight", "seven blorb", "two zorb")]
    ran = cli("batch", write(asked), "--out", "out", "--seed", 1)
    assert ran.code == 0 and ran.err.count("note: ") == 2
    notes = [records()[line][0]["notes"] for line in (1, 2, 3)]
    assert notes[0] == [] and "know 'blorb';" in notes[1][0] and "know 'zorb';" in notes[2][0]
    assert len(notes[1]) == len(notes[2]) == 1


def test_a_second_seed_left_to_chance_is_the_same_where_the_job_goes_on() -> None:
    asked = {"prompt": "a cat", "subseed_strength": 0.5}
    drawn = [make_request(AskedLine(n, asked), Path(), 7).arguments for n in (1, 2, 1)]
    assert drawn[0] == drawn[2] and len({*(one["subseed"] for one in drawn), *(one["seed"] for one in drawn)}) == 4
    given = make_request(AskedLine(1, asked | {"subseed": 3}), Path(), 7)
    assert given.arguments["subseed"] == 3


@pytest.mark.heavy
def test_requests_of_one_shape_run_in_one_call(cli: Callable, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    run = Pipeline.__call__

    def counted(self: Pipeline, prompt: Any = None, **given: Any) -> Any:
        called.append(prompt)
        return run(self, prompt, **given)

    monkeypatch.setattr(Pipeline, "__call__", counted)
    asked = [{"prompt": word, "width": width} for word, width in zip("abcdef", (64, 72) * 3, strict=True)]
    assert cli("batch", write(asked), "--out", "out", "-m", model, "-b", 2).code == 0
    assert called == [["a", "c"], ["b", "d"], "e", "f"]


@pytest.mark.heavy
def test_a_bad_line_is_named_and_stops_no_other(cli: Callable, model: Path) -> None:
    lines = [
        {"prompt": "a cat", "seed": 3},
        '{"prompt": "a cat"',
        {"prompt": "a dog", "width": 63},
        "",
        {"prompt": "a dog", "steps": 3},
        {"prompt": "x", "model": "other"},
        {"prompt": ["x", "y"]},
        {"prompt": "x", "image": "no.png"},
        {"prompt": "x", "image": "no.png", "latents": 3},
        {"prompt": "x <lora:no:1>"},
        '{"prompt": "\\ud800"}',
        {"prompt": "an owl", "seed": 3},
    ]
    said = {
        2: "not JSON",
        3: "width is 63",
        5: "steps: no such argument; did you mean num_inference_steps?",
        6: "model: it belongs to the job, whose lines have one model: --model",
        7: "each prompt has a line of its own",
        8: "no.png: no such file",
        9: "latents: a file cannot hold it",
        10: "needs --lora-dir",
        11: "not valid UTF-8",
    }
    ran = cli("batch", write(lines), "--out", "out", "-m", model)
    assert ran.code == 1 and ran.out.startswith("2 done, 9 failed")
    for line, why in said.items():
        assert sum(f"prompts.jsonl line {line}: " in text and why in text for text in ran.err.splitlines()) == 1, line
        assert [record["state"] for record in records()[line]] == ["failed"]
    again = cli("batch", "prompts.jsonl", "--out", "out", "-m", model)
    assert again.code == 1 and again.err == ran.err
    assert all(len(each) == 1 for each in records().values())  # nothing twice, failures neither
    refused(cli("batch", "prompts.jsonl", "--out", "other", "-m", model, "--strict"), "line 2: not JSON")
    assert not Path("other").exists()


@pytest.mark.heavy
def test_tables_ask_the_same(cli: Callable, model: Path, tmp_path: Path) -> None:
    photo = write_image(tmp_path / "photo.png")
    with open("prompts.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["prompt", "seed", "guidance_scale", "image", "id", "mask_invert"],
                ["a cat,\nor two", "3", "2.5", "", "7", ""],
                ["a dog", "x", "", "", "", ""],
                ["a dog", "5", "", photo, "", "yes"],
                ["a dog", "5", "", photo, "", ""],
            ]
        )
    ran = cli("batch", "prompts.csv", "--out", "out", "-m", model)
    found = records()
    assert ran.code == 1 and {line: each[0]["state"] for line, each in found.items()} == {
        2: "done",  # lines as an editor numbers them: the first request spans two
        4: "failed",
        5: "failed",
        6: "done",
    }
    assert found[2][0]["request"] == {"prompt": "a cat,\nor two", "seed": 3, "guidance_scale": 2.5, "id": "7"}
    assert settings(files_of(found[6][0])[0])["image"]["name"] == photo.name
    Path("prompts.csv").write_text("prompt,url\nx,y\n")
    refused(cli("batch", "prompts.csv", "--out", "b", "-m", model), "the column 'url' is no parameter")


def lines_of(text: str | bytes, path: str) -> list[AskedLine | BadLine]:
    """What a file of this text asks for."""
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_lines(Path(path)))


@pytest.mark.parametrize(
    ("text", "path", "line", "said"),
    [
        ('{"prompt": "a", "guidance_scale": 1e400}', "a.jsonl", 1, "guidance_scale: it should be a finite number"),
        ('{"prompt": "a", "controls": [{"weight": 1e999}]}', "a.jsonl", 1, "controls: it should be a finite number"),
        ('{"prompt": "a\\ud800"}', "a.jsonl", 1, "prompt: the text is not valid UTF-8"),
        ("prompt,guidance_scale\na,3\nb,1e400\n", "a.csv", 3, None),
        (b"prompt,seed\na,1\nb,2\ncaf\xe9,x\n", "a.csv", 4, "prompt: the text is not valid UTF-8"),
        ('prompt,seed\na,1\n"b,2\nc,3\n', "a.csv", 3, "the quote that opens in line 3 is not closed"),
        ('prompt,id\na,1\n"b\n",2"\nc,"3\nd,4', "a.csv", 5, "the quote that opens in line 5 is not closed"),
    ],
)
def test_a_line_that_the_manifest_could_not_hold_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes, path: str, line: int, said: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (bad,) = [one for one in lines_of(text, path) if isinstance(one, BadLine)]
    assert bad.number == line and (said or "guidance_scale") in bad.said
    json.dumps(failure(bad), allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("text", "path"),
    [("prompt,seed,subseed\na,7.0,\n", "a.csv"), ('{"prompt": "a", "seed": 7.0}', "a.jsonl")],
)
def test_a_whole_number_may_be_written_as_a_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (one,) = lines_of(text, path)
    assert isinstance(one, AskedLine) and repr(make_request(one, Path(), 1).arguments["seed"]) == "7"
    (half,) = lines_of(text.replace("7.0", "7.5"), path)
    with pytest.raises(FastsdError, match="seed"):
        raise half.error if isinstance(half, BadLine) else make_request(half, Path(), 1)


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        ("prompt;seed\na;1\n", "a.csv", "its columns are separated by ';'; commas are read"),
        ("prompt\tseed\na\t1\n", "a.csv", "its columns are separated by tabs; commas are read"),
        ("", "a.csv", "there is no column prompt"),
        ("prompt,seed\n", "a.csv", "no line in it asks for an image"),
        ("", "a.jsonl", "no line in it asks for an image"),
        ("\n \n", "a.jsonl", "no line in it asks for an image"),
    ],
)
def test_a_file_that_asks_for_nothing_is_refused(cli: Callable, text: str, path: str, said: str) -> None:
    Path(path).write_text(text)
    refused(cli("batch", path, "--out", "out"), path, said)
    assert not Path("out").exists()


@pytest.mark.heavy
def test_image_prompts_are_the_calls(cli: Callable, model: Path, tmp_path: Path) -> None:
    PHOTO.save("photo.png")
    MASK.save("mask.png")
    adapter = write_adapter(tmp_path, tiny_components().unet)
    shown = {"adapter": str(adapter), "images": ["photo.png", "mask.png"], "scale": 0.6, "mask": "mask.png"}
    asked = [
        {"prompt": "x", "seed": 3, "image_prompts": [shown]},
        {"prompt": "x", "image_prompts": [{"adapter": str(adapter), "image": "photo.png", "weight": 1}]},
        {"prompt": "x", "image_prompts": [{"adapter": str(adapter), "image": "no.png"}]},
        {"prompt": "x", "image_prompts": [{"adapter": "no.safetensors", "image": "photo.png"}]},
        {"prompt": "x", "image_prompts": [{"adapter": str(adapter), "image": "photo.png", "scale": 99}]},
    ]
    ran = cli("batch", write(asked), "--out", "out", "-m", model, "--dtype", "fp32")
    said = {2: "it should be {", 3: "no.png: no such", 4: "no.safetensors: no such", 5: "[0].scale is 99"}
    for line, why in said.items():
        assert sum(f"line {line}: " in text and why in text for text in ran.err.splitlines()) == 1, ran.err
    path = files_of(records()[1][0])[0]
    pipe = Pipeline.from_pretrained(model, dtype="fp32")
    prompt = ImagePrompt(pipe.load_ip_adapter(adapter), [PHOTO, MASK], 0.6, MASK)
    np.testing.assert_array_equal(pixels(path), np.asarray(pipe("x", seed=3, image_prompts=[prompt]).images[0]))
    assert [one["name"] for one in settings(path)["image_prompts"][0]["images"]] == ["photo.png", "mask.png"]


@pytest.mark.heavy
def test_t2i_adapters_are_the_calls(cli: Callable, model: Path) -> None:
    PHOTO.save("photo.png")
    save_file(tiny.t2i_adapter(tiny.UNET), "sketch.safetensors")
    control = {"net": "sketch.safetensors", "image": "photo.png", "weight": 0.8, "end": 0.5}
    asked = [
        {"prompt": "x", "seed": 3, "controls": [control]},
        {"prompt": "x", "controls": [control | {"scale": 1}]},
        {"prompt": "x", "controls": [control | {"net": "no.safetensors"}]},
        {"prompt": "x", "controls": [control | {"color": "photo.png"}]},
        {"prompt": "x", "seed": 3, "controls": [{"net": "sketch.safetensors", "color": "photo.png"}]},
    ]
    ran = cli("batch", write(asked), "--out", "out", "-m", model, "--dtype", "fp32")
    for line, why in {2: "it should be {", 3: "no.safetensors: no such", 4: "it should have one of image,"}.items():
        assert sum(f"line {line}: " in text and why in text for text in ran.err.splitlines()) == 1, ran.err
    path = files_of(records()[1][0])[0]
    pipe = Pipeline.from_pretrained(model, dtype="fp32")
    steered = pipe("x", seed=3, controls=[Control(pipe.load_controlnet("sketch.safetensors"), PHOTO, 0.8, end=0.5)])
    np.testing.assert_array_equal(pixels(path), np.asarray(steered.images[0]))
    assert settings(path)["controls"][0]["name"] == "sketch.safetensors"
    assert not np.array_equal(pixels(path), np.asarray(pipe("x", seed=3).images[0]))
    coloured = files_of(records()[5][0])[0]
    assert settings(coloured)["controls"][0]["map"] == "color"


@pytest.mark.heavy
def test_upscalers_are_the_calls(cli: Callable, model: Path) -> None:
    """In the hires fix, and over the result as `fastsd upscale` does it, where requests still share a call."""
    write_upscaler(Path("two.safetensors"))
    hires = {"hires_scale": 1.5, "hires_steps": 2, "hires_upscaler": "two.safetensors"}
    asked = [
        {"prompt": "x", "seed": 3, **hires},
        {"prompt": "x", "seed": 3},
        {"prompt": "x", "seed": 3, "upscale": {"upscaler": "two.safetensors"}},
        {"prompt": "x", "seed": 3, "upscale": {"upscaler": "two.safetensors", "scale": 3, "tile": 64}, "id": "large"},
        {"prompt": "x", "hires_scale": 2, "hires_upscaler": "lanzcos"},
        {"prompt": "x", "hires_upscaler": "two.safetensors"},
        {"prompt": "x", "upscale": {"upscaler": "no.safetensors"}},
        {"prompt": "x", "upscale": "two.safetensors"},
        {"prompt": "x", "upscale": {"upscaler": "two.safetensors", "scale": 99}},
        {"prompt": "x", "width": 72, "upscale": {"upscaler": "prompts.jsonl"}},
    ]
    said = {
        5: "latent-nearest-exact, lanczos, nearest or a file",
        6: "hires_upscaler: given without hires_scale",
        7: "no.safetensors: no such file",
        8: "upscale: it should be {",
        9: "upscale.scale is 99",
        10: "here/prompts.jsonl: JSON text",
    }
    ran = cli("batch", write(asked), "--out", "out", "-m", model, "--dtype", "fp32")
    for line, why in said.items():
        assert sum(f"line {line}: " in text and why in text for text in ran.err.splitlines()) == 1, ran.err
    found = records()
    first, plain, twice, thrice = (pixels(files_of(found[line][0])[0]) for line in (1, 2, 3, 4))
    pipe = Pipeline.from_pretrained(model, dtype="fp32")
    upscaler = pipe.load_upscaler("two.safetensors")
    made = pipe("x", seed=3, **hires | {"hires_upscaler": upscaler}).images[0]
    np.testing.assert_array_equal(first, np.asarray(made))
    np.testing.assert_array_equal(twice, np.asarray(upscaler(Image.fromarray(plain))))
    np.testing.assert_array_equal(thrice, np.asarray(upscaler(Image.fromarray(plain), 3, tile=64)))
    assert settings(files_of(found[1][0])[0])["hires_upscaler"] == "two"
    kept = read_text(files_of(found[4][0])[0])
    assert kept["postprocessing"] == "Postprocess upscale by: 3, Postprocess upscaler: two"
    assert settings(files_of(found[4][0])[0])["width"] == 64 and found[4][0]["id"] == "large"
    assert found[2][0]["seconds"] == found[4][0]["seconds"]  # the share of one call


@pytest.mark.heavy
def test_an_upscaled_image_that_the_format_has_no_room_for(cli: Callable, model: Path) -> None:
    write_upscaler(Path("two.safetensors"))
    table = [["prompt", "width", "upscale"], ["x", "1032", json.dumps({"upscaler": "two.safetensors", "scale": 16})]]
    with Path("prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([*table, ["x", "64", json.dumps({"upscaler": "two.safetensors"})], ["x", "64", "2"]])
    ran = cli("batch", "prompts.csv", "--out", "out", "-m", model, "--format", "webp")
    assert ran.code == 1 and "line 2: upscale: 16512x1024 pixels are more than .webp holds; use .png" in ran.err
    assert "line 4: upscale: it should be {" in ran.err
    assert pixels(files_of(records()[3][0])[0]).shape == (128, 128, 3)


@pytest.mark.heavy
def test_parquet_asks_the_same(cli: Callable, model: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `batch`")
    from pyarrow import parquet

    table = {"prompt": ["a cat", "a dog"], "seed": [3, None], "width": [72, None]}
    parquet.write_table(pyarrow.table(table), "prompts.parquet")
    assert cli("batch", "prompts.parquet", "--out", "out", "-m", model).code == 0
    assert records()[1][0]["request"] == {"prompt": "a cat", "seed": 3, "width": 72}
    assert records()[2][0]["request"] == {"prompt": "a dog"}
    Path("bad.parquet").write_bytes(b"PAR1 and nothing")
    refused(cli("batch", "bad.parquet", "--out", "b", "-m", model), "not Parquet that can be read")


@pytest.mark.heavy
def test_another_jobs_manifest_is_refused(cli: Callable, model: Path) -> None:
    words = ("--out", "out", "-m", model)
    assert cli("batch", write(ASKED[:1]), *words).code == 0
    before = Path("out", manifests.NAME).read_bytes()
    refused(cli("batch", write(ASKED[:2], "more.jsonl"), *words), "the manifest of another job, whose prompts")
    refused(cli("batch", "prompts.jsonl", *words, "--format", "jpg"), "it began with another format")
    refused(cli("batch", "prompts.jsonl", "--out", "out"), "it began with another --model")
    Path("mine").mkdir()
    Path("mine/a.txt").write_text("mine")
    refused(cli("batch", "prompts.jsonl", "--out", "mine", "-m", model), "holds other files ('a.txt')")
    assert Path("out", manifests.NAME).read_bytes() == before
    Path("out", manifests.NAME).write_bytes(before + b"[]\n")
    refused(cli("batch", "prompts.jsonl", *words), "line 3 is damaged")


@pytest.mark.heavy
def test_what_was_lost_is_made_again_and_nothing_else(cli: Callable, model: Path) -> None:
    asked = [{"prompt": word} for word in "abc"]
    words = ("batch", write(asked), "--out", "out", "-m", model, "-b", 1)
    assert cli(*words).code == 0
    path = Path("out", manifests.NAME)
    whole, first = path.read_bytes(), records()
    path.write_bytes(whole[:-20])  # as a loss of power leaves it: the third line is not whole
    gone = files_of(first[1][0])[0]
    gone.unlink()
    kept = files_of(first[2][0])[0].stat().st_mtime_ns
    ran = cli(*words)
    assert ran.code == 0 and "the images of 1 lines that were done are gone" in ran.err
    assert {line: len(each) for line, each in records().items()} == {1: 2, 2: 1, 3: 1}
    assert records()[1][0]["files"] == records()[1][1]["files"]  # the same seed, though none was given
    assert records()[3][0]["files"] == first[3][0]["files"] and gone.exists()
    assert files_of(first[2][0])[0].stat().st_mtime_ns == kept


def test_one_run_at_a_time(tmp_path: Path) -> None:
    head = {"fastsd_batch": manifests.FORM, "sha256": "x", "settings": {}, "seed": None}
    with manifests.open_manifest(tmp_path, head):
        with pytest.raises(ValueError, match="another run of this job is under way"):
            with manifests.open_manifest(tmp_path, head):
                pass
    with manifests.open_manifest(tmp_path, head) as free:
        assert free.is_new
