"""Pipelines in the worker process: loaded by choice, a few kept, run for the orders of a batch."""

from __future__ import annotations

import gc
import time
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastsd import __version__
from fastsd.bundled import BUNDLED, DIGITS
from fastsd.cli import embeddings, loras
from fastsd.cli.models import fingerprint
from fastsd.cuda.capture import ran_out_of_memory
from fastsd.errors import FastsdError, about
from fastsd.files.hashes import known_sha256
from fastsd.generate.control import Control
from fastsd.generate.image_prompts import ImagePrompt
from fastsd.generate.result import Result
from fastsd.generate.threads import suited_threads
from fastsd.generate.together import join, split
from fastsd.model.controlnet import ControlNet
from fastsd.model.ip_adapter import IPAdapter
from fastsd.model.t2i_adapter import T2IAdapter
from fastsd.pipeline import Pipeline
from fastsd.runtime import memory
from fastsd.sampling.samplers import SAMPLERS
from fastsd.server.jobs import Finished, ImagePromptChoice, ModelChoice, Order, UpscaleOrder, UpscalerChoice
from fastsd.server.worker import EngineSettings, Watch
from fastsd.upscale.upscaler import Upscaler
from fastsd.weights import count_parameters

ROOM = 1.25  # times a model's weights should be free before it is loaded beside others


@dataclass
class _LoadedModel:
    """A pipeline, what files say of its model, the nets of controls and the IP-Adapters loaded for it, by path."""

    pipe: Pipeline
    facts: dict[str, Any]
    controlnets: dict[str, ControlNet | T2IAdapter] = field(default_factory=dict)
    ip_adapters: dict[str, IPAdapter] = field(default_factory=dict)


class _Stopped(Exception):
    """An upscaling ends here."""


