"""The loss of a checkpoint's own schedule and prediction type, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from fastsd.config import EDMConfig, SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.train.tuning.noise_loss import LossSettings, NoiseLoss


def make(prediction: str = "epsilon", **settings: float) -> NoiseLoss:
    scheduler = SchedulerConfig(sampler="ddim", prediction_type=prediction)
    return NoiseLoss(scheduler, LossSettings(**settings))  # type: ignore[arg-type]


def samples(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, count, 4, 4, 4, generator=generator).unbind()
    return x, noise, torch.tensor([10, 500, 990])[:count]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_right_prediction_costs_nothing(prediction: str) -> None:
    loss, (x, noise, t) = make(prediction), samples()
    alpha_bar = loss.alpha_bars[t].float()[:, None, None, None]
    right = {"epsilon": noise, "sample": x, "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x}
    assert torch.equal(loss.errors(right[prediction], x, noise, t), torch.zeros(3))
    assert torch.allclose(loss.errors(right[prediction] + 2, x, noise, t), torch.full((3,), 4.0))


def test_noisy_latents_keep_the_variance() -> None:
    loss = make()
    x, noise, t = samples()
    alpha_bar = loss.alpha_bars[t].float()[:, None, None, None]
    assert torch.equal(loss.noisy(x, noise, t), alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise)


def test_min_snr_clips_the_weight_of_the_clean_images_error() -> None:
    """Whatever is predicted, an error of the clean image of size e weighs min(SNR, 5) e^2: an error d of the noise is
    one of d / sqrt(SNR) of the image, an error of v one of d / sqrt(SNR + 1)."""
    t = torch.tensor([1, 300, 700, 999])
    alpha_bar = make().alpha_bars[t]
    snr = alpha_bar / (1 - alpha_bar)
    for kind, factor in {"sample": 1.0, "epsilon": snr, "v_prediction": snr + 1}.items():
        expected = snr.clamp_max(5.0) / factor
        assert torch.allclose(make(kind, min_snr=5.0).weights(t).double(), expected, rtol=2.0**-23)
    assert torch.equal(make().weights(t), torch.ones(4))


def test_min_snr_at_zero_terminal_snr() -> None:
    scheduler = SchedulerConfig(sampler="ddim", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    weights = NoiseLoss(scheduler, LossSettings(min_snr=5.0)).weights(torch.tensor([999]))
    assert weights.item() == 0.0


def test_a_mask_leaves_out_the_rest_of_the_image() -> None:
    loss, (x, noise, t) = make(), samples(1)
    mask = torch.zeros(1, 4, 4)
    mask[:, :2] = 1
    wrong = noise.clone()
    wrong[:, 2:] += 100.0
    wrong[:, :2] += 1.0
    assert torch.allclose(loss.errors(wrong, x, noise, t, mask), torch.ones(1))
    assert torch.equal(loss.errors(wrong, x, noise, t, torch.zeros(1, 4, 4)), torch.zeros(1))


def test_noise_offset_is_the_same_over_a_channel() -> None:
    """The mean of a channel has the variance offset^2 + 1 / pixels; 4000 channels, five standard deviations."""
    plain, offset = make(), make(noise_offset=0.5)
    x = torch.zeros(1000, 8, 8, 4)
    found = offset.noise_like(x, torch.Generator().manual_seed(0)).mean((1, 2)).var()
    assert abs(float(found) - (0.25 + 1 / 64)) < 5 * math.sqrt(2 / 4000) * 0.27
    assert abs(float(plain.noise_like(x, torch.Generator().manual_seed(0)).std()) - 1) < 0.01


def test_timesteps_cover_the_schedule() -> None:
    t = make().timesteps(10, torch.Generator().manual_seed(0))
    assert sorted(int(one) // 100 for one in t) == list(range(10))


def test_what_is_refused() -> None:
    with pytest.raises(FastsdError, match="EDM noise schedule"):
        NoiseLoss(SchedulerConfig(sampler="euler", edm=EDMConfig()), LossSettings())
    with pytest.raises(FastsdError, match="loss.min_snr is nan; it should be a number of at least 0"):
        LossSettings(min_snr=float("nan")).check()
