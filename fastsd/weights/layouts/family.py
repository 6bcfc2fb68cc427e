"""The model family of a single file and its configs, from keys and shapes alone; the file's name is ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fastsd.config import CLIPConfig, Depth, EDMConfig, SchedulerConfig, UNetConfig, VAEConfig
from fastsd.errors import FastsdError
from fastsd.few_step import KINDS, Detection
from fastsd.weights.few_step import detect_in_metadata, detect_in_unet
from fastsd.weights.layouts.file_layouts import FILE_LAYOUTS, FileLayout, TextEncoderLayout
from fastsd.weights.layouts.fit import Shapes, check_fit, refuse_other_keys
from fastsd.weights.layouts.ldm_names import linear_projection
from fastsd.weights.layouts.unet_config import shortened

FIRST_KEY = "input_blocks.0.0.weight"  # of every UNet in the original layout, after its prefix
# What a file is if it is not a checkpoint, by parts of its keys.
_NOT_CHECKPOINTS = (
    (("control_model.", "input_hint_block.", "controlnet_cond_embedding."), "a ControlNet"),
    (("double_blocks.", "joint_blocks.", "single_transformer_blocks."), "a Flux or Stable Diffusion 3 model"),
    (("lora_", ".lora", "hada_w", "lokr_w"), "a LoRA or another adapter"),
    (("down_blocks.0.resnets", "up_blocks.0.resnets"), "one part of a diffusers folder; give the folder"),
    (("encoder.down.", "decoder.up."), "an autoencoder, which {vae} takes"),
    (("decoder.layers.0.weight", "3.conv.4.weight"), "TAESD, the tiny autoencoder, which {vae} takes"),
    (("diffusion_model.input_blocks", "input_blocks.0"), "a UNet alone, without text encoder and autoencoder"),
    (("clip_l", "clip_g", "string_to_param", "emb_params"), "a textual inversion"),
    (("text_model.", "resblocks."), "a text encoder alone"),
)
GROUPS = 32  # of every group norm in every published model
MAX_LEVELS, MAX_LAYERS, MAX_DEPTH, MAX_TEXT_LAYERS = 8, 8, 32, 96
HEAD_DIM = 64  # of SD 2, SDXL and every text encoder; SD 1 has eight heads


@dataclass(frozen=True)
class FileTextEncoder:
    """A text encoder of one file: its layout and its config."""

    layout: TextEncoderLayout
    config: CLIPConfig


@dataclass(frozen=True)
class CheckpointFamily:
    """What a single file is.

    Attributes:
        layout: the row of `FILE_LAYOUTS`.
        vae: None if the file holds no autoencoder.
        texts: the text encoders, in the order in which their features are concatenated.
        prediction: what the network predicts; None if the file does not say.
        prediction_reason: how that is known.
        zero_snr: the schedule has zero terminal signal-to-noise.
        few_step: the few-step method that the file names, or None.
        scaled_image: its UNet reads the image to edit scaled, as the latent is: CosXL Edit.
        edm: the noise levels of an EDM model, or None. `edm_markers.with_markers` gives it and `scaled_image`.
    """

    layout: FileLayout
    unet: UNetConfig
    vae: VAEConfig | None
    texts: tuple[FileTextEncoder, ...]
    prediction: str | None
    prediction_reason: str
    zero_snr: bool
    few_step: Detection | None = None
    scaled_image: bool = False
    edm: EDMConfig | None = None

    @property
    def name(self) -> str:
        return _full_name(self.layout, self.unet)

    @property
    def xl(self) -> bool:
        return self.layout.size_inputs > 0

    def sample_size(self, prediction: str) -> int:
        """Side of the latents that the family was trained on."""
        if prediction == "v_prediction" and self.layout.sample_size_v and not self.unet.reads:
            return self.layout.sample_size_v
        return self.layout.sample_size

    def scheduler(self, prediction: str) -> SchedulerConfig:
        """The training schedule, which all families share, and the sampler of the published folders."""
        kind = self.layout.few_step
        if self.edm is not None:  # the sampler of Playground's folder; CosXL has none
            sampler = "dpm++2m" if prediction == "epsilon" else "euler"
            return SchedulerConfig(prediction_type=prediction, sampler=sampler, edm=self.edm)
        return SchedulerConfig(
            prediction_type=prediction,
            sampler=self.layout.sampler,
            rescale_betas_zero_snr=self.zero_snr,
            # The last timestep is where zero signal-to-noise is (Lin et al. 2024, section 3.3).
            timestep_spacing="trailing" if self.zero_snr else (kind and KINDS[kind].spacing) or self.layout.spacing,
        )


_KINDS = {"mask": "inpainting", "image": "InstructPix2Pix", "depth": "depth"}  # by what the UNet reads


def _full_name(layout: FileLayout, unet: UNetConfig) -> str:
    kind = _KINDS.get(unet.reads or "")
    return f"{layout.family} {kind}" if kind else layout.family


def find_family(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> CheckpointFamily:
    """The family of a single file in the original layout.

    Args:
        path: for messages only.
        shapes: of every tensor, by its key in the file.
        metadata: the file's; its `modelspec.prediction_type` is trusted.

    Raises:
        FastsdError: not a Stable Diffusion checkpoint, or one whose networks do not fit together.
    """
    reader = _ShapeReader(path, shapes)
    layout = _find_layout(reader)
    texts = tuple(_text_encoder(reader, text) for text in layout.texts)
    unet = _unet(reader, layout, texts)
    vae = find_vae(path, reader.under(layout.vae_prefix), layout.vae) if reader.has(layout.vae_prefix) else None
    check_fit(path, unet, vae, [text.config for text in texts], layout.aesthetic_score)
    few_step = detect_in_unet(unet) or detect_in_metadata(metadata)
    if few_step is None and layout.few_step is not None:
        few_step = Detection(KINDS[layout.few_step], f"its keys are those of {layout.family}")
    prediction, reason = _prediction(layout, unet, shapes, metadata)
    return CheckpointFamily(layout, unet, vae, texts, prediction, reason, "ztsnr" in shapes, few_step)


def find_vae(path: Path, shapes: Shapes, preset: VAEConfig) -> VAEConfig:
    """The config of an autoencoder in the original layout.

    Args:
        path: for messages only.
        shapes: of its tensors, by keys without prefix.
        preset: gives what shapes do not tell. SDXL's autoencoder has the shapes of SD's, but another latent scale.

    Raises:
        FastsdError: a key is missing, or the shapes are not those of an autoencoder.
    """
    reader = _ShapeReader(path, shapes)
    widths, layers = [], set()
    first = reader.shape("encoder.conv_in.weight", 4)
    for level in range(_count(shapes, "encoder.down.", MAX_LEVELS, path)):
        layers.add(_count(shapes, f"encoder.down.{level}.block.", MAX_LAYERS, path))
        widths.append(reader.shape(f"encoder.down.{level}.block.0.conv1.weight", 4)[0])
    if len(layers) != 1 or 0 in layers or any(width % GROUPS for width in widths):
        raise FastsdError(f"no known autoencoder has levels of {widths} channels", path=path)
    return replace(
        preset,
        in_channels=first[1],
        out_channels=reader.shape("decoder.conv_out.weight", 4)[0],
        latent_channels=reader.shape("decoder.conv_in.weight", 4)[1],
        block_out_channels=tuple(widths),
        layers_per_block=layers.pop(),
        norm_num_groups=GROUPS,
        mid_block_attention=reader.has("encoder.mid.attn_1."),
    )


class _ShapeReader:
    """Shapes by key; every error names file and key."""

    def __init__(self, path: Path, shapes: Shapes, prefix: str = ""):
        self.path, self.shapes, self.prefix = path, shapes, prefix

    def has(self, prefix: str) -> bool:
        return any(key.startswith(self.prefix + prefix) for key in self.shapes)

    def under(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """The shapes below a prefix, by keys without it."""
        return {key[len(prefix) :]: shape for key, shape in self.shapes.items() if key.startswith(prefix)}

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        key = self.prefix + key
        shape = self.shapes.get(key)
        if shape is None:
            raise FastsdError(f"the key {key} is missing", path=self.path)
        if len(shape) != dimensions or not all(0 < n < 2**20 for n in shape):
            raise FastsdError(f"the key {key} is {list(shape)}; it should have {dimensions} dimensions", path=self.path)
        return shape


def _find_layout(reader: _ShapeReader) -> FileLayout:
    """The first layout whose UNet and text encoders the file holds."""
    rows = [row for row in FILE_LAYOUTS if row.unet_prefix + FIRST_KEY in reader.shapes]
    if not rows:
        raise FastsdError(f"{_what_else(reader.shapes)}", path=reader.path)
    refuse_other_keys(reader.path, reader.shapes)
    held = [row for row in rows if all(reader.has(text.prefix) for text in row.texts)]
    if not held:
        prefixes = ", or ".join(" and ".join(f"{text.prefix}*" for text in row.texts) for row in rows)
        raise FastsdError(f"no text encoder in this file; its keys should start with {prefixes}", path=reader.path)
    layout = next((row for row in held if reader.has(f"{row.unet_prefix}label_emb.") == bool(row.size_inputs)), None)
    if layout is None:
        label = f"{held[0].unet_prefix}label_emb."
        state = f"lacks {label}*" if held[0].size_inputs else f"has {label}*"
        raise FastsdError(
            f"its text encoders are those of {held[0].family}, but its UNet {state}; no family has both",
            path=reader.path,
        )
    return layout


def _what_else(shapes: Shapes) -> str:
    for parts, name in _NOT_CHECKPOINTS:
        if any(part in key for key in shapes for part in parts):
            return f"not a Stable Diffusion checkpoint: it looks like {name}"
    first = f"; its first key is {min(shapes)[:80]!r}" if shapes else ": it holds no tensors"
    return f"not a Stable Diffusion checkpoint: the key {FILE_LAYOUTS[0].unet_prefix}{FIRST_KEY} is missing{first}"


def _count(keys: Iterable[str], prefix: str, limit: int, path: Path) -> int:
    """How many consecutive numbers, from 0, follow `prefix` in the keys."""
    numbers = {key[len(prefix) :].split(".", 1)[0] for key in keys if key.startswith(prefix)}
    count = next((i for i in range(limit + 1) if str(i) not in numbers), limit + 1)
    if count > limit:
        raise FastsdError(f"more than {limit} of {prefix}N; no Stable Diffusion model has that many", path=path)
    return count


def _text_encoder(reader: _ShapeReader, layout: TextEncoderLayout) -> FileTextEncoder:
    inner = _ShapeReader(reader.path, reader.shapes, layout.prefix)
    return FileTextEncoder(layout, _openclip(inner, layout.truncated) if layout.openclip else _clip(inner))


def _clip(reader: _ShapeReader) -> CLIPConfig:
    """CLIP in transformers' layout; some files leave out `text_model.`."""
    flat = "text_model." if reader.has("text_model.") else ""
    vocabulary, hidden = reader.shape(f"{flat}embeddings.token_embedding.weight", 2)
    return CLIPConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=reader.shape(f"{flat}encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=_text_layers(reader, f"{flat}encoder.layers."),
        num_attention_heads=_text_heads(reader, hidden),
        max_position_embeddings=reader.shape(f"{flat}embeddings.position_embedding.weight", 2)[0],
    )