class PipelineEngine:
    """The engine of `fastsd.server.worker.main`."""

    def __init__(self, settings: EngineSettings):
        self.settings = settings
        self._loaded: OrderedDict[ModelChoice, _LoadedModel] = OrderedDict()  # the least recently used first
        self._upscaler: tuple[UpscalerChoice, Upscaler] | None = None  # the last one

    def load(self, model: ModelChoice) -> None:
        """Have a model in memory, and forget the least recently used ones where there are too many."""
        self._get(model)

    def unload(self) -> None:
        """Forget all models."""
        self._upscaler = None
        while self._loaded:
            self._drop_one()

    def state(self) -> tuple[dict[str, int], tuple[str, ...]]:
        """Bytes of memory, and the names of the loaded models."""
        found: dict[str, int] = {}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            found = {"free": free, "total": total, "allocated": torch.cuda.memory_allocated()}
            found["reserved"] = torch.cuda.memory_reserved()
        return found, tuple(model.name for model in self._loaded)

    def ran_out_of_memory(self, error: Exception) -> bool:
        """Whether an error says that memory ran out."""
        return ran_out_of_memory(error)

    def run(self, orders: tuple[Order, ...], size: int, watch: Watch) -> list[Finished]:
        """The images of each order."""
        first, notes = orders[0], list[str]()
        loaded = self._get(first.model)
        pipe = loaded.pipe
        used = self._load_named(pipe, orders, notes)
        facts = [loaded.facts | own | order.facts for order, own in zip(orders, used, strict=True)]
        calls = [order.arguments for order in orders]
        arguments = join(calls, size)
        own_sampler = SAMPLERS[pipe.defaults["sampler"]]
        if arguments.get("eta") == 1 and "sampler" not in arguments and not own_sampler.takes_eta:
            del arguments["eta"]  # A1111's clients send 1, which leaves such a sampler as it is
        if self.settings.tiling is not None:
            arguments["vae_tiling"] = self.settings.tiling
        if first.controls:
            arguments["controls"] = [self._control(loaded, k, first) for k in range(len(first.controls))]
            described = [{"name": choice.name, "map": choice.map_kind, **choice.parts} for choice in first.controls]
            facts = [one | {"controls": described} for one in facts]
        if first.image_prompts:
            arguments["image_prompts"] = [self._image_prompt(loaded, choice) for choice in first.image_prompts]
            shown = [{"name": choice.name, "scale": choice.scale} for choice in first.image_prompts]
            facts = [one | {"image_prompts": shown} for one in facts]
        if first.upscaler is not None:
            with about("hires_upscaler"):
                arguments["hires_upscaler"] = self._load_upscaler(first.upscaler)
        with suited_threads(pipe.components, pipe.device):
            result = _generate(pipe, arguments, watch)
        if result is None:
            return []
        return [
            Finished(images, settings, [*notes, *own], dict(result.timings))
            for images, settings, own in split(calls, facts, result)
        ]

    def upscale(self, order: UpscaleOrder, watch: Watch) -> list[Finished]:
        """The image of an order, enlarged; none where it was stopped."""
        with about("upscaler_1"):
            upscaler, started = self._load_upscaler(order.upscaler), time.perf_counter()
        for (width, height), _ in upscaler.check_memory(order.image.size, size=order.size):
            made = width * height * upscaler.scale**2
            if made > order.pixels:
                raise FastsdError(
                    f"{order.upscaler.name} makes {made / 10**6:.0f} million pixels of it, and at most "
                    f"{order.pixels / 10**6:.0f} million are made; send a smaller image",
                    argument="image",
                )

        def progress(done: int, total: int) -> None:
            if watch.step(done, total, lambda: order.image):
                raise _Stopped

        try:
            image = upscaler(order.image, size=order.size, progress=progress)
        except _Stopped:
            return []
        return [Finished([image], [{}], upscaler.take_notes(), {"total": time.perf_counter() - started})]

    def _load_upscaler(self, choice: UpscalerChoice) -> Upscaler:
        if self._upscaler is None or self._upscaler[0] != choice:
            self._upscaler = None
            loaded = Upscaler.from_file(choice.path, self.settings.options.get("device", "auto"))
            self._upscaler = choice, loaded
        return self._upscaler[1]

    def _get(self, model: ModelChoice) -> _LoadedModel:
        if model in self._loaded:
            self._loaded.move_to_end(model)
            return self._loaded[model]
        self._make_room(model)
        options = dict(self.settings.options)
        if model.refiner is not None:
            options["refiner"] = model.refiner
        with about("model"):
            pipe = Pipeline.from_pretrained(model.path, **options)
        self._loaded[model] = _LoadedModel(pipe, _facts(model, pipe))
        return self._loaded[model]

    def _make_room(self, model: ModelChoice) -> None:
        """Drop models until `keep` - 1 are left and the new one fits, as far as its files tell."""
        while len(self._loaded) >= self.settings.keep:
            self._drop_one()
        if not self._loaded:
            return
        other = next(iter(self._loaded.values())).pipe
        path = Path(model.path or BUNDLED[DIGITS])
        needed = count_parameters(path, other.dtype) * other.dtype.itemsize if path.exists() else 0
        while self._loaded and (memory.available(other.device) or needed * ROOM) < needed * ROOM:
            self._drop_one()

    def _drop_one(self) -> None:
        _, dropped = self._loaded.popitem(last=False)
        dropped.pipe.graphs.forget()
        del dropped
        gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _load_named(self, pipe: Pipeline, orders: tuple[Order, ...], notes: list[str]) -> list[dict[str, Any]]:
        """Load the LoRAs and embeddings that the prompts name; what the files of each order say of them."""
        used, adapters = list[dict[str, Any]](), list[dict[str, Any]]()
        common = {"allow_pickle": False, "from_image": None, "lora": None, "embedding": None, "allow_partial": False}
        folders = {"lora_dir": self.settings.lora_dir, "embedding_dir": self.settings.embedding_dir}
        for k, order in enumerate(orders):
            texts = {name: order.arguments.get(name) or "" for name in ("prompt", "negative_prompt")}
            args = Namespace(**texts, **common, **folders, prompt_syntax=order.arguments.get("prompt_syntax"))
            found = embeddings.load(pipe, args, {}, notes)
            if k == 0 and (order.loras or pipe.adapters.active):  # the same in all orders of a batch
                adapters = loras.load(pipe, args, {}, notes)
            used.append({"embeddings": found or None, "loras": adapters if order.loras else None})
        return used

    def _control(self, loaded: _LoadedModel, k: int, order: Order) -> Control:
        choice = order.controls[k]
        if choice.path not in loaded.controlnets:
            with about(f"controls[{k}].net"):
                loaded.controlnets[choice.path] = loaded.pipe.load_controlnet(choice.path)
        return Control(loaded.controlnets[choice.path], choice.image, **choice.parts)

    def _image_prompt(self, loaded: _LoadedModel, choice: ImagePromptChoice) -> ImagePrompt:
        if choice.path not in loaded.ip_adapters:
            loaded.ip_adapters[choice.path] = loaded.pipe.load_ip_adapter(choice.path)
        return ImagePrompt(loaded.ip_adapters[choice.path], choice.image, choice.scale, choice.mask)


def _generate(pipe: Pipeline, arguments: dict[str, Any], watch: Watch) -> Result | None:
    """The images of a call; none where it was stopped."""
    result = None
    stream = pipe.stream(**arguments)
    for step in stream:
        result = step.result
        if watch.step(step.index, step.total, step.preview) and result is None:
            if watch.stopped:
                stream.close()  # type: ignore[attr-defined]
                return None
            pipe._interrupt = True
    assert result is not None  # the last step has it
    return result


def _facts(model: ModelChoice, pipe: Pipeline) -> dict[str, Any]:
    """What files say of a model: its name, not where it lies on this machine; what tells it apart from others."""
    assert pipe.source is not None  # every model is loaded from somewhere
    found: dict[str, Any] = {
        "model": model.name,
        "model_path": DIGITS if model.path is None else model.name,
        "model_fingerprint": fingerprint(pipe.source.path),
        "model_hash": _hash(pipe.source.path),
        "version": __version__,
    }
    for name, place in (("vae", pipe.vae_source), ("refiner", pipe.refiner_source)):
        if place is not None:
            found[name] = {"name": place.path.name, "fingerprint": fingerprint(place.path), "hash": _hash(place.path)}
    return found


def _hash(path: Path) -> str | None:
    digits = known_sha256(path) if path.is_file() else None
    return None if digits is None else digits[:10]
