"""A CLIP model of both towers, to score how well an image fits its caption (Radford et al. 2021; Hessel et al. 2021).

It reads a folder as transformers writes it: config.json, model.safetensors, and the tokenizer's files. Names of the
parameters are those of the file. Nothing but evaluation uses it, so that it is plain PyTorch in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fastsd.errors import FastsdError
from fastsd.evaluate.images import BATCH, Pixels, batches
from fastsd.model.tokenizer import Tokenizer
from fastsd.weights.formats.json_file import read_json

# Of CLIP's training images, by channel.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
SPREAD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
MAX_BYTES = 12 * 2**30
FLOATS: dict[str, Any] = {"dtype": torch.float32}  # where: as `with torch.device(...)` says


@dataclass(frozen=True)
class TowerConfig:
    """A transformer: widths, layers, heads, the feed-forward's activation."""

    width: int
    inner: int
    layers: int
    heads: int
    activation: str
    eps: float


class TowerLayer(nn.Module):
    """Attention and feed-forward, each with a norm before it and a residual around it."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        width = config.width
        self.heads, self.activation = config.heads, config.activation
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width, **FLOATS) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, config.eps, **FLOATS) for _ in range(2))
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, config.inner, **FLOATS), "fc2": nn.Linear(config.inner, width, **FLOATS)}
        )

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        h = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](h)
        h = self.mlp["fc1"](self.layer_norm2(x))
        h = F.gelu(h) if self.activation == "gelu" else h * torch.sigmoid(1.702 * h)
        return x + self.mlp["fc2"](h)


class TowerLayers(nn.Module):
    """The layers, under the name that files give them."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.layers = nn.ModuleList(TowerLayer(config) for _ in range(config.layers))

    def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, causal)
        return x


class TextTower(nn.Module):
    """Token ids `[B, L]` to a vector for each text: the last state at its end token."""

    def __init__(self, config: TowerConfig, tokens: int, positions: int):
        super().__init__()
        names = {"token_embedding": tokens, "position_embedding": positions}
        self.embeddings = nn.ModuleDict(
            {name: nn.Embedding(count, config.width, **FLOATS) for name, count in names.items()}
        )
        self.encoder = TowerLayers(config)
        self.final_layer_norm = nn.LayerNorm(config.width, config.eps, **FLOATS)

    def forward(self, ids: torch.Tensor, end_id: int) -> torch.Tensor:
        places = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device)
        x = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"](places)
        x = self.final_layer_norm(self.encoder(x, causal=True))
        end = (ids == end_id).int().argmax(1)
        return x[torch.arange(len(x), dtype=torch.int64, device=x.device), end]


