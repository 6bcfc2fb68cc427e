"""The files that the pages' examples name: tiny random models, adapters for them, images, data sets.

A page that names another file needs its name in one of these tables.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastsd.components import Components
from fastsd.model.vae import AutoencoderKL
from fastsd.weights import save_folder
from fastsd.weights.convert import convert
from tests.support import fonts, inception, ip_adapters, original, taesd_files, tiny, upscalers
from tests.support.adapter_writers import our_weights
from tests.support.cli import write_image
from tests.support.pages import blocks
from tests.support.pipelines import MASK, PHOTO
from tests.support.project import ROOT

# Folders, then single files, by family and kind of `original.components`. A hub id is a folder here: a path is used
# before the hub.
FOLDERS = {
    "sd1": (
        *("sd15", "FILE", "path/to/sd", "path/to/sd15", "path/to/stable-diffusion-v1-5"),
        *("stable-diffusion-v1-5/stable-diffusion-v1-5", "my-model", "model-1", "model-2", "my-emoji"),
    ),
    "sdxl": ("sdxl", "stabilityai/sdxl-turbo"),
    "refiner": ("sdxl-refiner",),
    "sd1 InstructPix2Pix": ("timbrooks/instruct-pix2pix", "path/to/instruct-pix2pix"),
    "sd2": ("sd2",),
    "sd2 depth": ("stabilityai/stable-diffusion-2-depth",),
}
SINGLE_FILES = {
    "sd1": (
        *("sd15.safetensors", "file.safetensors", "v1-5-pruned-emaonly.safetensors"),
        *("path/to/sd.safetensors", "path/to/its.safetensors"),
    ),
    "sd2": ("v2-1_768.safetensors",),
    "sdxl": ("sdxl.safetensors",),
}
LORAS = {
    "sd1": ("ink.safetensors", "loras/styles/ink.safetensors", "Hyper-SD15-8steps-lora.safetensors"),
    "sdxl": ("sdxl_lightning_4step_lora.safetensors",),
}
CONTROLNETS = ("canny.safetensors", "pose", "depth")  # a file, and diffusers' folders
IP_ADAPTERS = {
    "sd1": ("models/ip-adapter-plus_sd15.safetensors", "ip-adapter-plus_sd15.safetensors", "ip-adapter.safetensors"),
    "sdxl": ("sdxl_models/ip-adapter_sdxl.safetensors",),
}
UPSCALERS = ("realesr-general-x4v3.safetensors", "4x-UltraSharp.pth")
TINY_DECODERS = ("taesd", "path/to/taesd", "madebyollin/taesd")
PHOTOS = ("photo", "house", "crowd", "beach", "cat", "fox", "style", "pose", "depth", "room", "room-depth")
MASKS = ("door", "face")
DATA_SETS = ("photos", "FOLDER", "data/emoji/train", "data/emoji/held_out")
OF_THE_REPOSITORY = {
    "configs": "configs",
    "data/mnist": "data/mnist",
    "tests": "tests",
    "digit_reader.safetensors": "tests/data/digit_reader.safetensors",
}
A1111 = "a red cat\nNegative prompt: fog\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 8, Size: 64x64"


def write(root: Path) -> None:
    """Write all of them into an empty folder."""
    models = {name: components(*name.split(" ", 1)) for name in FOLDERS}
    for name, paths in FOLDERS.items():
        save_folder(models[name], root / paths[0], torch.float32)
        links(root, *paths)
    for name, paths in SINGLE_FILES.items():
        prediction = original.FAMILIES[name].prediction if name == "sd2" else None
        convert(root / FOLDERS[name][0], root / paths[0], prediction=prediction)
        links(root, *paths)
    torch.save({"state_dict": load_file(root / SINGLE_FILES["sd1"][0])}, root / "old.ckpt")
    write_add_ons(root, models)
    write_images(root)
    for name, source in OF_THE_REPOSITORY.items():
        place(root, name).symlink_to(ROOT / source)
    torch.save(inception.made_up_weights(), root / "pt_inception-2015-12-05-6726825d.pth")
    (requests,) = (block for block in blocks(ROOT / "docs" / "batch.md", ("",)) if block.startswith('{"prompt"'))
    (root / "prompts.jsonl").write_text(requests, encoding="utf-8")


def components(family: str, kind: str = "") -> Components:
    """A tiny model that generates 64x64 in two steps, with an autoencoder that halves the image three times."""
    made = original.components(family, kind)
    made.vae = AutoencoderKL(replace(original.FAMILIES[family].vae, block_out_channels=(32, 32, 32, 32)))
    made.defaults = {"num_inference_steps": 2}
    return made


def place(root: Path, name: str) -> Path:
    """The path of a file in a folder that is made where it is missing."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    return root / name


