"""Which family a single file belongs to, and its configs: from its keys and their shapes, never from its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastsd.config import CLIPConfig, SchedulerConfig, UNetConfig, VAEConfig
from fastsd.errors import FastsdError
from fastsd.few_step import Detection
from fastsd.weights.few_step import detect_in_metadata, detect_in_unet
from fastsd.weights.layouts.ldm_names import UNET_PREFIX, VAE_PREFIX

Shapes = Mapping[str, tuple[int, ...]]

# What keys that start so, or that hold such a part, belong to, where a file is no checkpoint.
_OTHERS = (
    (("control_model.", "input_hint_block.", "controlnet_cond_embedding."), "a ControlNet"),
    (("double_blocks.", "joint_blocks.", "single_transformer_blocks."), "a Flux or Stable Diffusion 3 model"),
    (("lora_", ".lora", "hada_w", "lokr_w"), "a LoRA or another adapter"),
    (("down_blocks.0.resnets", "up_blocks.0.resnets"), "one part of a diffusers folder; give the folder"),
    (("encoder.down.", "decoder.up."), "an autoencoder, which --vae takes"),
    (("decoder.layers.0.weight", "3.conv.4.weight"), "TAESD, the tiny autoencoder, which --vae takes"),
    (("diffusion_model.input_blocks", "input_blocks.0"), "a UNet alone, without text encoder and autoencoder"),
    (("clip_l", "clip_g", "string_to_param", "emb_params"), "a textual inversion"),
    (("text_model.", "resblocks."), "a text encoder alone"),
)
GROUPS = 32  # of every group norm in every published model
MAX_LEVELS, MAX_LAYERS, MAX_DEPTH, MAX_TEXT_LAYERS = 8, 8, 32, 96
HEAD_DIM = 64  # of SD2, SDXL and of every text encoder; SD1 has eight heads


@dataclass(frozen=True)
class TextPart:
    """One text encoder of a single file: where its keys start and in which layout they are."""

    prefix: str
    openclip: bool
    config: CLIPConfig


@dataclass(frozen=True)
class Family:
    """What a single file is.

    Attributes:
        name: "SD 1", "SD 2", "SDXL" or "SDXL refiner", with " inpainting".
        texts: its text encoders in the order in which their features are joined.
        prediction: as the file says, with the reason; None where it does not say.
        few_step: how few steps the file says that the model was distilled to, or None.
    """

    name: str
    unet: UNetConfig
    vae: VAEConfig | None
    texts: tuple[TextPart, ...]
    prediction: str | None
    why: str
    zero_snr: bool
    few_step: Detection | None = None

    @property
    def xl(self) -> bool:
        return self.name.startswith("SDXL")

    @property
    def refiner(self) -> bool:
        return self.name.startswith("SDXL refiner")

    def sample_size(self, prediction: str) -> int:
        """Side of the latents that the family was trained on."""
        if self.xl:
            return 128
        return 96 if self.name == "SD 2" and prediction == "v_prediction" else 64

    def scheduler(self, prediction: str) -> SchedulerConfig:
        """The training schedule, which all families share, and the sampler of the published folders."""
        sampler = "euler" if self.xl else "ddim" if self.name.startswith("SD 2") else "pndm"
        return SchedulerConfig(
            prediction_type=prediction,
            sampler=sampler,
            rescale_betas_zero_snr=self.zero_snr,
            # The last timestep is where zero signal-to-noise is (Lin et al. 2024, section 3.3).
            timestep_spacing="trailing" if self.zero_snr else "leading",
        )


def find_family(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> Family:
    """The family of a single file in the original layout.

    Args:
        path: for messages alone.
        shapes: of every tensor, by its key in the file.
        metadata: the file's; `modelspec.prediction_type` is believed.

    Raises:
        FastsdError: no Stable Diffusion checkpoint, or one whose parts do not fit together.
    """
    if f"{UNET_PREFIX}input_blocks.0.0.weight" not in shapes:
        raise FastsdError(f"{path}: {_what_else(shapes)}")
    look = _Shapes(path, shapes)
    texts = _texts(look)
    base = _base_name(look, texts)
    unet = _unet(look, texts, refiner=base == "SDXL refiner")
    width = sum(text.config.hidden_size for text in texts)
    if width != unet.cross_attention_dim:
        raise FastsdError(
            f"{path}: its text encoders give {width} features where its UNet reads {unet.cross_attention_dim}; "
            "they belong to different families"
        )
    inpaints = unet.in_channels == 9
    name = f"{base} inpainting" if inpaints else base
    vae = find_vae(path, look.under(VAE_PREFIX), base.startswith("SDXL")) if look.has(VAE_PREFIX) else None
    few_step = detect_in_unet(unet) or detect_in_metadata(metadata)
    return Family(name, unet, vae, texts, *_prediction(name, shapes, metadata), "ztsnr" in shapes, few_step)


def find_vae(path: Path, shapes: Shapes, xl: bool) -> VAEConfig:
    """The config of an autoencoder in the original layout, its keys without prefix.

    SDXL's is told from SD's by its UNet alone: their shapes are the same.
    """
    look = _Shapes(path, shapes)
    widths, layers = [], set()
    first = look.shape("encoder.conv_in.weight", 4)
    for level in range(_count(shapes, "encoder.down.", MAX_LEVELS, path)):
        layers.add(_count(shapes, f"encoder.down.{level}.block.", MAX_LAYERS, path))
        widths.append(look.shape(f"encoder.down.{level}.block.0.conv1.weight", 4)[0])
    if len(layers) != 1 or 0 in layers or any(width % GROUPS for width in widths):
        raise FastsdError(f"{path}: the autoencoder's levels, {widths} channels wide, are of no known kind")
    return VAEConfig(
        in_channels=first[1],
        out_channels=look.shape("decoder.conv_out.weight", 4)[0],
        latent_channels=look.shape("decoder.conv_in.weight", 4)[1],
        block_out_channels=tuple(widths),
        layers_per_block=layers.pop(),
        norm_num_groups=GROUPS,
        mid_block_attention=look.has("encoder.mid.attn_1."),
        scaling_factor=0.13025 if xl else 0.18215,
        force_upcast=xl,
    )


class _Shapes:
    """Shapes by key; every complaint names file and key."""

    def __init__(self, path: Path, shapes: Shapes):
        self.path, self.shapes = path, shapes

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.shapes)

    def under(self, prefix: str) -> dict[str, tuple[int, ...]]:
        return {key[len(prefix) :]: shape for key, shape in self.shapes.items() if key.startswith(prefix)}

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        shape = self.shapes.get(key)
        if shape is None:
            raise FastsdError(f"{self.path}: the key {key} is missing")
        if len(shape) != dimensions or not all(0 < n < 2**20 for n in shape):
            raise FastsdError(f"{self.path}: the key {key} is {list(shape)}; it should have {dimensions} dimensions")
        return shape


def _what_else(shapes: Shapes) -> str:
    for parts, name in _OTHERS:
        if any(part in key for key in shapes for part in parts):
            return f"not a Stable Diffusion checkpoint: it looks like {name}"
    first = f"; its first key is {min(shapes)[:80]!r}" if shapes else ": it holds no tensors"
    return f"not a Stable Diffusion checkpoint: the key {UNET_PREFIX}input_blocks.0.0.weight is missing{first}"


def _count(keys: Iterable[str], prefix: str, limit: int, path: Path) -> int:
    """How many numbers follow `prefix` in the keys, which count up from 0."""
    found = {key[len(prefix) :].split(".", 1)[0] for key in keys if key.startswith(prefix)}
    count = next((i for i in range(limit + 1) if str(i) not in found), limit + 1)
    if count > limit:
        raise FastsdError(f"{path}: more than {limit} of {prefix}N; no Stable Diffusion model has that many")
    return count


def _texts(look: _Shapes) -> tuple[TextPart, ...]:
    """The text encoders, by where their keys stand."""
    stage, first, second = "cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1."
    if look.has(f"{second}model.") and look.has(f"{first}transformer."):
        return (_clip(look, f"{first}transformer."), _openclip(look, f"{second}model.", drop_last=False))
    if look.has(f"{first}model."):
        return (_openclip(look, f"{first}model.", drop_last=False),)
    if look.has(f"{stage}transformer."):
        return (_clip(look, f"{stage}transformer."),)
    if look.has(f"{stage}model."):
        return (_openclip(look, f"{stage}model.", drop_last=True),)
    raise FastsdError(
        f"{look.path}: no text encoder in this file (cond_stage_model.* or conditioner.embedders.*); it is a UNet alone"
    )


def _clip(look: _Shapes, prefix: str) -> TextPart:
    """CLIP in transformers' layout; some files leave out `text_model.`."""
    if not look.has(f"{prefix}text_model."):
        flat = prefix
    else:
        flat = f"{prefix}text_model."
    vocabulary, hidden = look.shape(f"{flat}embeddings.token_embedding.weight", 2)
    layers = _count(look.shapes, f"{flat}encoder.layers.", MAX_TEXT_LAYERS, look.path)
    return TextPart(
        prefix,
        False,
        CLIPConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=look.shape(f"{flat}encoder.layers.0.mlp.fc1.weight", 2)[0],
            num_hidden_layers=layers,
            num_attention_heads=_heads(look, prefix, hidden),
            max_position_embeddings=look.shape(f"{flat}embeddings.position_embedding.weight", 2)[0],
        ),
    )