def _openclip(reader: _ShapeReader, truncated: bool) -> CLIPConfig:
    """OpenCLIP's layout."""
    vocabulary, hidden = reader.shape("token_embedding.weight", 2)
    layers = _text_layers(reader, "transformer.resblocks.")
    # A file converted from a folder has neither the last layer nor the projection after it.
    matrix = "text_projection.weight" if linear_projection(reader.shapes, reader.prefix) else "text_projection"
    complete = f"{reader.prefix}{matrix}" in reader.shapes or layers == 24
    features = 0 if truncated else reader.shape(matrix, 2)[0 if matrix.endswith("weight") else 1]
    return CLIPConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=reader.shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        num_hidden_layers=layers - (truncated and complete),
        num_attention_heads=_text_heads(reader, hidden),
        max_position_embeddings=reader.shape("positional_embedding", 2)[0],
        hidden_act="gelu",
        projection_dim=features,
    )


def _text_layers(reader: _ShapeReader, prefix: str) -> int:
    return _count(reader.shapes, reader.prefix + prefix, MAX_TEXT_LAYERS, reader.path)


def _text_heads(reader: _ShapeReader, hidden: int) -> int:
    if hidden % HEAD_DIM:
        raise FastsdError(f"{reader.prefix}* is {hidden} wide; it should be a multiple of {HEAD_DIM}", path=reader.path)
    return hidden // HEAD_DIM


