"""What generates a batch job's images: one model in one process, an outcome for each batch of requests.

The job's own process has one, or each worker of Ray has.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastsd import __version__
from fastsd.batch.job import LinesLeft
from fastsd.batch.lines import ID, UPSCALE, BadLine
from fastsd.batch.manifest import DONE, FAILED, check_model
from fastsd.batch.requests import CONTROL_IMAGES, CONTROL_PARTS, HIRES, IMAGES, BatchRequest, in_batches
from fastsd.batch.store import Store
from fastsd.cli import controls, embeddings, image_prompts, loras
from fastsd.cli.generate import READERS, load
from fastsd.cli.repeat import GivenImage
from fastsd.errors import FastsdError, about
from fastsd.files import fingerprint
from fastsd.generate.together import join, split
from fastsd.image.files import check_sides, encode, open_image, open_mask
from fastsd.image.infotext import UPSCALERS, with_upscale
from fastsd.image.metadata import write_texts
from fastsd.parameters import PARAMETERS
from fastsd.parameters.rows import DEFAULT_BATCH

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline
    from fastsd.upscale.upscaler import Upscaler

LINES_IN_FOLDER = 1000


@dataclass
class BatchOutcome:
    """What became of some lines.

    Attributes:
        facts: what files say of the model; None: no model had a part in it.
        records: of the lines, for the manifest.
        images: the bytes of their files, by name; those that the store has already are left out.
        notes: what the user should know.
    """

    facts: dict[str, Any] | None
    records: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class BatchEngine:
    """A pipeline that does the lines of a job, and what was loaded for them.

    Args:
        args: the job's flags.
        begun_with: what the manifest says of the model, None where the job is new.
        store: to write images to; None: they come with the outcome.

    Raises:
        FastsdError: the model cannot be loaded, or is another than the one that the job began with.
    """

    def __init__(self, args: argparse.Namespace, begun_with: dict[str, Any] | None, store: Store | None):
        self.args, self.store = args, store
        self.size = args.batch_size or DEFAULT_BATCH
        self.notes: list[str] = []  # of loading; the first outcome has them
        self.pipe: Pipeline
        self.pipe, facts = load(args, {}, self.notes)
        self.facts = facts | {"version": __version__}
        if begun_with is not None:
            check_model(begun_with, self.facts, args.out)
        # Tags, what files say of them, and notes on them.
        self._adapters: tuple[Any, list[dict[str, Any]], list[str]] = (None, [], [])
        self._nets: dict[str, Any] = {}  # ControlNets, by their paths
        self._ip_adapters: dict[tuple[str, str | None], Any] = {}  # by their paths and their encoders'
        self._upscalers: dict[str, Upscaler] = {}  # by their paths

    def outcome(self) -> BatchOutcome:
        """An outcome that is empty yet."""
        notes, self.notes = self.notes, []
        return BatchOutcome(self.facts, notes=notes)

    def do(self, asked: list[BatchRequest] | BadLine) -> BatchOutcome:
        """Generate a batch. Where it fails, each of its lines runs alone, so that one costs no other.

        Raises:
            FastsdError: the store cannot be written to; that is no fault of a line.
        """
        found = self.outcome()
        if isinstance(asked, BadLine):
            found.records.append(failure(asked))
        else:
            self._do(asked, found)
        return found

    def _do(self, batch: list[BatchRequest], found: BatchOutcome) -> None:
        started = time.perf_counter()
        try:
            outcomes = self._generate(batch)
        except FastsdError as error:
            if len(batch) > 1:
                for request in batch:
                    self._do([request], found)
            else:
                found.records.append(failure(BadLine(batch[0].line, error, batch[0].fields)))
            return
        seconds = round((time.perf_counter() - started) / len(batch), 3)
        for request, (images, settings, notes) in zip(batch, outcomes, strict=True):
            files = [
                self._write(request, k, image, own, found)
                for k, (image, own) in enumerate(zip(images, settings, strict=True))
            ]
            own_id = {ID: request.fields[ID]} if ID in request.fields else {}
            record = {"line": request.line, **own_id, "state": DONE, "request": request.fields}
            record |= {"seed": request.arguments["seed"], "files": files, "notes": notes}
            found.records.append(record | {"device": self.pipe.device.type, "seconds": seconds})
            found.notes += notes

    def _generate(self, batch: list[BatchRequest]) -> list[tuple[list[Any], list[dict[str, Any]], list[str]]]:
        """The images of each request with their settings, and the request's notes."""
        from fastsd.generate.threads import suited_threads

        named = [self._load_named(request) for request in batch]
        facts = [own for own, _ in named]
        calls = [dict(request.arguments) for request in batch]
        for call, own, request in zip(calls, facts, batch, strict=True):
            self._open_images(call, own)
            if call.get(HIRES) not in (None, *UPSCALERS):
                call[HIRES] = self._load_upscaler(call[HIRES], HIRES)
            if request.upscale is not None:  # before anything is generated, since a file may be none
                self._load_upscaler(request.upscale["upscaler"], f"{UPSCALE}.upscaler")
            if request.controls:
                call["controls"], own["controls"] = self._open_controls(request)
            if request.image_prompts:
                call["image_prompts"], own["image_prompts"] = self._open_image_prompts(request)
        with suited_threads(self.pipe.components, self.pipe.device):
            result = self.pipe(**join(calls, self.size))
        outcomes = []
        each = zip(batch, named, split(calls, facts, result), strict=True)
        for request, (_, of_files), (images, settings, of_call) in each:
            notes = [*of_files, *of_call]
            outcomes.append(([self._enlarged(image, request.upscale, notes) for image in images], settings, notes))
        return outcomes

    def _enlarged(self, image: Image.Image, upscale: dict[str, Any] | None, notes: list[str]) -> Image.Image:
        """An image as its line asks for it."""
        if upscale is None:
            return image
        upscaler, scale = self._upscalers[upscale["upscaler"]], upscale.get("scale")
        check_sides(upscaler.result_size(image.size, scale), f".{self.args.format}", UPSCALE)
        with about(UPSCALE):
            larger = upscaler(image, scale, tile=upscale.get("tile"))
        notes += upscaler.take_notes()
        return larger

    def _load_upscaler(self, path: str, argument: str) -> Upscaler:
        if path not in self._upscalers:
            with about(argument):
                self._upscalers[path] = self.pipe.load_upscaler(path, bool(self.args.allow_pickle))
        return self._upscalers[path]

    def _load_named(self, request: BatchRequest) -> tuple[dict[str, Any], list[str]]:
        """Load the LoRAs and embeddings of a request; what its files say, and notes."""
        notes: list[str] = []
        texts = {name: request.arguments.get(name) or "" for name in ("prompt", "negative_prompt")}
        given = vars(self.args) | texts | {"prompt_syntax": request.arguments.get("prompt_syntax"), "from_image": None}
        args = argparse.Namespace(**given)
        found = embeddings.load(self.pipe, args, {}, notes)
        if self._adapters[0] != request.loras:
            self._adapters = (None, [], [])  # where loading fails, nothing is known of the weights
            on_loras: list[str] = []
            self._adapters = (request.loras, loras.load(self.pipe, args, {}, on_loras), on_loras)
        _, adapters, on_loras = self._adapters
        return self.facts | {"embeddings": found or None, "loras": adapters or None}, [*notes, *on_loras]

    def _open_images(self, call: dict[str, Any], own: dict[str, Any]) -> None:
        for name in IMAGES:
            if name in call:
                call[name], given = _open(call[name], name, READERS[name])
                own[PARAMETERS[name].key] = given.as_setting()

    def _open_controls(self, request: BatchRequest) -> tuple[list[Any], list[dict[str, Any]]]:
        chosen = []
        for k, one in enumerate(request.controls):
            (name,) = (name for name in CONTROL_IMAGES if name in one)
            image, given = _open(one[name], f"controls[{k}].image", open_image)
            parts = {part: one[part] for part in CONTROL_PARTS if part in one}
            chosen.append(controls.ChosenControl.make(one["net"], image, given, name, parts))
        return controls.load(self.pipe, chosen, bool(self.args.allow_pickle), self._nets)

    def _open_image_prompts(self, request: BatchRequest) -> tuple[list[Any], list[dict[str, Any]]]:
        chosen = []
        for k, one in enumerate(request.image_prompts):
            prompt = image_prompts.ChosenPrompt(one["adapter"], one["scale"], one.get("encoder"))
            prompt.images += [_open(path, f"image_prompts[{k}].images", open_image) for path in one["images"]]
            if "mask" in one:
                prompt.mask = _open(one["mask"], f"image_prompts[{k}].mask", open_mask)
            chosen.append(prompt)
        return image_prompts.load(self.pipe, chosen, bool(self.args.allow_pickle), self._ip_adapters)

    def _name(self, request: BatchRequest, k: int) -> str:
        """00012/00012345.png, a folder for every thousand lines; with several images 00012345-0.png and so on."""
        several = f"-{k}" if request.count > 1 else ""
        return f"{request.line // LINES_IN_FOLDER:05d}/{request.line:08d}{several}.{self.args.format}"

    def _write(
        self, request: BatchRequest, k: int, image: Image.Image, settings: dict[str, Any], found: BatchOutcome
    ) -> dict[str, Any]:
        """Keep the request's k-th image; what the manifest says of its file."""
        name, suffix, texts = self._name(request, k), f".{self.args.format}", write_texts(settings)
        if request.upscale is not None:
            upscaler = self._upscalers[request.upscale["upscaler"]]
            texts = with_upscale(texts, upscaler.name, request.upscale.get("scale") or upscaler.scale, suffix)
        data = encode(image, suffix, texts)
        if self.store is None:
            found.images[name] = data
        else:
            self.store.write(name, data)
        return {"path": name, "sha256": fingerprint(data), "seed": settings["seed"]}


def _open(path: str, argument: str, read: Callable[[bytes, str], Any]) -> tuple[Any, GivenImage]:
    """An image of a line, with the file that holds it."""
    given = GivenImage.read(path, argument)
    with about(argument, given.path):
        return read(given.data, argument), given


def outcomes(
    args: argparse.Namespace, left: LinesLeft, begun_with: dict[str, Any] | None, store: Store | None
) -> Generator[BatchOutcome]:
    """The outcomes of lines that this process does; the first has no lines, and comes when the model is there."""
    engine = BatchEngine(args, begun_with, store)
    yield engine.outcome()
    for batch in in_batches(left, engine.size):
        yield engine.do(batch)


def failure(line: BadLine) -> dict[str, Any]:
    """The manifest's record of a line that has no image."""
    return {"line": line.number, "state": FAILED, "error": line.said, "request": line.fields}