def _openclip(look: _Shapes, prefix: str, drop_last: bool) -> TextPart:
    """OpenCLIP's layout. SD2 reads the layer before the last, and folders of it are saved without the last."""
    vocabulary, hidden = look.shape(f"{prefix}token_embedding.weight", 2)
    layers = _count(look.shapes, f"{prefix}transformer.resblocks.", MAX_TEXT_LAYERS, look.path)
    projection = f"{prefix}text_projection"
    # A file made from a folder has neither the last layer nor the projection that follows it.
    drop_last = drop_last and (projection in look.shapes or layers == 24)
    return TextPart(
        prefix,
        True,
        CLIPConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=look.shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
            num_hidden_layers=layers - drop_last,
            num_attention_heads=_heads(look, prefix, hidden),
            max_position_embeddings=look.shape(f"{prefix}positional_embedding", 2)[0],
            hidden_act="gelu",
            projection_dim=0 if prefix.startswith("cond_stage_model.") else look.shape(projection, 2)[1],
        ),
    )


def _heads(look: _Shapes, prefix: str, hidden: int) -> int:
    if hidden % HEAD_DIM:
        raise FastsdError(f"{look.path}: {prefix}* is {hidden} wide; it should be a multiple of {HEAD_DIM}")
    return hidden // HEAD_DIM


