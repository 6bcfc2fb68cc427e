"""The metadata of a trained adapter: kohya's `ss_*` and the model spec's `modelspec.*`, which other programs show."""

from __future__ import annotations

import json
import time

import fastsd
from fastsd.train.adapters.adapter import TrainableAdapter
from fastsd.train.tuning.stage import TuningStage

# The architecture by the width of the text that the UNet reads: of the model spec, and of kohya's trainer.
_ARCHITECTURES = {
    768: ("stable-diffusion-v1", "sd_v1", "https://github.com/CompVis/stable-diffusion"),
    1024: ("stable-diffusion-v2-512", "sd_v2", "https://github.com/Stability-AI/stablediffusion"),
    2048: ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "https://github.com/Stability-AI/generative-models"),
}
_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


def adapter_metadata(stage: TuningStage, trained: TrainableAdapter, name: str) -> dict[str, str]:
    """What an adapter's file says of itself and of its training; `name` is what programs show."""
    components, settings, run = stage.components, stage.settings, stage.job.settings
    adapter, fit = trained.settings, settings.fit
    width = components.unet.config.cross_attention_dim
    v = components.scheduler.prediction_type == "v_prediction"
    known = _ARCHITECTURES.get(width)
    found = {
        "ss_network_module": "lycoris.kohya" if adapter.kind == "lokr" or adapter.dora else "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.alpha),
        "ss_network_dropout": str(adapter.dropout),
        "ss_network_args": json.dumps(_network_args(trained)),
        "ss_sd_model_name": str(run.model),
        "ss_v2": str(width == 1024),
        "ss_seed": str(run.seed),
        "ss_num_train_images": str(len(stage.job.images)),
        "ss_resolution": "({1}, {0})".format(*stage.job.images.side),
        "ss_max_train_steps": str(fit.steps),
        "ss_learning_rate": str(fit.rate),
        "ss_lr_scheduler": fit.schedule,
        "ss_lr_warmup_steps": str(fit.warmup),
        "ss_optimizer": fit.optimiser,
        "ss_total_batch_size": str(fit.batch_size),
        "ss_gradient_accumulation_steps": str(fit.accumulate),
        "ss_gradient_checkpointing": str(settings.recompute),
        "ss_mixed_precision": "bf16" if stage.job.bf16 else "no",
        "ss_clip_skip": str(settings.text.clip_skip),
        "ss_caption_dropout_rate": str(settings.text.empty),
        "ss_min_snr_gamma": str(settings.loss.min_snr or None),
        "ss_noise_offset": str(settings.loss.noise_offset or None),
        "ss_zero_terminal_snr": str(components.scheduler.rescale_betas_zero_snr),
        "ss_output_name": name,
        "ss_training_comment": f"trained by fastsd {fastsd.__version__}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        "modelspec.resolution": "{1}x{0}".format(*stage.job.images.side),
        "modelspec.prediction_type": _PREDICTION[components.scheduler.prediction_type],
    }
    if settings.text.trigger:
        found["modelspec.trigger_phrase"] = settings.text.trigger
    if known is not None:
        architecture, base, implementation = known
        architecture = "stable-diffusion-v2-768-v" if base == "sd_v2" and v else architecture
        found |= {
            "ss_base_model_version": base,
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.implementation": implementation,
        }
    return found


def _network_args(trained: TrainableAdapter) -> dict[str, str]:
    """What kohya's trainer would be given as `--network_args` for the same adapter."""
    adapter = trained.settings
    args = {"algo": "lokr" if adapter.kind == "lokr" else "lora"}
    if adapter.dora:
        args |= {"dora_wd": "True", "wd_on_output": "True"}
    if adapter.kind == "lokr":
        args["factor"] = str(adapter.factor)
    convolutions = any(len(layer.shape) == 4 for layer in trained.stored())
    return args | ({"conv_dim": str(adapter.rank), "conv_alpha": str(adapter.alpha)} if convolutions else {})