def links(root: Path, first: str, *others: str) -> None:
    """The other names of a file or folder."""
    for name in others:
        place(root, name).symlink_to(root / first)


def write_add_ons(root: Path, models: dict[str, Components]) -> None:
    """LoRAs, an embedding, ControlNets, IP-Adapters, upscalers, autoencoders."""
    for name, paths in LORAS.items():
        save_file(lora(models[name]), place(root, paths[0]))
        links(root, *paths)
    width = models["sd1"].unet.config.cross_attention_dim
    torch.save({"string_to_param": {"*": torch.randn(2, width)}, "name": "toy"}, root / "toy.pt")
    for name in CONTROLNETS:
        path = root / name
        if not path.suffix:
            path.mkdir()
            (path / "config.json").write_text('{"_class_name": "ControlNetModel"}', encoding="utf-8")
            path /= "diffusion_pytorch_model.safetensors"
        save_file(tiny.controlnet(models["sd1"].unet.config), path)
    for name, paths in IP_ADAPTERS.items():
        folder = place(root, paths[0]).parent
        ip_adapters.write_adapter(folder, models[name].unet).rename(root / paths[0])
        links(root, *paths)
    links(root, "models/image_encoder", "image_encoder")
    upscalers.write_upscaler(root / UPSCALERS[0])
    torch.save(load_file(root / UPSCALERS[0]), root / UPSCALERS[1])
    taesd = taesd_files.make()
    taesd_files.write(taesd, "folder", root / TINY_DECODERS[0])
    links(root, *TINY_DECODERS)
    taesd_files.write(taesd, "two files", root)
    (root / "sdxl-vae-fp16-fix").symlink_to(root / "sdxl" / "vae")


def lora(model: Components) -> dict[str, torch.Tensor]:
    """A LoRA of rank 1 for the first self-attention of the UNet."""
    weights = our_weights(model, "unet")
    name = next(key for key in weights if key.endswith(".attn1.to_q.weight")).removesuffix(".weight")
    rows, columns = weights[f"{name}.weight"].shape
    pair = {"A": torch.full((1, columns), 0.1), "B": torch.full((rows, 1), 0.1)}
    return {f"unet.{name}.lora_{part}.weight": matrix for part, matrix in pair.items()}


def write_images(root: Path) -> None:
    """Images, masks, an image with another program's settings; folders of images with captions; an emoji font."""
    for name in PHOTOS:
        PHOTO.save(root / f"{name}.png")
    PHOTO.save(root / "more.jpg")
    for name in MASKS:
        MASK.save(root / f"{name}.png")
    write_image(root / "a1111.png", parameters=A1111)
    for name in DATA_SETS:
        for number, subject in enumerate(("fort", "sea", "cat", "dog", "tree")):
            PHOTO.rotate(60 * number).save(place(root, f"{name}/{subject}.png"))
            (root / name / f"{subject}.txt").write_text(f"a {subject}", encoding="utf-8")
    font = root / "font/usr/share"
    fonts.write_font(place(font, "fonts/truetype/noto/NotoColorEmoji.ttf"))
    place(font, "doc/fonts-noto-color-emoji/copyright").write_text("SIL Open Font License 1.1\n", encoding="utf-8")
    fonts.write_cldr(root / "cldr" / "node_modules")
