"""Model families as values: frozen dataclasses, and presets derived from each other by `replace`.

Fields have the names of the diffusers and transformers configs, where these have them. Families differ by values, never
by classes, so `fastsd.model` has one code path for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what a network predicts
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "exp", "laplace", "sigmoid")
SPACINGS = ("leading", "trailing", "linspace")  # of the timesteps (Lin et al. 2024, table 2)


@dataclass(frozen=True)
class CLIPConfig:
    """A CLIP text encoder (Radford et al. 2021, section 2.4; OpenCLIP for the H and bigG sizes)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"  # or "gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 0  # 0: the checkpoint has no text projection
    eos_token_id: int = 49407
    # transformers configs older than 4.31 store eos_token_id = 2; there the largest id of a text marks its end.
    eos_is_largest_id: bool = False


CLIP_L = CLIPConfig()
OPENCLIP_H = replace(  # as in SD2, which drops the 24th layer: the last one here is OpenCLIP's penultimate
    CLIP_L,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)
OPENCLIP_BIGG = replace(
    CLIP_L,
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)


@dataclass(frozen=True)
class VisionConfig:
    """CLIP's vision tower (Radford et al. 2021; Dosovitskiy et al. 2021)."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    patch_size: int = 14
    image_size: int = 224
    hidden_act: str = "quick_gelu"  # or "gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    name: str = "CLIP ViT-L/14"

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


CLIP_VIT_L = VisionConfig()
CLIP_VIT_H = VisionConfig(1280, 5120, 32, hidden_act="gelu", projection_dim=1024, name="OpenCLIP ViT-H/14")
CLIP_VIT_BIGG = VisionConfig(1664, 8192, 48, hidden_act="gelu", projection_dim=1280, name="OpenCLIP ViT-bigG/14")


@dataclass(frozen=True)
class IPAdapterConfig:
    """An IP-Adapter (Ye et al. 2023), by the keys and shapes of its file.

    Attributes:
        kind: what makes tokens of the image: "embedding", of its one vector; "full", of every patch's; "resampler", of
            all patches' by learned queries.
        image_features: of the vision tower's output that it reads.
        text_features: of a token, as wide as the text's.
        widths: of each cross-attention of the UNet, in order of use.
        tokens: for an image; "full" makes one of each patch.
    """

    kind: str
    image_features: int
    text_features: int
    widths: tuple[int, ...]
    tokens: int = 4
    resampler_channels: int = 768
    resampler_layers: int = 4
    resampler_heads: int = 12
    resampler_inner: int = 3072


# How many transformer blocks follow each residual block of a level: the same number, or one for each (SSD-1B).
Depth = int | tuple[int, ...]


def _each(depth: Depth, blocks: int) -> tuple[int, ...]:
    return depth if isinstance(depth, tuple) else (depth,) * blocks if depth else ()


@dataclass(frozen=True)
class UNetConfig:
    """The denoising UNet of latent diffusion (Rombach et al. 2022, appendix E; SDXL: Podell et al. 2023, table 1)."""

    in_channels: int = 4  # more where it reads an image beside the latent: see `reads`
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: tuple[Depth, ...] = (1, 1, 1, 0)  # by level; 0: no attention
    up_transformer_layers: tuple[Depth, ...] = ()  # of the expanding path, by level, finest first; empty: the same
    mid_transformer_layers: int = 1
    mid_resnets: int = 2  # residual blocks of the lowest level: two around its attention; one, or none, without
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)  # by level
    cross_attention_dim: int = 768
    use_linear_projection: bool = False  # the stored form of proj_in and proj_out: a matrix, or a 1 x 1 convolution
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    addition_time_embed_dim: int = 0  # 0: no added conditioning (SDXL: 256)
    projection_class_embeddings_input_dim: int = 0  # width of the added conditioning vector
    time_cond_proj_dim: int = 0  # width of the guidance scale's embedding; 0: the scale is not an input
    skip: str = "concat"  # how an up block joins a skip connection: "concat" or "add"

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    def down_depths(self, level: int) -> tuple[int, ...]:
        """Transformer blocks after each residual block of a level of the contracting path; () without attention."""
        return _each(self.transformer_layers_per_block[level], self.layers_per_block)

    def up_depths(self, level: int) -> tuple[int, ...]:
        """The same for the expanding path, which has one residual block more."""
        depths = self.up_transformer_layers or self.transformer_layers_per_block
        return _each(depths[level], self.layers_per_block + 1)

    @property
    def reads(self) -> str | None:
        """What it reads beside the latent of C channels; None: nothing known here reads as many channels.

        "": nothing. "mask": a mask and the masked image's latent, for inpainting (Rombach et al. 2022, section 4.5).
        "image": another image's latent (InstructPix2Pix, Brooks et al. 2023). "depth": a depth map (SD 2's model).
        """
        latent = self.out_channels
        known = {latent: "", latent + 1: "depth", 2 * latent: "image", 2 * latent + 1: "mask"}
        return known.get(self.in_channels)


SD15_UNET = UNetConfig()
SD21_UNET = replace(
    SD15_UNET, num_attention_heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
)
SDXL_UNET = replace(
    SD21_UNET,
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(0, 2, 10),
    mid_transformer_layers=10,
    num_attention_heads=(5, 10, 20),
    cross_attention_dim=2048,
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
SDXL_REFINER_UNET = replace(
    SDXL_UNET,
    block_out_channels=(384, 768, 1536, 1536),
    transformer_layers_per_block=(0, 4, 4, 0),
    mid_transformer_layers=4,
    num_attention_heads=(6, 12, 24, 24),
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560,
)


SSD1B_UNET = replace(  # SDXL's without some of its blocks (Gupta et al. 2024, Progressive Knowledge Distillation)
    SDXL_UNET,
    transformer_layers_per_block=(0, 2, 4),
    up_transformer_layers=(0, (2, 1, 1), (4, 4, 10)),
    mid_transformer_layers=0,
    mid_resnets=1,
)
VEGA_UNET = replace(SSD1B_UNET, transformer_layers_per_block=(0, 1, 2), up_transformer_layers=())


@dataclass(frozen=True)
class ControlNetConfig:
    """A ControlNet (Zhang et al. 2023): a copy of a UNet's contracting path that also reads an image.

    Attributes:
        unet: of the path. It reads only the latent, even if the UNet that it steers has more input channels.
        hint_channels: widths of the layers that shrink the image to the latent's size, with a halving between each two.
        bgr: it reads the image's channels as blue, green, red.
    """

    unet: UNetConfig
    hint_channels: tuple[int, ...] = (16, 32, 96, 256)
    bgr: bool = False


@dataclass(frozen=True)
class T2IAdapterConfig:
    """A T2I-Adapter (Mou et al. 2023): maps for the UNet's levels, made from an image.

    Attributes:
        in_channels: 3, or 1 for one that reads the image in grey.
        channels: of the maps.
        blocks: of each level.
        downscale: pixels per pixel of the first map, along one side.
        light: the small kind.
        halves: of each level, whether its map is half as large as the one before.
    """

    in_channels: int
    channels: tuple[int, ...]
    blocks: int
    downscale: int
    light: bool
    halves: tuple[bool, ...]

    def fits(self, unet: UNetConfig) -> bool:
        """Whether the maps have the widths of the UNet's levels; one more is for its lowest map."""
        widths = unet.block_out_channels
        return self.channels in (widths, (*widths, widths[-1]))


