"""Levels of noise, SDEs, and the weights of the loss."""

from __future__ import annotations

import pytest
import torch

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.train.noising import NoiseLevels, min_snr_weight, offset_noise, prediction_target, stratified

LINEAR = SchedulerConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)


def test_the_exported_schedule_has_the_levels_of_the_vp_sde() -> None:
    levels = NoiseLevels(LINEAR, "vp")
    time = torch.arange(1, 1001, dtype=torch.float64) / 1000
    error = (levels.alpha_bars.log() - levels.alpha_bar(time).log()).abs()
    # log(1 - b) = -b - b^2 / 2 - ..., and the sum of b over the steps is the integral to within half of the first and
    # the last b, by the trapezoid rule, which is exact for a line: |error| <= 1.02 * sum b^2 / 2 + (b_1 + b_i) / 2.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bound = 0.51 * betas.square().cumsum(0) + (betas[0] + betas) / 2
    assert (error <= bound).all()


def test_the_exported_schedule_has_the_levels_of_the_ve_sde() -> None:
    levels = NoiseLevels(SchedulerConfig(), "ve", 0.02, 80.0)
    time = torch.arange(1, 1001, dtype=torch.float64) / 1000
    # A product of 1,000 factors, each rounded to 2^-53.
    torch.testing.assert_close(levels.alpha_bars, levels.alpha_bar(time), rtol=1000 * 2**-52, atol=0)
    sigma = ((1 - levels.alpha_bars) / levels.alpha_bars).sqrt()
    torch.testing.assert_close(sigma[[499, 999]], torch.tensor([(0.02 * 80) ** 0.5, 80.0]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sde", ["", "vp", "ve"])
def test_time_and_level_agree(sde: str) -> None:
    levels = NoiseLevels(LINEAR, sde)
    time, alpha_bar = levels.at(torch.tensor([0.0, 0.25, 0.5, 0.999]))
    assert (time.diff() > 0).all() and (alpha_bar.diff() < 0).all() and time[0] >= 0 and time[-1] <= 999
    # Between two timesteps, the level of the SDE is between theirs.
    below, above = (levels.alpha_bars[time.double().add(n).floor().long().clamp_max(999)].float() for n in (0, 1))
    slack = 0.085 if sde == "vp" else 1e-5  # of the discrete schedule, as above: 0.51 * 0.135 + 0.01 = 0.079
    assert (alpha_bar <= below * (1 + slack)).all() and (alpha_bar >= above * (1 - slack)).all()


def test_an_sde_refuses_what_has_no_score() -> None:
    with pytest.raises(FastsdError, match='prediction_type = "epsilon"'):
        NoiseLevels(SchedulerConfig(prediction_type="v_prediction"), "vp")
    with pytest.raises(FastsdError, match="no score at zero SNR"):
        NoiseLevels(SchedulerConfig(rescale_betas_zero_snr=True), "ve")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_counts_the_clean_latents_error(prediction: str) -> None:
    torch.manual_seed(0)
    scheduler = SchedulerConfig(prediction_type=prediction)
    alpha_bar = torch.tensor([0.999, 0.9, 0.5, 0.01], dtype=torch.float64)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x, noise, error = torch.randn(3, 4, dtype=torch.float64)
    noisy, guess = signal * x + sigma * noise, x + error  # a prediction whose clean latent is wrong by `error`
    wrong = prediction_target(scheduler, guess, (noisy - signal * guess) / sigma, alpha_bar)
    squared = (wrong - prediction_target(scheduler, x, noise, alpha_bar)).square()
    snr = alpha_bar / (1 - alpha_bar)
    expected = snr.clamp_max(5) * error.square()
    # SNR^2 is at most 10^6, so float64 keeps ten digits of the difference.
    torch.testing.assert_close(squared * min_snr_weight(scheduler, alpha_bar, 5.0), expected, rtol=1e-9, atol=1e-9)


def test_noise_offset() -> None:
    noise = torch.zeros(500, 2, 2, 4)
    assert offset_noise(noise, 0.0, None) is noise  # type: ignore[arg-type]
    moved = offset_noise(noise, 0.1, torch.Generator().manual_seed(0))
    assert (moved == moved[:, :1, :1]).all()
    # 2,000 samples: the standard deviation's own is 1 / sqrt(4000) of it; four of those.
    assert float(moved[:, 0, 0].std()) == pytest.approx(0.1, rel=4 / 4000**0.5)


def test_stratified() -> None:
    values = stratified(8, torch.Generator().manual_seed(0))
    assert ((values * 8).floor() == torch.arange(8)).all()
