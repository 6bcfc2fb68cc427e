"""Text to image, image to image, inpainting: one loop.

The loop is a generator: progress, preview and cancelling are what the caller does between its items.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fastsd import memory
from fastsd.denoiser import Denoiser, Run
from fastsd.devices import dtype_name, resolve_device, resolve_dtype
from fastsd.errors import FastsdError
from fastsd.graph import MAX_GRAPHS, CudaRecorder, Graphs, chosen_convolutions
from fastsd.latents import InpaintMask, Noise, encode_image, image_tensor, to_channels_last
from fastsd.model.tiling import decode_tiled
from fastsd.request import Request, make_request
from fastsd.sampling import advance
from fastsd.sampling.schedule import alphas_cumprod
from fastsd.script import Script, batches, write_script
from fastsd.weights import Components, count_numbers, load_checkpoint
from fastsd.weights.adapters import Adapter, Adapters
from fastsd.weights.embeddings import load_embedding

BUNDLED = Path(__file__).parent / "assets" / "digits"


@dataclass
class Result:
    """What a call returns.

    Attributes:
        images: a list of PIL images; or an array `[N, H, W, 3]` in [0, 1] ("np"), a tensor `[N, 3, H, W]` in [0, 1]
            ("pt"), or scaled latents `[N, C, h, w]` ("latent").
        seeds: one for each image.
        timings: seconds for "text", "encode", "steps", "decode", "total"; "steps_per_second".
        notes: what the user should know, a line each.
        parameters: every setting that the images depend on, as used.
    """

    images: Any
    seeds: list[int]
    timings: dict[str, float]
    notes: list[str]
    parameters: dict[str, Any]


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
    _estimate: _Estimate = field(repr=False)
    result: Result | None = None

    def preview(self) -> Image.Image:
        """The batch's first picture, as the network expects it to end."""
        return self._pipeline.decode(self._pipeline.denoised(self._estimate))[0]


class _Estimate(NamedTuple):
    """What the network was given and said of a batch's first image, `[1, h, w, C]` each."""

    x_in: torch.Tensor
    out: torch.Tensor
    timestep: float


@dataclass(frozen=True)
class _Batch:
    """One batch on its way: the denoiser's tensors, and what happens to them between its rows."""

    run: Run
    script: Script
    noise: Noise
    start_noise: torch.Tensor  # [n, h, w, C]
    image: torch.Tensor | None  # [n, h, w, C]
    mask: torch.Tensor | None  # [1, h, w, 1]: latents outside it follow the picture