class PatchEmbeddings(nn.Module):
    """Square patches of an image as tokens, after a token for the whole, with learned positions."""

    def __init__(self, width: int, side: int, patch: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(width, **FLOATS))
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False, **FLOATS)
        self.position_embedding = nn.Embedding((side // patch) ** 2 + 1, width, **FLOATS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([whole, patches], 1) + self.position_embedding.weight


class VisionTower(nn.Module):
    """Images `[B, 3, side, side]`, normalised, to a vector for each: the last state of the first token."""

    def __init__(self, config: TowerConfig, side: int, patch: int):
        super().__init__()
        self.embeddings = PatchEmbeddings(config.width, side, patch)
        self.pre_layrnorm = nn.LayerNorm(config.width, config.eps, **FLOATS)  # the files' spelling
        self.encoder = TowerLayers(config)
        self.post_layernorm = nn.LayerNorm(config.width, config.eps, **FLOATS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.encoder(self.pre_layrnorm(self.embeddings(images)), causal=False)
        return self.post_layernorm(x[:, 0])


class ClipModel(nn.Module):
    """Both towers and their projections to one space."""

    def __init__(self, text: dict[str, Any], vision: dict[str, Any], projection: int):
        super().__init__()
        self.side = vision["image_size"]
        self.text_model = TextTower(_tower(text), text["vocab_size"], text["max_position_embeddings"])
        self.vision_model = VisionTower(_tower(vision), self.side, vision["patch_size"])
        self.text_projection = nn.Linear(text["hidden_size"], projection, bias=False, **FLOATS)
        self.visual_projection = nn.Linear(vision["hidden_size"], projection, bias=False, **FLOATS)


def _tower(config: dict[str, Any]) -> TowerConfig:
    return TowerConfig(
        width=config["hidden_size"],
        inner=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        activation=config["hidden_act"],
        eps=config["layer_norm_eps"],
    )


# What a config leaves out (transformers' defaults), and the limits of what is read.
_COMMON: dict[str, Any] = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_LIMITS = {"num_hidden_layers": 100, "vocab_size": 10**6, "image_size": 2048, "max_position_embeddings": 4096}


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its tokenizer: texts and images to unit vectors `[N, D]` float64."""

    model: ClipModel
    tokenizer: Tokenizer

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        parts = []
        for start in range(0, len(texts), BATCH):
            ids = self.tokenizer(list(texts[start : start + BATCH]))
            parts.append(self.model.text_projection(self.model.text_model(ids, self.tokenizer.eos_id)))
        return F.normalize(torch.cat(parts).double(), dim=1).numpy()

    @torch.inference_mode()
    def look(self, images: torch.Tensor) -> torch.Tensor:
        """`[N, H, W, 3]` uint8 to vectors `[N, D]`, not normalised."""
        ready = torch.stack([self._prepare(image.numpy()) for image in images])
        return self.model.visual_projection(self.model.vision_model(ready))

    def images(self, images: Iterable[Pixels]) -> NDArray[np.float64]:
        parts = [self.look(torch.from_numpy(np.stack(part))) for part in batches(images)]
        return F.normalize(torch.cat(parts).double(), dim=1).numpy()

    def scores(self, images: Iterable[Pixels], texts: Sequence[str]) -> NDArray[np.float64]:
        """100 max(cos, 0) of each image and its text (Hessel et al. 2021, with torchmetrics' factor)."""
        found: NDArray[np.float64] = 100 * (self.images(images) * self.texts(texts)).sum(1).clip(0)
        return found

    def _prepare(self, pixels: Pixels) -> torch.Tensor:
        """The shorter side to the model's, bicubic and antialiased; its middle; normalised."""
        image, side = Image.fromarray(pixels), self.model.side
        ratio = side / min(image.size)
        width, height = (max(side, int(length * ratio)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        values = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
        return torch.from_numpy((values - MEAN) / SPREAD).permute(2, 0, 1)


def load_clip(folder: Path) -> Clip:
    """The model in a folder.

    Raises:
        FastsdError: a file is missing or damaged, or they are those of another model.
    """
    config, weights_file = read_json(folder / "config.json"), weights_of(folder)
    text = _COMMON | _TEXT | _object(config, "text_config", folder)
    vision = _COMMON | _VISION | _object(config, "vision_config", folder)
    projection = config.get("projection_dim", 512)
    for table in (text, vision, {"projection_dim": projection}):
        for name, value in table.items():
            wanted = name in _COMMON | _TEXT | _VISION | {"projection_dim": 0} and name not in (
                "hidden_act",
                "layer_norm_eps",
            )
            if wanted and not (isinstance(value, int) and 0 < value <= _LIMITS.get(name, 20_000)):
                raise FastsdError(f"{name} is {value!r}, which no CLIP has", path=folder / "config.json")
    if not {text["hidden_act"], vision["hidden_act"]} <= {"gelu", "quick_gelu"}:
        raise FastsdError("hidden_act should be gelu or quick_gelu", path=folder / "config.json")
    for table in (text, vision):
        eps, width, heads = table["layer_norm_eps"], table["hidden_size"], table["num_attention_heads"]
        if not (isinstance(eps, float) and 0 < eps < 1) or width % heads or vision["image_size"] % vision["patch_size"]:
            raise FastsdError("layer_norm_eps, heads or patches are those of no CLIP", path=folder / "config.json")
    if weights_file.stat().st_size > MAX_BYTES:
        raise FastsdError("is larger than a CLIP model", path=weights_file)
    try:
        weights = load_file(weights_file)
    except Exception as error:  # safetensors' own exception has no public base class
        raise FastsdError(f"cannot be read ({error})", path=weights_file) from error
    with torch.device("meta"):
        model = ClipModel(text, vision, projection)
    wanted_shapes = {name: value.shape for name, value in model.state_dict().items()}
    found = {k: v for k, v in weights.items() if not k.endswith("position_ids") and k != "logit_scale"}
    if {k: v.shape for k, v in found.items()} != wanted_shapes:
        odd = sorted(set(found) ^ set(wanted_shapes)) or [k for k in found if found[k].shape != wanted_shapes[k]]
        raise FastsdError(f"is no CLIP of both towers that fits its config.json ({odd[0]})", path=weights_file)
    model.load_state_dict({k: v.float() for k, v in found.items()}, assign=True)
    return Clip(model.eval(), Tokenizer(folder))


def weights_of(folder: Path) -> Path:
    """The file of a folder's weights.

    Raises:
        FastsdError: there is none.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FastsdError(
            "no such file; a folder of CLIP holds config.json, model.safetensors and a tokenizer", path=path
        )
    return path


def _object(config: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    found = config.get(name)
    if not isinstance(found, dict):
        raise FastsdError(f"has no {name}; a CLIP model of both towers has", path=folder / "config.json")
    return found