@dataclass(frozen=True)
class VAEConfig:
    """The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022, section 3.1 and appendix G)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    mid_block_attention: bool = True
    scaling_factor: float = 0.18215  # the diffusion model sees scaling_factor * latent
    latents_mean: tuple[float, ...] | None = None  # with both: scaling_factor * (latent - mean) / std, by channel
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = False  # the activations overflow fp16 (SDXL's do)

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


SD_VAE = VAEConfig()
SDXL_VAE = replace(SD_VAE, scaling_factor=0.13025, force_upcast=True)


@dataclass(frozen=True)
class TAESDConfig:
    """The tiny autoencoder TAESD (Ollin Boer Bohan), which diffusers calls AutoencoderTiny."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64, 64, 64, 64)  # equal: no layer changes the width
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)  # by level, from the image to the latent
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)  # by level, from the latent to the image
    scaling_factor: float = 1.0  # the diffusion model takes its latents unscaled
    force_upcast: bool = False

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


AutoencoderConfig = VAEConfig | TAESDConfig


@dataclass(frozen=True)
class SolverConfig:
    """What a scheduler file may state of its sampler, by diffusers' names. None: it does not; the sampler has its own.

    A sampler reads those that diffusers' class for it has (docs/samplers.md).
    """

    solver_order: int | None = None
    solver_type: str | None = None  # "midpoint", "heun"; UniPC: "bh1", "bh2"
    algorithm_type: str | None = None  # "dpmsolver", "dpmsolver++", and on the SDE "sde-dpmsolver", "sde-dpmsolver++"
    predict_x0: bool | None = None
    lower_order_final: bool | None = None
    euler_at_final: bool | None = None
    disable_corrector: tuple[int, ...] | None = None
    final_sigmas_type: str | None = None  # "zero", "sigma_min": the noise after the last step
    lambda_min_clipped: float | None = None
    use_lu_lambdas: bool | None = None
    interpolation_type: str | None = None  # "linear", "log_linear"
    timestep_type: str | None = None  # "discrete", "continuous"
    sigma_min: float | None = None
    sigma_max: float | None = None
    variance_type: str | None = None  # "fixed_small", "fixed_small_log", "fixed_large"
    original_inference_steps: int | None = None
    timestep_scaling: float | None = None