class Pipeline:
    """A checkpoint, ready to draw."""

    def __init__(self, components: Components, device: torch.device, dtype: torch.dtype, graphs: Graphs | None = None):
        """graphs: where captured graphs are kept; None runs everything eagerly."""
        self.components, self.device, self.dtype = components, device, dtype
        self.graphs = Graphs() if graphs is None else graphs
        self.adapters = Adapters(components)
        self._denoiser = Denoiser(components.unet, dtype, self.graphs)
        self._news: list[str] = []  # what the next result should say beside the request's notes
        self._lock = threading.RLock()  # one call works at a time: graphs have buffers of their own
        size = components.sample_size * components.vae.config.downscale
        self.defaults: dict[str, Any] = {
            "num_inference_steps": 30,
            "guidance_scale": 7.5,
            "width": size,
            "height": size,
            "sampler": components.scheduler.sampler,
            "schedule": components.scheduler.schedule,
        } | components.defaults

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
        prediction: str | None = None,
        allow_pickle: bool = False,
    ) -> Pipeline:
        """Load a checkpoint.

        Args:
            path: a folder in the diffusers layout, or a single file in the original one; None or "digits" is the
                bundled model.
            device: "auto" (CUDA where there is a GPU), "cpu", "cuda", "cuda:1".
            dtype: "auto" (CUDA: fp16; a CPU with avx512_bf16 or amx_bf16: bf16; else fp32), "fp32", "fp16", "bf16".
            graphs: on CUDA, capture each shape's work in CUDA graphs at its first use and replay them afterwards.
            max_graphs: how many are kept; a picture size takes about four.
            vae: an autoencoder to take instead of the checkpoint's own: a file or a folder.
            prediction: "epsilon", "v_prediction" or "sample": what the network predicts, where the checkpoint does not
                say or says it wrongly.
            allow_pickle: read `.ckpt` files; nothing but tensors and plain values is unpickled.

        Raises:
            FastsdError: no such model, damaged files, unknown device or dtype, too little memory.
        """
        place = resolve_device(device)
        precision = resolve_dtype(dtype, place)
        source = BUNDLED if path in (None, "digits") else Path(path)
        memory.check_weights(source, count_numbers(source, precision), precision, place)
        components = load_checkpoint(source, precision, place, vae, prediction, allow_pickle)
        if precision == torch.float16 and components.vae.config.force_upcast:
            components.vae.float()  # its activations overflow fp16
        recorder = CudaRecorder(place) if graphs and place.type == "cuda" else None
        return cls(components, place, precision, Graphs(recorder, max_graphs))

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
            sampler, schedule: names in `fastsd.sampling.tables.SAMPLERS`; "default", "karras", ...
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

        Raises:
            FastsdError: an argument is missing, unknown or out of range; one line that names it.
        """
        with self._lock:
            last = deque(self.stream(prompt, **arguments), maxlen=1).pop()
        assert last.result is not None
        return last.result

    def load_embedding(self, path: str | Path, token: str | None = None, allow_pickle: bool = False) -> tuple[str, ...]:
        """Load a textual inversion, to be called by its name in prompts (Gal et al. 2022).

        Args:
            path: a `.safetensors` file; `.pt` and `.bin` are pickles and are read only with `allow_pickle`.
            token: its name in prompts; None: the file's without the ending, and the token that the file names.
            allow_pickle: see there; nothing but tensors and plain values is unpickled.

        Returns:
            The names; one that was known before now stands for this file.

        Raises:
            FastsdError: no such file, malformed, or one for another family of models.
        """
        embedding = load_embedding(path, self.components.text_encoders, token, allow_pickle)
        self.components.embeddings |= dict.fromkeys(embedding.names, embedding)
        return embedding.names

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
            return self.adapters.set(adapters, allow_partial)

    def stream(self, prompt: str | list[str], **arguments: Any) -> Iterator[Step]:
        """The same work as `__call__`, step by step; arguments are checked before the first step is asked for."""
        request = make_request(self.components, self.defaults, prompt, **arguments)
        known = {adapter.path.stem for adapter in self.adapters.active}
        missing = [
            f"<lora:{tag.name}:{tag.weight:g}> is left out of the prompt: no such adapter is set"
            for tag in request.loras
            if tag.name not in known
        ]
        return self._run(replace(request, notes=(*request.notes, *missing)))

    def _run(self, request: Request) -> Iterator[Step]:
        """All batches of a request; the loop over steps is here."""
        started = time.perf_counter()
        clock = {"text": 0.0, "encode": 0.0, "steps": 0.0, "decode": 0.0}
        table = request.table
        parts = batches(request)
        total, done = len(parts) * len(set(table.step)), 0
        finished: list[Any] = []
        for which in parts:
            with self._lock:
                batch = self._begin(request, which, clock)
            for i in range(len(table)):
                with self._lock:
                    tick = time.perf_counter()
                    estimate = self._advance(batch)
                    clock["steps"] += time.perf_counter() - tick
                step_ends = i + 1 == len(table) or table.step[i + 1] != table.step[i]
                if step_ends and (done := done + 1) < total:
                    yield Step(done, total, batch.run.state.x.clone(), self, estimate)
            with self._lock:
                tick = time.perf_counter()
                latents = batch.run.state.x.clone()
                finished.append(self._finish(request, latents))
                clock["decode"] += time.perf_counter() - tick
        clock["total"] = time.perf_counter() - started
        clock["steps_per_second"] = total / clock["steps"] if clock["steps"] else 0.0
        estimate = _Estimate(latents[:1], latents[:1], math.nan)
        yield Step(total, total, latents, self, estimate, self._result(request, finished, clock))

    @torch.inference_mode()
    def _begin(self, request: Request, which: slice, clock: dict[str, float]) -> _Batch:
        """Everything that does not depend on the loop: text, time, picture, noise."""
        config = self.components.vae.config
        seeds = request.seeds[which]
        height, width = request.height // config.downscale, request.width // config.downscale
        noise = Noise(seeds, config.latent_channels, height, width, self.device)
        tick = time.perf_counter()
        script = write_script(self.components, request, which, self.device, self.graphs)
        clock["text"] += time.perf_counter() - tick

        tick = time.perf_counter()
        image = mask = extra = None
        inpaints = self.components.unet.config.in_channels == 9
        if request.image is not None and not (inpaints and request.strength == 1.0):
            image = self._encode(image_tensor(request.image), noise, request.vae_tiling)
        given = request.latents
        start_noise = noise.draw() if given is None else to_channels_last(given[which]).to(self.device)
        if request.image is not None and request.mask is not None:
            regions = InpaintMask.from_image(request.mask, config.downscale)
            if inpaints:
                kept = image_tensor(request.image) * (regions.pixels < 0.5)
                masked = self._encode(kept, noise, request.vae_tiling)
                extra = torch.cat([regions.latents.to(self.device).expand(len(seeds), -1, -1, -1), masked], dim=-1)
            else:
                mask = regions.latents.to(self.device)
        clock["encode"] += time.perf_counter() - tick
        pure_noise = request.mask is not None and request.strength == 1.0
        state = advance.begin(request.table, start_noise, None if pure_noise else image)
        guided, rescaled = request.guidance_scale != 1.0, request.guidance_rescale > 0
        run = Run(
            state,
            script.time,
            key_values=(),  # each row's own, see _advance
            guidance=state.x.new_tensor([request.guidance_scale]) if guided else None,
            rescale=state.x.new_tensor([request.guidance_rescale]) if guided and rescaled else None,
            extra_channels=extra,
        )
        return _Batch(run, script, noise, start_noise, image, mask)

    def _encode(self, image: torch.Tensor, noise: Noise, tiled: bool) -> torch.Tensor:
        with chosen_convolutions(self.device):
            return encode_image(self.components.vae, image, noise, tiled, self.graphs)

    @torch.inference_mode()
    def _advance(self, batch: _Batch) -> _Estimate:
        """One row of the table: one call of the UNet, one update of the state."""
        state = batch.run.state
        batch.run.key_values = batch.script.at(state.index)
        x_in, timestep = advance.model_input(state)[:1].clone(), advance.timestep(state)
        fresh = batch.noise.draw() if advance.draws(state) else None
        with chosen_convolutions(self.device):
            out = self._denoiser.step(batch.run, fresh)
        state = batch.run.state
        if batch.mask is not None and batch.image is not None:
            advance.hold(state, batch.image, batch.start_noise, batch.mask)
        return _Estimate(x_in, out[-len(state.x) :][:1].clone(), timestep)

    def denoised(self, estimate: _Estimate) -> torch.Tensor:
        """The clean latent that the network's (conditional) output speaks for, `[1, h, w, C]`."""
        x_in, out = estimate.x_in, estimate.out.float()
        if math.isnan(estimate.timestep):
            return x_in  # it is clean
        scheduler = self.components.scheduler
        levels = alphas_cumprod(scheduler)
        signal = float(levels[min(max(round(estimate.timestep), 0), len(levels) - 1)])
        alpha, sigma = signal**0.5, (1.0 - signal) ** 0.5
        if scheduler.prediction_type == "sample":
            return out
        if scheduler.prediction_type == "v_prediction":
            return alpha * x_in - sigma * out
        return (x_in - sigma * out) / max(alpha, 1e-3)

    def _finish(self, request: Request, x: torch.Tensor) -> Any:
        """A batch's pictures from its last state, in the form asked for."""
        if request.output_type == "latent":
            return x.permute(0, 3, 1, 2)
        images = self.decode(x, request.vae_tiling)
        if request.image is not None and request.mask is not None:
            regions = InpaintMask.from_image(request.mask, self.components.vae.config.downscale)
            images = [regions.compose(request.image, image) for image in images]
        if request.output_type == "pil":
            return images
        array = np.stack([np.asarray(image, dtype=np.float32) / 255.0 for image in images])
        return array if request.output_type == "np" else torch.from_numpy(array).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, tiled: bool = False) -> list[Image.Image]:
        """Scaled latents `[n, h, w, C]` to pictures, one at a time (the decoder's maps are the largest of all)."""
        with self._lock:
            return [Image.fromarray(self._pixels(latent[None], tiled)[0]) for latent in latents]

    def _pixels(self, latent: torch.Tensor, tiled: bool) -> np.ndarray:
        """`[1, h, w, C]` to `[1, H, W, 3]` uint8.

        A single value that is not finite is no picture: the autoencoder then goes to fp32 for good, and that is said.
        """
        vae = self.components.vae
        image = self._decode(latent, tiled)
        if not bool(torch.isfinite(image).all()) and vae.post_quant_conv.weight.dtype != torch.float32:
            vae.float()
            self.graphs.forget()  # they hold the weights that are gone
            self._news.append(f"the autoencoder overflowed in {dtype_name(self.dtype)}; it runs in fp32 from now on")
            image = self._decode(latent, tiled)
        if not bool(torch.isfinite(image).all()):
            raise FastsdError("the picture is not finite: the model overflowed; dtype fp32 or bf16 may help")
        return (image.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()

    def _decode(self, latent: torch.Tensor, tiled: bool) -> torch.Tensor:
        vae = self.components.vae
        z = (latent / vae.config.scaling_factor).to(vae.post_quant_conv.weight.dtype)
        with chosen_convolutions(self.device):
            return decode_tiled(vae, z) if tiled else self.graphs("decode", vae.decode, z)

    def _result(self, request: Request, finished: list[Any], clock: dict[str, float]) -> Result:
        if request.output_type == "pil":
            images: Any = [image for part in finished for image in part]
        elif request.output_type == "np":
            images = np.concatenate(finished)
        else:
            images = torch.cat(finished)
        names = (
            "num_inference_steps",
            "guidance_scale",
            "guidance_rescale",
            "width",
            "height",
            "sampler",
            "schedule",
            "eta",
            "clip_skip",
        )
        parameters = {name: getattr(request, name) for name in names}
        parameters |= {
            "model": self.components.name,
            "device": self.device.type,
            "dtype": dtype_name(self.dtype),
            "prompts": list(request.prompts),
            "negative_prompts": list(request.negative_prompts),
            "strength": request.strength if request.image is not None else None,
            "prompt_syntax": request.prompt_syntax if request.prompt_syntax != "a1111" else None,
            "embeddings": list(request.embeddings),
        }
        notes, self._news = [*request.notes, *self._news], []
        return Result(images, list(request.seeds), clock, notes, parameters)