def _base_name(look: _Shapes, texts: tuple[TextPart, ...]) -> str:
    added = look.has(f"{UNET_PREFIX}label_emb.")
    if len(texts) == 2:
        name = "SDXL"
    elif texts[0].prefix.startswith("conditioner."):
        name = "SDXL refiner"
    else:
        name = "SD 2" if texts[0].openclip else "SD 1"
    if added != name.startswith("SDXL"):
        what = f"has {UNET_PREFIX}label_emb" if added else f"lacks {UNET_PREFIX}label_emb"
        raise FastsdError(f"{look.path}: its text encoders are those of {name}, but its UNet {what}; it is not read")
    return name


def _unet(look: _Shapes, texts: tuple[TextPart, ...], refiner: bool) -> UNetConfig:
    path, shapes = look.path, look.under(UNET_PREFIX)
    inner = _Shapes(path, shapes)
    look_at = lambda key, dimensions: look.shape(UNET_PREFIX + key, dimensions)  # noqa: E731 - named in full for messages
    first = look_at("input_blocks.0.0.weight", 4)
    levels: list[list[tuple[int, int]]] = [[]]  # width and depth of every layer of a level
    for i in range(1, _count(shapes, "input_blocks.", MAX_LEVELS * MAX_LAYERS, path)):
        if inner.has(f"input_blocks.{i}.0.op."):
            levels.append([])
            continue
        width = look_at(f"input_blocks.{i}.0.out_layers.3.weight", 4)[0]
        levels[-1].append((width, _count(shapes, f"input_blocks.{i}.1.transformer_blocks.", MAX_DEPTH, path)))
    layers = {len(level) for level in levels}
    if len(levels) > MAX_LEVELS or len(layers) != 1 or 0 in layers or any(len(set(level)) != 1 for level in levels):
        raise FastsdError(f"{path}: {UNET_PREFIX}input_blocks are {levels} (width, depth); no known UNet is built so")
    widths, depths = zip(*(level[0] for level in levels), strict=True)
    context = [key for key in shapes if key.endswith("attn2.to_k.weight")]
    projections = [key for key in shapes if key.endswith(".1.proj_in.weight")]
    if not context or not projections:
        raise FastsdError(f"{path}: its UNet reads no text (no key ends in attn2.to_k.weight); it is not read")
    linear = len(shapes[min(projections)]) == 2
    heads = tuple(width // HEAD_DIM for width in widths) if linear else (8,) * len(widths)
    if any(n == 0 or width % n or width % GROUPS for n, width in zip(heads, widths, strict=True)):
        raise FastsdError(f"{path}: its UNet's levels, {list(widths)} channels wide, are of no known kind")
    added = look_at("label_emb.0.0.weight", 2)[1] if inner.has("label_emb.") else 0
    sizes, left = divmod(added - texts[-1].config.projection_dim, 5 if refiner else 6)
    if added and (left or sizes <= 0):
        raise FastsdError(f"{path}: the key {UNET_PREFIX}label_emb.0.0.weight reads {added} numbers; no family does")
    guidance = look_at("time_embed.cond_proj.weight", 2)[1] if inner.has("time_embed.cond_proj.") else 0
    if guidance % 2 or guidance == 2:
        raise FastsdError(f"{path}: the key {UNET_PREFIX}time_embed.cond_proj.weight reads {guidance} numbers")
    return UNetConfig(
        in_channels=first[1],
        out_channels=look_at("out.2.weight", 4)[0],
        block_out_channels=widths,
        layers_per_block=layers.pop(),
        transformer_layers_per_block=depths,
        mid_transformer_layers=_count(shapes, "middle_block.1.transformer_blocks.", MAX_DEPTH, path),
        num_attention_heads=heads,
        cross_attention_dim=look_at(min(context), 2)[1],
        use_linear_projection=linear,
        norm_num_groups=GROUPS,
        addition_time_embed_dim=sizes if added else 0,
        projection_class_embeddings_input_dim=added,
        time_cond_proj_dim=guidance,
    )


def _prediction(name: str, shapes: Shapes, metadata: Mapping[str, str]) -> tuple[str | None, str]:
    """What the network predicts, and how that is known."""
    if "v_pred" in shapes:
        return "v_prediction", "the file holds the marker key v_pred"
    said = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    stated = metadata.get("modelspec.prediction_type", "")
    if stated in said:
        return said[stated], "its metadata say so (modelspec.prediction_type)"
    if name == "SD 2":
        return None, "SD 2 was published with either, and the file does not say which"
    return "epsilon", f"no marker key says otherwise; {name} was published so"
