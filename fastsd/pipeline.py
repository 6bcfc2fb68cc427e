"""Text to image, image to image, inpainting: one loop.

The loop is a generator: progress, preview and cancelling are what the caller does between its items.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastsd.components import Components, Embedding
from fastsd.few_step import kind_named
from fastsd.generate.batch import Engine, begin, check_refiner, seconds
from fastsd.generate.conditioning import batches
from fastsd.generate.defaults import Defaults, few_step_note, steps_from_image
from fastsd.generate.denoiser import Estimate
from fastsd.generate.latents import Codec, InpaintMask, enlarge
from fastsd.generate.request import Request, make_request
from fastsd.generate.result import Result, in_form, joined, settings
from fastsd.graph import MAX_GRAPHS, CudaRecorder, Graphs
from fastsd.model.controlnet import ControlNet
from fastsd.model.taesd import TAESD
from fastsd.runtime import memory
from fastsd.runtime.devices import dtype_name, resolve_device, resolve_dtype
from fastsd.weights import count_numbers, load_checkpoint, load_preview
from fastsd.weights.adapters.apply import Adapter, Adapters
from fastsd.weights.adapters.embeddings import load_embedding
from fastsd.weights.hub.hub_id import Place
from fastsd.weights.hub.locate import locate_controlnet, locate_file, locate_model, locate_vae
from fastsd.weights.layouts.controlnet import load_controlnet

BUNDLED = Path(__file__).parent / "assets" / "digits"


@dataclass
class Step:
    """One finished step of the loop. `result` is set on the last.

    Attributes:
        index: how many steps are done, over all batches; `total`: how many there will be.
        latents: `[n, h, w, C]` fp32, the batch's state after the step.
    """

    index: int
    total: int
    latents: torch.Tensor
    _pipeline: Pipeline = field(repr=False)
    _request: Request = field(repr=False)
    _estimate: Estimate = field(repr=False)
    result: Result | None = None

    def preview(self) -> Image.Image:
        """The batch's first picture, as the network expects it to end; in tiles where the picture will be."""
        latent = self._estimate.denoised(self._pipeline.components.scheduler)
        return self._pipeline.preview(latent, self._request.vae_tiling)