@dataclass(frozen=True)
class EDMConfig:
    """A model trained in Karras et al. 2022's own terms: Playground 2.5, CosXL.

    For x = image + sigma z it predicts D = c_skip x + c_out F(c_in x, log(sigma) / 4) (table 1, "EDM"); there are no
    training timesteps. `docs/samplers.md` gives the factors.

    Attributes:
        sigma_data: the standard deviation of its latents.
        sigma_min, sigma_max: its noise levels.
        rho: of the default schedule, equation 5.
        ramp: the default schedule, "karras" or "exponential".
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    ramp: str = "karras"


@dataclass(frozen=True)
class SchedulerConfig:
    """The training noise schedule, the prediction type, and how timesteps are spaced at inference.

    None: the checkpoint does not say; `fastsd.sampling.samplers.complete` fills in what the sampler that runs has of
    its own.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # one of `BETA_SCHEDULES`
    trained_betas: tuple[float, ...] | None = None  # one for each training timestep; they replace the schedule
    prediction_type: str = "epsilon"  # one of `PREDICTIONS`
    timestep_spacing: str | None = None  # one of `SPACINGS`
    steps_offset: int | None = 1  # added to every timestep in "leading" spacing
    set_alpha_to_one: bool | None = False  # ddim and pndm end at the clean image, not at the level of timestep 0
    rescale_betas_zero_snr: bool = False  # the last timestep is pure noise (Lin et al. 2024)
    sampler: str = "pndm"  # the checkpoint's own; a name in `fastsd.sampling.samplers.SAMPLERS`
    schedule: str = "default"  # the checkpoint's own; a name in `fastsd.sampling.samplers.SCHEDULES`
    solver: SolverConfig = SolverConfig()
    edm: EDMConfig | None = None  # then it has no betas and no timesteps; the prediction is epsilon or v_prediction
    unfollowed: tuple[str, ...] = ()  # keys of its file that no table can follow, `samplers.UNFOLLOWED`
