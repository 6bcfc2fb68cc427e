"""Options, lists, and the tools beside: png-info, upscaling."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from fastapi import APIRouter, HTTPException, Request

from fastsd.errors import FastsdError
from fastsd.generate.sizes import RESAMPLING
from fastsd.image.files import read_text
from fastsd.image.infotext import UPSCALERS, parse_parameters, split_pairs, upscaler_named
from fastsd.parameters.passes import LATENT_UPSCALERS
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES
from fastsd.server.a1111.answers import memory, sd_model
from fastsd.server.a1111.bodies import EncodedImage, Upscaling
from fastsd.server.a1111.controlnet import MAX_UNITS, MODULES
from fastsd.server.a1111.extras import enlarge, read_upscaling, refuse_unsupported, unknown_fields
from fastsd.server.a1111.routes import API
from fastsd.server.a1111.translate import NAMES, SETTABLE, check_options
from fastsd.server.app_state import State
from fastsd.server.images import check_pixels, decode_base64, encode_plain
from fastsd.server.jobs import UpscaleOrder

MAX_TEXT = 2**20  # characters of an image's texts that are sent back
NOT_HERE = {
    "interrogate": "fastsd describes no images",
    "create/embedding": "embeddings are not trained here",
    "create/hypernetwork": "hypernetworks are not trained here",
    "train/embedding": "embeddings are not trained here",
    "train/hypernetwork": "hypernetworks are not trained here",
    "extra-batch-images": "send images one by one to extra-single-image",
    "server-kill": "send the server SIGTERM",
    "server-restart": "send the server SIGTERM, and start it again",
    "server-stop": "send the server SIGTERM",
}
EMPTY = ("scripts-info", "script-info", "hypernetworks", "face-restorers", "realesrgan-models", "sd-vae", "sd-modules")


def list_routes(state: State) -> APIRouter:
    """What clients ask for before they generate."""
    router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
    _add_options(router, state)
    _add_names(router, state)
    _add_files(router, state)
    _add_tools(router, state)
    for name, why in NOT_HERE.items():
        router.add_api_route(f"/{name}", _refuse(name, why), methods=["GET", "POST"], include_in_schema=False)
    return router


def _refuse(name: str, why: str) -> Any:
    async def refused() -> None:
        raise HTTPException(404, f"{name} is not supported: {why}")

    return refused


def options(state: State) -> dict[str, Any]:
    """The options that clients read, as they are now."""
    return {
        "samples_format": "png",
        "sd_model_checkpoint": state.current.title,
        "sd_checkpoint_hash": state.current.sha256 or "",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "eta_noise_seed_delta": 0,
        "randn_source": "CPU",
        "emphasis": "Original",
    } | state.options


def _add_options(router: APIRouter, state: State) -> None:
    @router.get("/options")
    async def get_options() -> dict[str, Any]:
        """The options, and the model of requests that name none."""
        return options(state)

    @router.post("/options")
    async def set_options(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Switch the model, and set what requests start from. It returns when the model is loaded.

        Some clients send the whole object back: what is as it was changes nothing.
        """
        request.state.names = NAMES
        before = options(state)
        changed = {name: value for name, value in body.items() if value is not None and before.get(name) != value}
        model = changed.pop("sd_model_checkpoint", None)
        for name in changed:
            if name not in SETTABLE:
                raise FastsdError(f"cannot be set here; {', '.join(SETTABLE)} can", argument=name)
        check_options(changed, state.catalogue)
        if model is not None:
            found = state.catalogue.find_model(str(model), "sd_model_checkpoint")
            if found.name != state.current.name:
                await state.switch(found)
        state.options |= changed
        return {}

    @router.get("/cmd-flags")
    async def flags() -> dict[str, Any]:
        """Of A1111's flags those that clients look at."""
        return {"api": True, "nowebui": False, "lowvram": False, "medvram": False, "no_half": False, "api_auth": None}

    @router.get("/memory")
    async def get_memory() -> dict[str, Any]:
        """Memory of the machine, and of the GPU as of the last batch."""
        return memory(_ram(), state.metrics.gpu_memory)


def _add_names(router: APIRouter, state: State) -> None:
    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """The samplers."""
        return [{"name": s.label, "aliases": [s.name, *s.aliases], "options": {}} for s in SAMPLERS.values()]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """The schedules."""
        named = {"automatic": "Automatic"} | SCHEDULES
        return [
            {"name": name, "label": label, "aliases": [], "default_rho": -1.0, "need_inner_model": False}
            for name, label in named.items()
        ]

    @router.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        """What enlarges pixels. The scale is what A1111's page offers; a request names its own."""
        names = dict.fromkeys(("None", *(UPSCALERS[name] for name in RESAMPLING)))
        files = names | {one.name: one.file_name for one in (await state.listed()).upscalers}
        return [
            {"name": name, "model_name": file and name, "model_path": file, "model_url": None, "scale": 4.0}
            for name, file in files.items()
        ]

    @router.get("/latent-upscale-modes")
    async def latent_modes() -> list[dict[str, str]]:
        """What enlarges latents."""
        return [{"name": UPSCALERS[name]} for name in LATENT_UPSCALERS]

    @router.get("/prompt-styles")
    async def styles() -> list[dict[str, Any]]:
        """The styles of --styles."""
        return [
            {"name": one.name, "prompt": one.prompt, "negative_prompt": one.negative_prompt}
            for one in state.styles.styles.values()
        ]

    @router.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """The scripts of alwayson_scripts."""
        known = ["controlnet"] if state.catalogue.controlnets else []
        return {"txt2img": known, "img2img": known}

    def nothing(name: str) -> Any:
        async def empty() -> list[Any]:
            return []

        empty.__doc__ = f"A1111's {name}, of which there are none here."
        return empty

    for name in EMPTY:
        router.add_api_route(f"/{name}", nothing(name), methods=["GET"])