class Pipeline:
    """A checkpoint, ready to draw.

    Attributes:
        defaults: arguments of a call where the caller gives none.
        few_step: the kind of distilled model whose defaults are in force, and why; or None.
        source, vae_source, refiner_source: where `from_pretrained` found the model, an autoencoder that is not its own,
            a refiner.
    """

    source: Place | None = None
    vae_source: Place | None = None
    refiner_source: Place | None = None

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
            FastsdError: the refiner cannot go on with what the checkpoint began.
        """
        self.components, self.refiner, self.device, self.dtype = components, refiner, device, dtype
        self.graphs = Graphs() if graphs is None else graphs
        self.adapters = Adapters(components)
        self._engine = Engine(components, device, dtype, self.graphs, refiner)
        self._preview_codec = self._engine.codec if preview is None else Codec(preview, self.graphs)
        self._lock = threading.RLock()  # one call works at a time: graphs have buffers of their own
        self._own = Defaults(components, few_step, prediction)
        self._take_defaults()
        if refiner is not None:
            check_refiner(self.components, refiner)

    def _take_defaults(self) -> None:
        """The settings of the checkpoint with the adapters that are in it."""
        self.few_step = self._own.few_step(self.adapters.active)
        self.defaults: dict[str, Any] = self._own.settings(self.few_step)
        scheduler = self._own.scheduler(self.few_step)
        if scheduler != self.components.scheduler:
            self.components = replace(self.components, scheduler=scheduler)

    @classmethod
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
    ) -> Pipeline:
        """Load a checkpoint.

        Args:
            path: a folder in the diffusers layout, or a single file in the original one; a hub id, `org/name` or
                `org/name/file.safetensors` (`fastsd.weights.hub.locate`); None or "digits" is the bundled model.
            device: "auto" (CUDA where there is a GPU), "cpu", "cuda", "cuda:1".
            dtype: "auto" (CUDA: fp16; a CPU with avx512_bf16 or amx_bf16: bf16; else fp32), "fp32", "fp16", "bf16".
            graphs: on CUDA, capture each shape's work in CUDA graphs at its first use and replay them afterwards.
            max_graphs: how many are kept; a picture size takes about four.
            vae: an autoencoder to take instead of the checkpoint's own, TAESD or another: a file, a folder or a hub id.
            preview: TAESD, whose decoder then draws `Step.preview` in the autoencoder's place, many times as fast.
            prediction: "epsilon", "v_prediction" or "sample": what the network predicts, where the checkpoint does not
                say or says it wrongly.
            few_step: "lcm", "turbo", "lightning", "lightning-1" or "hyper": a model (or a LoRA that will be set) that
                was distilled to few steps, which changes the defaults; "none": not so, whatever the files say.
            ema: take the weights of a single file's UNet as training averaged them (`model_ema.*`).
            revision: of a hub id: a branch, tag or commit.
            allow_pickle: read `.ckpt` files; nothing but tensors and plain values is unpickled.
            refiner: another checkpoint, which does the last steps (Podell et al. 2023, section 2.5): SDXL's refiner, or
                any with the same latents and noise schedule. It uses the first one's autoencoder.

        Raises:
            FastsdError: no such model, damaged files, unknown device or dtype, too little memory, a refiner that does
                not go with the model; or the hub's model cannot be fetched.
        """
        if few_step is not None:
            kind_named(few_step)  # before the weights are read
        place = resolve_device(device)
        precision = resolve_dtype(dtype, place)
        half = precision != torch.float32
        found = locate_model(BUNDLED if path is None or path == "digits" else path, revision, half)
        own_vae = None if vae is None else locate_vae(vae, half)
        memory.check_weights(found.path, count_numbers(found.path, precision), precision, place)
        components = load_checkpoint(
            found.path, precision, place, own_vae.path if own_vae else None, prediction, allow_pickle, ema
        )
        components.name = found.name or components.name
        if precision == torch.float16 and components.vae.config.force_upcast:
            components.vae.float()  # its activations overflow fp16
        second, own_refiner = None, None if refiner is None else locate_model(refiner, None, half)
        if own_refiner is not None:
            memory.check_weights(own_refiner.path, count_numbers(own_refiner.path, precision), precision, place)
            second = load_checkpoint(own_refiner.path, precision, place, components.vae, None, allow_pickle)
            second.name = own_refiner.name or second.name
        tiny = None
        if preview is not None:
            latents = components.unet.config.out_channels
            tiny = load_preview(locate_vae(preview, half).path, latents, precision, place, allow_pickle)
        recorder = CudaRecorder(place) if graphs and place.type == "cuda" else None
        pipe = cls(components, place, precision, Graphs(recorder, max_graphs), second, tiny, few_step, prediction)
        pipe.source, pipe.vae_source, pipe.refiner_source = found, own_vae, own_refiner
        return pipe

    def __call__(self, prompt: str | list[str], **arguments: Any) -> Result:
        """Draw pictures.

        Args:
            prompt: a text, or a list of texts, in the syntax of docs/prompts.md.
            negative_prompt: what to stay away from; a text, or one for each prompt.
            num_inference_steps: denoising steps. None here and below: the checkpoint's own default.
            guidance_scale: how strongly to follow the prompt (Ho and Salimans 2022); 1 skips the unconditional half.
            guidance_rescale: 0 to 1, pulls the guided prediction back to its old spread (Lin et al. 2024, section 3.4).
            width, height: pixels; multiples of the model's factor (8 for Stable Diffusion).
            seed: of the first image; the k-th image has seed + k. None: a random one, reported in the result.
            sampler, schedule: names in `fastsd.sampling.samplers.SAMPLERS`; "default", "karras", ...
            eta: DDIM's share of fresh noise, 0 to 1.
            num_images_per_prompt: images for each prompt.
            batch_size: how many run together; changes speed and memory, not the pictures.
            image: a PIL image to start from; `strength` 0 to 1 says how much of it to redo.
            mask_image: a PIL image; white is painted anew, black comes back exactly as it was.
            clip_skip: last layers of the text encoder to leave out, 1 meaning none.
            latents: starting noise `[N, C, h, w]`, unit variance.
            output_type: "pil", "np", "pt" or "latent".
            vae_tiling: run the autoencoder in tiles; None: only for very large pictures.
            prompt_syntax: "a1111" (weights, schedules, long prompts), or "plain": the text as it is, cut to one chunk.
            controls: `fastsd.Control`s, pictures that ControlNets (`load_controlnet`) read.
            hires_scale: draw, enlarge by this factor (1 to 8) and draw over it, image-to-image, with `hires_strength`;
                None: once. width and height are those of the first pass.
            hires_strength: how much the second pass redoes, 0 to 1.
            hires_steps: of the second pass, of which it runs the share `hires_strength`; None: `num_inference_steps`.
            hires_upscaler: "latent" (bilinear, of the latents) or "lanczos" (of the picture).
            refiner_switch: the share of the noise levels, from the highest, that the model does before the refiner.

        Raises:
            FastsdError: an argument is missing, unknown or out of range; one line that names it.
        """
        with self._lock:  # of this call alone, from its first step to its last
            last = deque(self.stream(prompt, **arguments), maxlen=1).pop()
        assert last.result is not None
        return last.result

    def load_embedding(self, path: str | Path, token: str | None = None, allow_pickle: bool = False) -> tuple[str, ...]:
        """Load a textual inversion, to be called by its name in prompts (Gal et al. 2022).

        Args:
            path: a `.safetensors` file, of the hub too; `.pt` and `.bin` are pickles, read only with `allow_pickle`.
            token: its name in prompts; None: the file's without the ending, and the token that the file names.
            allow_pickle: see there; nothing but tensors and plain values is unpickled.

        Returns:
            The names; one that was known before now stands for this file.

        Raises:
            FastsdError: no such file, malformed, or one for another family of models.
        """
        models = [one for one in (self.components, self.refiner) if one is not None]
        most = max((one.text_encoders for one in models), key=len)
        embedding = load_embedding(locate_file(path).path, most, token, allow_pickle)
        for one in models:
            vectors = embedding.vectors[-len(one.text_encoders) :]  # SDXL's refiner has the second encoder alone
            fits = zip(vectors, one.text_encoders, strict=True)
            if all(vector.shape[1] == encoder.config.hidden_size for vector, encoder in fits):
                one.embeddings |= dict.fromkeys(embedding.names, Embedding(embedding.names, vectors))
        return embedding.names

    def load_controlnet(self, path: str | Path, allow_pickle: bool = False) -> ControlNet:
        """Load a ControlNet for this checkpoint's UNet, to be used in `Control`s (Zhang et al. 2023).

        Args:
            path: a diffusers folder, a single file in diffusers' or the original layout, or a hub id.
            allow_pickle: read `.pth` files; nothing but tensors and plain values is unpickled.

        Raises:
            FastsdError: no such file, malformed, too large for the memory, or one for another family of models.
        """
        path = locate_controlnet(path, self.dtype != torch.float32).path
        return load_controlnet(path, self.components.unet.config, self.dtype, self.device, allow_pickle)

    def set_adapters(self, adapters: Sequence[Adapter], allow_partial: bool = False) -> list[str]:
        """Put LoRAs and their relatives into the weights; those of an earlier call are taken out, to the bit.

        Args:
            adapters: files (or PEFT's folders) with their strengths, added up; none takes all out.
            allow_partial: leave out layers that the model does not have; otherwise they are an error.

        Returns:
            Notes: what was left out.

        Raises:
            FastsdError: no such file, malformed, or one for another model; the weights are then as before.
        """
        with self._lock:
            notes = self.adapters.set(adapters, allow_partial)
            if self._own.few_step(self.adapters.active) != self.few_step:
                self._take_defaults()
            return notes

    def stream(self, prompt: str | list[str], **arguments: Any) -> Iterator[Step]:
        """The same work as `__call__`, step by step; arguments are checked before the first step is asked for."""
        if self.few_step is not None:
            arguments = self._with_enough_steps(arguments)
        request = make_request(self.components, self.defaults, prompt, refines=self.refiner is not None, **arguments)
        known = {adapter.path.stem for adapter in self.adapters.active}
        missing = [
            f"<lora:{tag.name}> is left out of the prompt: no such adapter is set"
            for tag in request.wording.loras
            if tag.name not in known
        ]
        few = [few_step_note(self.few_step, self.defaults)] if self.few_step is not None else []
        return self._run(replace(request, notes=(*few, *request.notes, *missing)))

    def _with_enough_steps(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call; where their number is not said, with steps enough to start from a picture."""
        steps = arguments.get("num_inference_steps")
        more: dict[str, Any] = {}
        if steps is None and arguments.get("image") is not None:
            steps = steps_from_image(self.defaults["num_inference_steps"], arguments.get("strength", 0.8))
            more["num_inference_steps"] = steps
        if arguments.get("hires_scale") is not None and arguments.get("hires_steps") is None:
            first = self.defaults["num_inference_steps"] if steps is None else steps
            more["hires_steps"] = steps_from_image(first, arguments.get("hires_strength", 0.5))
        return arguments | more

    def _run(self, request: Request) -> Iterator[Step]:
        """All batches of a request; the loop over steps is here."""
        started = time.perf_counter()
        clock = {"text": 0.0, "encode": 0.0, "steps": 0.0, "decode": 0.0}
        parts = batches(request)
        total, done = len(parts) * sum(len(set(one.table.step)) for one in request.passes), 0
        finished: list[Any] = []
        for which in parts:
            start: torch.Tensor | list[Image.Image] | None = None
            for one in request.passes:
                with self._turn(one):
                    batch = begin(self._engine, one, which, clock, start)
                for i in range(len(one.table)):
                    with self._turn(one), seconds(clock, "steps"):
                        estimate, latents = batch.advance(self.device), batch.run.state.x.clone()
                    step_ends = i + 1 == len(one.table) or one.table.step[i + 1] != one.table.step[i]
                    if step_ends and (done := done + 1) < total:
                        yield Step(done, total, latents, self, one, estimate)
                with self._turn(one):
                    with seconds(clock, "steps"):
                        latents = batch.run.state.x.clone()
                        self._wait()  # or the seconds of the steps would be those of launching them
                    with seconds(clock, "decode"):
                        if one.hires is not None:
                            start = self._enlarge(one, latents)
                        else:
                            finished.append(self._finish(one, latents))
        clock["total"] = time.perf_counter() - started
        clock["steps_per_second"] = total / clock["steps"] if clock["steps"] else 0.0
        estimate = Estimate(latents[:1], latents[:1], None)
        yield Step(total, total, latents, self, one, estimate, self._result(request, finished, clock))

    @torch.inference_mode()
    def _enlarge(self, request: Request, latents: torch.Tensor) -> torch.Tensor | list[Image.Image]:
        """What the second pass starts from, out of the last state of the first `[n, h, w, C]`."""
        assert request.hires is not None
        width, height = request.hires.width, request.hires.height
        if request.hires_upscaler == "lanczos":
            pictures = self.decode(latents, request.vae_tiling)
            return [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
        factor = self.components.vae.config.downscale
        return enlarge(latents, height // factor, width // factor)

    def _finish(self, request: Request, x: torch.Tensor) -> Any:
        """A batch's pictures from its last state, in the form asked for."""
        if request.output_type == "latent":
            return x.permute(0, 3, 1, 2)
        images = self.decode(x, request.vae_tiling)
        if request.image is not None and request.mask is not None:
            regions = InpaintMask.from_image(request.mask, self.components.vae.config.downscale)
            images = [regions.compose(request.image, image) for image in images]
        return in_form(images, request.output_type)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, tiled: bool = False) -> list[Image.Image]:
        """Scaled latents `[n, h, w, C]` to pictures, one at a time (the decoder's maps are the largest of all)."""
        with self._lock:
            self.graphs.in_order(self.device)
            return [Image.fromarray(self._engine.codec.decode(latent[None], tiled)[0]) for latent in latents]

    @torch.inference_mode()
    def preview(self, latents: torch.Tensor, tiled: bool = False) -> Image.Image:
        """A scaled latent `[1, h, w, C]` to a picture, by the preview's decoder where there is one."""
        with self._lock:
            self.graphs.in_order(self.device)
            return Image.fromarray(self._preview_codec.decode(latents, tiled)[0])

    @contextmanager
    def _turn(self, request: Request) -> Iterator[None]:
        """One thread at a time; that memory ran out is said in one line with what would take less."""
        with self._lock:
            self.graphs.in_order(self.device)
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise memory.too_large(request.picture) from error

    def _wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _result(self, request: Request, finished: list[Any], clock: dict[str, float]) -> Result:
        refiner, few_step = self.refiner, self.few_step
        used = {
            "model": self.components.name,
            "device": self.device.type,
            "dtype": dtype_name(self.dtype),
            "refiner": {"name": refiner.name} if refiner is not None else None,
            "few_step": few_step.kind.name if few_step is not None else self._own.asked,
        }
        notes = [*request.notes, *self._engine.codec.news(), *self._preview_codec.news()]
        return Result(
            joined(finished, request.output_type), list(request.seeds), clock, notes, settings(request) | used
        )
