"""Text to image, image to image, inpainting: prepare, denoise, decode.

The loop is a generator: progress, preview and cancelling are what the caller does between its items.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsd.bundled import DIGITS
from fastsd.components import Components
from fastsd.cuda.capture import CudaRecorder
from fastsd.errors import FastsdError, about, named_arguments
from fastsd.few_step import kind_named
from fastsd.generate.asynchronous import Asynchronous
from fastsd.generate.batch import Batch, Estimate, Timings, check_refiner, prepare, timed
from fastsd.generate.callback import StepCallback
from fastsd.generate.defaults import Defaults, few_step_note
from fastsd.generate.habits import DiffusersNames, loading_habits
from fastsd.generate.interrupt import Run, callback_of
from fastsd.generate.network_loader import NetworkLoader
from fastsd.generate.portable import Portable
from fastsd.generate.progress import Step
from fastsd.generate.request import Pass, Request, plan
from fastsd.generate.result import Result, convert_images, join_batches, used_settings
from fastsd.graph import MAX_GRAPHS, Graphs
from fastsd.kernels.candidates import ChoiceMode, choosing
from fastsd.model.taesd import TAESD, Autoencoder
from fastsd.parameters import describe
from fastsd.runtime import memory
from fastsd.runtime.devices import autoencoder_dtype, dtype_name, resolve_device, resolve_precision, undisturbed
from fastsd.text.syntax import composed
from fastsd.upscale.upscaler import Upscaler
from fastsd.weights import count_parameters, load_checkpoint, load_preview
from fastsd.weights.adapters.apply import Adapter, Adapters
from fastsd.weights.hub.hub_id import ModelLocation
from fastsd.weights.hub.locate import locate_model, locate_vae


class Pipeline(Asynchronous, Portable, NetworkLoader, DiffusersNames):
    """A checkpoint, ready to generate images.

    Attributes:
        defaults: arguments of a call where the caller gives none.
        few_step: the kind of distilled model whose defaults apply, and why; or None.
        choice_mode: how the candidates of an op are chosen on a GPU (docs/tuning.md).
        source, vae_source, refiner_source: where the model, an autoencoder in its place and a refiner were found.
        _interrupt: True ends calls after their current step, as in diffusers: set by a callback its own call, set from
            elsewhere all that are under way.
    """

    choice_mode = ChoiceMode()
    source: ModelLocation | None = None
    vae_source: ModelLocation | None = None
    refiner_source: ModelLocation | None = None

    def __init__(
        self,
        components: Components,
        device: torch.device,
        dtype: torch.dtype,
        graphs: Graphs | None = None,
        refiner: Components | None = None,
        preview: TAESD | None = None,
        few_step: str | None = None,
        prediction: str | None = None,
    ):
        """graphs: where captured graphs are kept; None runs everything eagerly. The rest: see `from_pretrained`.

        Raises:
            FastsdError: the refiner does not fit the checkpoint.
        """
        self.components, self.refiner, self.device, self.dtype = components, refiner, device, dtype
        self.adapters, self._preview = Adapters(components), preview
        self._assemble(Graphs() if graphs is None else graphs)
        self._own = Defaults(components, few_step, prediction)
        self._take_defaults()
        if refiner is not None:
            check_refiner(self.components, refiner)

    def __repr__(self) -> str:
        return f"<Pipeline of {self.components.name}, {self._dtype_name()} on {self.device}>"

    def _dtype_name(self) -> str:
        return "fp8" if self.fp8 else dtype_name(self.dtype)

    def _take_defaults(self) -> None:
        """The settings of the checkpoint with its active adapters."""
        self.few_step = self._own.few_step(self.adapters.active)
        self.defaults: dict[str, Any] = self._own.settings(self.few_step)
        scheduler = self._own.scheduler(self.few_step)
        if scheduler != self.components.scheduler:
            self.components = replace(self.components, scheduler=scheduler)

    @classmethod
    @named_arguments
    @undisturbed()
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        graphs: bool = True,
        max_graphs: int = MAX_GRAPHS,
        *,
        vae: str | Path | None = None,
        preview: str | Path | None = None,
        prediction: str | None = None,
        few_step: str | None = None,
        ema: bool = False,
        revision: str | None = None,
        allow_pickle: bool = False,
        refiner: str | Path | None = None,
        reproducible: bool = False,
        probe: bool = True,
        **habits: Any,
    ) -> Pipeline:
        """Load a checkpoint.

        Args:
            path: a folder in the diffusers layout, a single file in the original one, or a hub id, `org/name` or
                `org/name/file.safetensors`; or a bundled model, "digits" (the default) or "emoji".
            graphs: on CUDA, capture each shape's work in CUDA graphs at its first use and replay them afterwards.
            max_graphs: how many are kept; an image size takes about four.
            habits: what diffusers' method takes: honoured, or refused with what to use here (docs/python.md).

        Raises:
            FastsdError: no such model, damaged files, no such device or dtype, too little memory, an unfit refiner.
        """
        own = loading_habits(habits, dtype, list(inspect.signature(cls.from_pretrained).parameters)[:-1])
        dtype, allow_pickle = own.get("dtype", dtype), own.get("allow_pickle", allow_pickle)
        if few_step is not None:
            kind_named(few_step)  # before the weights are read
        place = resolve_device(device)
        precision, fp8 = resolve_precision(dtype, place)
        half = precision != torch.float32
        with about("model"):
            found = locate_model(DIGITS if path is None else path, revision, half)
        with about("vae"):
            own_vae = None if vae is None else locate_vae(vae, half)
        with about("model"):
            components = _load(found, precision, place, own_vae, allow_pickle, prediction, ema)
        components.vae.to(autoencoder_dtype(precision, place, components.vae.config.force_upcast))
        second = own_refiner = tiny = None
        if refiner is not None:
            with about("refiner"):
                own_refiner = locate_model(refiner, None, half)
                second = _load(own_refiner, precision, place, components.vae, allow_pickle)
        if preview is not None:
            with about("preview"):
                channels = components.unet.config.out_channels
                tiny = load_preview(locate_vae(preview, half).path, channels, precision, place, allow_pickle)
        recorder = CudaRecorder(place) if graphs and place.type == "cuda" else None
        pipe = cls(components, place, precision, Graphs(recorder, max_graphs), second, tiny, few_step, prediction)
        pipe.source, pipe.vae_source, pipe.refiner_source = found, own_vae, own_refiner
        pipe.choice_mode = ChoiceMode(reproducible, probe)
        return pipe._in_fp8() if fp8 else pipe

    @named_arguments
    def __call__(self, prompt: str | list[str] | None = None, **arguments: Any) -> Any:
        """Generate images.

        Args:
            prompt: a text, or a list of texts, in the syntax of docs/prompts.md; None beside `prompt_embeds`.
            arguments: see below. Where one is missing or None, its default applies, or the checkpoint's own.

        Returns:
            A `Result`; with `return_dict=False` a tuple, as diffusers returns.

        Raises:
            FastsdError: an argument is missing, unknown or out of range; one line that names it.
        """
        with self._lock:  # of this call alone, from its first step to its last
            last = deque(self.stream(prompt, **arguments), maxlen=1).pop()
        assert last.result is not None
        if arguments.get("return_dict") in (None, True):
            return last.result
        return (last.result.images,) if self.components.xl else (last.result.images, None)

    @named_arguments
    def stream(self, prompt: str | list[str] | None = None, **arguments: Any) -> Iterator[Step]:
        """The same work as `__call__`, step by step. Arguments are checked at once, before the first step."""
        has_refiner, few_step = self.refiner is not None, self.few_step is not None
        request = plan(self.components, self.defaults, {"prompt": prompt, **arguments}, has_refiner, few_step)
        notes = [few_step_note(self.few_step, self.defaults)] if self.few_step is not None else []
        known = {composed(name) for one in self.adapters.active for name in (one.path.stem, one.path.name)}
        missing = [
            f"<lora:{tag.name}> is left out of the prompt: no such adapter is set"
            for tag in request.passes[0].prompts.loras
            if composed(tag.name).replace("\\", "/").rpartition("/")[2] not in known  # `<lora:folder/name>`
        ]
        callback = StepCallback.of(request.settings)
        return self._turns(replace(request, notes=(*notes, *request.notes, *missing)), callback, self._changes)

    def _turns(self, request: Request, callback: StepCallback | None, changes: int) -> Iterator[Step]:
        """The loop, during which the weights stay as they were when it was planned."""
        with self._lock:
            if changes != self._changes:
                raise FastsdError("adapters, device or precision changed since the stream was made; make it again")
            self._runs.append(run := Run())
        try:
            yield from self._run(request, callback, run)
        finally:
            self._runs.remove(run)

    def _run(self, request: Request, callback: StepCallback | None, run: Run) -> Iterator[Step]:
        """The loop: batches, passes, rows of the sampler's table."""
        started, done, total = time.perf_counter(), 0, request.total_steps
        timings = {"text": 0.0, "encode": 0.0, "steps": 0.0, "decode": 0.0}
        finished: list[Any] = []
        for which in request.batches:
            first: torch.Tensor | None = None
            for stage in request.passes:
                batch = self._prepare(stage, which, first, timings)
                for row in range(len(stage.table)):
                    with self._turn(stage), timed(timings, "steps"):
                        estimate, latents = batch.denoise(), batch.latents
                    if not stage.ends_step(row):
                        continue
                    done += 1
                    if callback is not None:
                        with callback_of(run):
                            callback(self, batch, row, estimate)
                        latents = batch.latents
                    if done < total and not run.interrupted:
                        yield Step(done, total, latents, self, stage, estimate)
                    if run.interrupted:
                        break
                first = latents = self._finish(batch, stage, timings)
                if run.interrupted:
                    break
            finished.append(self._decode(request, stage, latents, timings))
            if run.interrupted:
                break
        timings["total"] = time.perf_counter() - started
        timings["steps_per_second"] = done / timings["steps"] if timings["steps"] else 0.0
        estimate = Estimate(latents[:1], latents[:1], None)
        result = self._result(request, finished, timings, done)
        yield Step(total, total, latents, self, stage, estimate, result)

    def _prepare(self, stage: Pass, which: slice, first: torch.Tensor | None, timings: Timings) -> Batch:
        with self._turn(stage):
            return prepare(self._engine, stage, which, first, timings)

    def _finish(self, batch: Batch, stage: Pass, timings: Timings) -> torch.Tensor:
        """The latents after the last row. Waits for the device, so that the steps' time is more than their launches."""
        with self._turn(stage), timed(timings, "steps"):
            latents = batch.latents
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # not the device: another thread may capture
            return latents

    def _decode(self, request: Request, stage: Pass, latents: torch.Tensor, timings: Timings) -> Any:
        """A batch's images in the form asked for."""
        form = request.settings.output_type
        if form == "latent":
            return latents.permute(0, 3, 1, 2)
        with self._turn(stage), timed(timings, "decode"):
            if stage.unchanged is not None:
                images = [np.array(stage.unchanged, dtype=np.float32) for _ in latents]
            else:
                images = self._decode_float(latents, stage.vae_tiling)
                if stage.mask is not None:
                    images = [stage.mask.compose_float(image) for image in images]
            return convert_images(images, form)

    def decode(self, latents: torch.Tensor, tiled: bool = False) -> list[Image.Image]:
        """Scaled latents `[n, h, w, C]` to images, one at a time (the decoder's maps are the largest of all)."""
        return list(convert_images(self._decode_float(latents, tiled), "pil"))

    @undisturbed()
    @torch.inference_mode()
    def _decode_float(self, latents: torch.Tensor, tiled: bool) -> list[np.ndarray]:
        """The same as arrays `[H, W, 3]` fp32 from 0 to 255, not rounded."""
        with self._lock, choosing(self.choice_mode):
            self.graphs.in_order(self.device)
            return [self._engine.codec.decode_float(latent[None], tiled)[0] for latent in latents]

    @undisturbed()
    @torch.inference_mode()
    def preview(self, latents: torch.Tensor, tiled: bool = False) -> Image.Image:
        """A scaled latent `[1, h, w, C]` to an image, by the preview's decoder where there is one."""
        with self._lock, choosing(self.choice_mode):
            self.graphs.in_order(self.device)
            return Image.fromarray(self._preview_codec.decode(latents, tiled)[0])

    @contextmanager
    def _turn(self, stage: Pass) -> Iterator[None]:
        """One thread at a time. Out of memory becomes one line that says what would take less."""
        with self._lock, undisturbed(), choosing(self.choice_mode), memory.fitting(stage.workload):
            self.graphs.in_order(self.device)
            yield

    def _result(self, request: Request, finished: list[Any], timings: Timings, done: int) -> Result:
        used = {
            "model": self.components.name,
            "device": self.device.type,
            "dtype": self._dtype_name(),
            "refiner": {"name": self.refiner.name} if self.refiner is not None else None,
            "few_step": self.few_step.kind.name if self.few_step is not None else self._own.asked,
        }
        notes = [*request.notes, *self._engine.codec.take_notes(), *self._preview_codec.take_notes()]
        if isinstance(request.settings.hires_upscaler, Upscaler):
            notes += request.settings.hires_upscaler.take_notes()
        images = join_batches(finished, request.settings.output_type)
        own = list(request.own)[: len(images)]
        if done < request.total_steps:
            notes.append(f"interrupted after step {done} of {request.total_steps}")
        seeds, own_notes = [one["seed"] for one in own], list(request.passes[0].prompts.own_notes)
        return Result(images, seeds, timings, notes, used_settings(request) | used, own, own_notes)

    @named_arguments
    @undisturbed()
    def set_adapters(
        self, adapters: Sequence[Adapter], allow_partial: bool = False, allow_pickle: bool = False
    ) -> list[str]:
        """Apply LoRAs and other adapters to the weights; those of an earlier call are removed, bit for bit.

        Args:
            adapters: files (or PEFT's folders) with their strengths, which add up; an empty list removes all.
            allow_partial: skip layers that the model does not have; otherwise they are an error.
            allow_pickle: read pickles; only tensors and plain values are unpickled.

        Returns:
            Notes on what was skipped.

        Raises:
            FastsdError: no such file, malformed, or for another model; the weights are then unchanged. Or a stream is
                under way; a call of another thread is waited for.
        """
        with self._lock:
            self._change("changing the adapters")
            notes = self.adapters.set(adapters, allow_partial, allow_pickle)
            if self._own.few_step(self.adapters.active) != self.few_step:
                self._take_defaults()
            return notes


def _load(
    found: ModelLocation,
    dtype: torch.dtype,
    device: torch.device,
    vae: ModelLocation | Autoencoder | None,
    allow_pickle: bool,
    prediction: str | None = None,
    ema: bool = False,
) -> Components:
    """A checkpoint that was found, if its weights fit into memory."""
    memory.check_weights(found.path, count_parameters(found.path, dtype), dtype, device)
    own = vae.path if isinstance(vae, ModelLocation) else vae
    components = load_checkpoint(found.path, dtype, device, own, prediction, allow_pickle, ema)
    components.name = found.name or components.name
    return components


Pipeline.__call__.__doc__ = f"{Pipeline.__call__.__doc__}\n{describe('call')}"
vars(Pipeline)["from_pretrained"].__func__.__doc__ = f"{Pipeline.from_pretrained.__doc__}\n{describe('load')}"