def _unet(reader: _ShapeReader, layout: FileLayout, texts: tuple[FileTextEncoder, ...]) -> UNetConfig:
    path, prefix = reader.path, layout.unet_prefix
    shapes = reader.under(prefix)
    inner = _ShapeReader(path, reader.shapes, prefix)
    widths, depths, layers = _levels(inner, shapes)
    up = _up_depths(inner, shapes, len(widths), layers)
    context = [key for key in shapes if key.endswith("attn2.to_k.weight")]
    projections = [key for key in shapes if key.endswith(".1.proj_in.weight")]
    if not context or not projections:
        raise FastsdError("its UNet reads no text (no key ends in attn2.to_k.weight)", path=path)
    linear = len(shapes[min(projections)]) == 2
    heads = tuple(width // HEAD_DIM for width in widths) if linear else (8,) * len(widths)
    if any(n == 0 or width % n or width % GROUPS for n, width in zip(heads, widths, strict=True)):
        raise FastsdError(f"no known UNet has levels of {list(widths)} channels", path=path)
    added = inner.shape("label_emb.0.0.weight", 2)[1] if layout.size_inputs else 0
    size_features, rest = divmod(added - texts[-1].config.projection_dim, layout.size_inputs or 1)
    if added and (rest or size_features <= 0):
        raise FastsdError(f"the key {prefix}label_emb.0.0.weight reads {added} features; no family does", path=path)
    guidance = inner.shape("time_embed.cond_proj.weight", 2)[1] if inner.has("time_embed.cond_proj.") else 0
    if guidance % 2 or guidance == 2:
        raise FastsdError(
            f"the key {prefix}time_embed.cond_proj.weight reads {guidance} features; it should be an even "
            "number from 4 on",
            path=path,
        )
    return UNetConfig(
        in_channels=inner.shape(FIRST_KEY, 4)[1],
        out_channels=inner.shape("out.2.weight", 4)[0],
        block_out_channels=widths,
        layers_per_block=layers,
        transformer_layers_per_block=depths,
        up_transformer_layers=() if up == depths else up,
        mid_transformer_layers=_depth(inner, shapes, "middle_block.1."),
        mid_resnets=2
        if inner.has("middle_block.1.") or inner.has("middle_block.2.")
        else int(inner.has("middle_block.")),
        num_attention_heads=heads,
        cross_attention_dim=inner.shape(min(context), 2)[1],
        use_linear_projection=linear,
        norm_num_groups=GROUPS,
        addition_time_embed_dim=size_features if added else 0,
        projection_class_embeddings_input_dim=added,
        time_cond_proj_dim=guidance,
    )


def _levels(reader: _ShapeReader, shapes: Shapes) -> tuple[tuple[int, ...], tuple[Depth, ...], int]:
    """The width and the transformer depths of each level of a UNet's contracting path, and its layers per level."""
    path = reader.path
    reader.shape(FIRST_KEY, 4)
    levels: list[list[tuple[int, int]]] = [[]]  # width and depth of every layer of a level
    for i in range(1, _count(shapes, "input_blocks.", MAX_LEVELS * MAX_LAYERS, path)):
        if reader.has(f"input_blocks.{i}.0.op."):
            levels.append([])
            continue
        width = reader.shape(f"input_blocks.{i}.0.out_layers.3.weight", 4)[0]
        levels[-1].append((width, _depth(reader, shapes, f"input_blocks.{i}.1.")))
    counts = {len(level) for level in levels}
    if len(levels) > MAX_LEVELS or len(counts) != 1 or 0 in counts or not all(map(_is_level, levels)):
        raise FastsdError(f"no known UNet has {reader.prefix}input_blocks of (width, depth) {levels}", path=path)
    widths = tuple(level[0][0] for level in levels)
    return widths, tuple(shortened([depth for _, depth in level]) for level in levels), counts.pop()


def _up_depths(reader: _ShapeReader, shapes: Shapes, levels: int, layers: int) -> tuple[Depth, ...]:
    """The transformer depths of each level of the expanding path, the finest level's first."""
    found = []
    for level in range(levels):
        blocks = range(level * (layers + 1), (level + 1) * (layers + 1))
        depths = [_depth(reader, shapes, f"output_blocks.{i}.1.") for i in blocks]
        if 0 in depths and any(depths):
            raise FastsdError(f"no known UNet has {reader.prefix}output_blocks of depths {depths}", path=reader.path)
        found.append(shortened(depths))
    return tuple(reversed(found))


def _depth(reader: _ShapeReader, shapes: Shapes, block: str) -> int:
    return _count(shapes, f"{block}transformer_blocks.", MAX_DEPTH, reader.path)


def _is_level(layers: list[tuple[int, int]]) -> bool:
    """All layers are of one width, and all of them have attention or none has."""
    return len({width for width, _ in layers}) == len({bool(depth) for _, depth in layers}) == 1


def _prediction(
    layout: FileLayout, unet: UNetConfig, shapes: Shapes, metadata: Mapping[str, str]
) -> tuple[str | None, str]:
    """What the network predicts, and how that is known."""
    if "v_pred" in shapes:
        return "v_prediction", "the file holds the marker key v_pred"
    names = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    stated = names.get(metadata.get("modelspec.prediction_type", ""))
    if stated is not None:
        return stated, "its metadata says so (modelspec.prediction_type)"
    name = _full_name(layout, unet)
    if layout.prediction is None and not unet.reads:
        return None, f"{name} was published with either, and the file does not say which"
    prediction = layout.prediction or "epsilon"
    return prediction, f"{name} was published so, and no marker key says otherwise"