def _add_files(router: APIRouter, state: State) -> None:
    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """The checkpoints that may be chosen."""
        return [sd_model(one) for one in (await state.listed()).models]

    @router.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        """The LoRAs that prompts may name."""
        return [
            {"name": one.name, "alias": one.name.rpartition("/")[2], "path": one.file_name, "metadata": {}}
            for one in (await state.listed()).loras
        ]

    @router.get("/embeddings")
    async def embeddings() -> dict[str, Any]:
        """The embeddings that prompts may name."""
        unknown = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name", "shape", "vectors"))
        return {"loaded": {one.name: unknown for one in (await state.listed()).embeddings}, "skipped": {}}

    async def refresh() -> dict[str, Any]:
        """Look into the folders again."""
        await asyncio.to_thread(state.catalogue.refresh)
        return {}

    for name in ("refresh-checkpoints", "refresh-loras", "refresh-vae", "refresh-embeddings"):
        router.add_api_route(f"/{name}", refresh, methods=["POST"])

    @router.post("/unload-checkpoint")
    async def unload() -> dict[str, Any]:
        """Free the memory; the next request loads again."""
        if not await state.queue.unload():
            raise HTTPException(409, "work is running; try again when it has ended")
        return {}

    @router.post("/reload-checkpoint")
    async def reload() -> dict[str, Any]:
        """Load the current model."""
        await state.switch(state.current)
        return {}


def _add_tools(router: APIRouter, state: State) -> None:
    @router.post("/png-info")
    async def png_info(body: EncodedImage) -> dict[str, Any]:
        """The settings in an image."""
        return await asyncio.to_thread(read_settings, body.image, state.settings.limits.pixels)

    @router.post("/extra-single-image")
    async def upscale(request: Request, body: Upscaling) -> dict[str, Any]:
        """Enlarge an image by an upscaler that is listed."""
        refuse_unsupported(body)
        notes, pixels, name = unknown_fields(body), state.settings.limits.pixels, body.upscaler_1 or "None"
        enlarging = await asyncio.to_thread(read_upscaling, body, pixels)
        if name == "None" or upscaler_named(name) in RESAMPLING:
            image = await asyncio.to_thread(enlarge, body, enlarging)
        else:
            upscaler = state.catalogue.find_upscaler(name, "upscaler_1")
            order = UpscaleOrder(upscaler, enlarging.image, enlarging.size, pixels, API)
            finished = await state.generate(request, order)
            notes += finished.notes
            image = enlarging.cut(finished.images[0])
        return {"html_info": "; ".join(notes), "image": await encode_plain(image)}


def read_settings(encoded: str, pixels: int) -> dict[str, Any]:
    """A1111's text, every text, and the text's pairs."""
    data = decode_base64(encoded, "image")
    check_pixels(data, "image", pixels)
    texts = {name: text[:MAX_TEXT] for name, text in read_text(data, "image").items()}
    info = texts.get("parameters", "")
    found: dict[str, Any] = {}
    if info:
        settings, _ = parse_parameters(info)
        found = {"Prompt": settings["prompt"], "Negative prompt": settings["negative_prompt"]}
        found |= split_pairs(info.strip().split("\n")[-1])
        width, _, height = str(found.get("Size", "")).partition("x")
        found |= {"Size-1": width, "Size-2": height} if height else {}
    return {
        "info": info,
        "items": {name: text for name, text in texts.items() if name != "parameters"},
        "parameters": found,
    }


def _ram() -> dict[str, int]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    except (AttributeError, ValueError, OSError):
        return {"free": 0, "used": 0, "total": 0}
    return {"free": free, "used": total - free, "total": total}


def controlnet_routes(state: State) -> APIRouter:
    """The routes of A1111's ControlNet extension that clients ask before they use it."""
    router = APIRouter(prefix="/controlnet", tags=["A1111"])

    @router.get("/version")
    async def version() -> dict[str, int]:
        """Of the extension's API."""
        return {"version": 2}

    @router.get("/model_list")
    async def models() -> dict[str, list[str]]:
        """The ControlNets that may be chosen."""
        return {"model_list": [one.name for one in (await state.listed()).controlnets]}

    @router.get("/module_list")
    async def modules() -> dict[str, list[str]]:
        """How images are prepared."""
        return {"module_list": MODULES}

    @router.get("/control_types")
    async def types() -> dict[str, Any]:
        """Modules and ControlNets by kind; there is one kind."""
        names = [one.name for one in (await state.listed()).controlnets]
        every = {"module_list": MODULES, "model_list": ["None", *names]}
        return {"control_types": {"All": every | {"default_option": "none", "default_model": "None"}}}

    @router.get("/settings")
    async def settings() -> dict[str, int]:
        """How many ControlNets a request may have."""
        return {"control_net_unit_count": MAX_UNITS}

    return router
