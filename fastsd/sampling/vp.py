"""Samplers of the discrete variance-preserving process: DDPM, DDIM, PNDM, LCM, Euler-Maruyama.

Notation: A is alpha_bar at the row's timestep, P at the level after the row.
"""

from __future__ import annotations

import math

from fastsd.errors import FastsdError
from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table, TableBuilder, TableRow, vp_level, vp_prediction

DISTILLED = 50  # timesteps that distillation used, unless the checkpoint states `original_inference_steps`


def ddpm(schedule: Schedule) -> Table:
    """Ancestral sampling with the posterior q(x_prev | x, x0) (Ho et al. 2020, equations 6 and 7).

    The variance is "small", or "large" (beta itself) if the checkpoint's `variance_type` is "fixed_large".

    Where steps skip timesteps, beta = 1 - A / P (Nichol and Dhariwal 2021, section 4).
    """
    alpha_bar, times = _grid(schedule)
    large = schedule.option("variance_type", "fixed_small") == "fixed_large"
    builder = TableBuilder(mix=vp_level(alpha_bar[times[schedule.start]]))
    for i in range(schedule.start, len(times)):
        A = alpha_bar[times[i]]
        P = alpha_bar[times[i + 1]] if i + 1 < len(times) else 1.0
        beta = 1 - A / P
        # diffusers clamps the variance to at least 1e-20; that matters in the last row, where it would be 0.
        variance = beta if large else max(beta * (1 - P) / (1 - A), 1e-20)
        variance = variance if times[i] > 0 else 0.0
        builder.add(
            TableRow(
                t=times[i],
                prediction=vp_prediction(schedule.config.prediction_type, *vp_level(A)),
                a=math.sqrt(A / P) * (1 - P) / (1 - A),
                b=[math.sqrt(P) * beta / (1 - A)],
                n=math.sqrt(variance),
                draw=times[i] > 0,
                step=i,
                keep=vp_level(P),
            )
        )
    return builder.table()


def ddim(schedule: Schedule) -> Table:
    """Deterministic with eta = 0, as noisy as DDPM with eta = 1 (Song, Meng and Ermon 2021, equations 12 and 16).

    A row goes to t - T // N. In "leading" spacing that is the next timestep, in others close to it.
    """
    config, (alpha_bar, times) = schedule.config, _grid(schedule)
    stride = config.num_train_timesteps // schedule.num_inference_steps
    final = 1.0 if config.set_alpha_to_one else alpha_bar[0]
    builder = TableBuilder(mix=vp_level(alpha_bar[times[schedule.start]]))
    for i in range(schedule.start, len(times)):
        A = alpha_bar[times[i]]
        P = alpha_bar[times[i] - stride] if times[i] >= stride else final
        builder.add(ddim_row(schedule, times[i], i, A, P, _level_of_next(alpha_bar, times, i)))
    return builder.table()


def ddim_row(schedule: Schedule, t: int, step: int, A: float, P: float, keep: tuple[float, float]) -> TableRow:
    """A row at timestep t, from alpha_bar A to P (Song, Meng and Ermon 2021, equation 12)."""
    n = schedule.eta * math.sqrt((1 - P) / (1 - A) * (1 - A / P))
    a = math.sqrt(max(1 - P - n * n, 0.0) / (1 - A))  # with eta = 1, rounding can make 1 - P - n^2 negative
    return TableRow(
        t=t,
        prediction=vp_prediction(schedule.config.prediction_type, *vp_level(A)),
        a=a,
        b=[math.sqrt(P) - a * math.sqrt(A)],
        n=n,
        draw=schedule.eta > 0,
        step=step,
        keep=keep,
    )


# Weights of the outputs, newest first (Liu et al. 2022, equation 12). The second row averages two calls one step apart,
# as in the improved Euler method.
_PLMS = ((1.0,), (1 / 2, 1 / 2), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(schedule: Schedule) -> Table:
    """Pseudo linear multistep without its Runge-Kutta start, known as PLMS (Liu et al. 2022, algorithm 2).

    The second timestep is visited twice: the second row repeats the first step, with the average of its two ends. The
    history holds noise (or v) predictions; a predicted sample is converted to noise first. `start` counts in the list
    with the repeated timestep, as in diffusers, so an image-to-image run has N + 1 - start rows.

    Raises:
        FastsdError: zero terminal SNR.
    """
    config, (alpha_bar, base) = schedule.config, _grid(schedule)
    if config.rescale_betas_zero_snr:
        raise FastsdError("pndm cannot start from zero terminal SNR; use ddim, euler or dpm++2m", argument="sampler")
    times = (base[:2] + base[1:])[schedule.start :]
    stride = config.num_train_timesteps // schedule.num_inference_steps
    final = 1.0 if config.set_alpha_to_one else alpha_bar[0]
    v = config.prediction_type == "v_prediction"
    builder = TableBuilder(mix=vp_level(alpha_bar[times[0]]))
    for i, t in enumerate(times):
        second = i == 1
        level, target = (t + stride, t) if second else (t, t - stride)
        A = alpha_bar[min(level, len(alpha_bar) - 1)]
        P = alpha_bar[target] if target >= 0 else final
        # Equation 9: x' = sqrt(P / A) x - noise_weight eps, where v gives eps = sqrt(A) v + sqrt(1 - A) x.
        noise_weight = (P - A) / (A * math.sqrt(1 - P) + math.sqrt(A * (1 - A) * P))
        x_weight = math.sqrt(P / A) - (noise_weight * math.sqrt(1 - A) if v else 0.0)
        output_weight = -noise_weight * (math.sqrt(A) if v else 1.0)
        builder.add(
            TableRow(
                t=t,
                prediction=_noise_or_v(config.prediction_type, alpha_bar[t]),
                a=0.0 if second else x_weight,
                s=x_weight if second else 0.0,
                b=[output_weight * w for w in _PLMS[min(i, 4)]],
                save=i == 0,
                push=not second,
                step=schedule.start + max(i - 1, 0),
                keep=_level_of_next(alpha_bar, times, i),
            )
        )
    return builder.table()


def lcm(schedule: Schedule) -> Table:
    """Consistency sampling: jump to the clean image, add fresh noise, repeat (Luo et al. 2023, algorithm 3).

    The timesteps are N of those that distillation used, evenly spaced; these are 50, or the checkpoint's
    `original_inference_steps`. The boundary condition is c_skip and c_out of Song et al. 2023, appendix C, at 10 t (or
    `timestep_scaling` t) with sigma_data = 1/2.

    Raises:
        FastsdError: more steps than distillation used.
    """
    scale, sigma_data, steps = schedule.option("timestep_scaling", 10.0), 0.5, schedule.num_inference_steps
    times, alpha_bar = distilled_timesteps(schedule, "lcm"), schedule.alphas_cumprod.tolist()
    builder = TableBuilder(mix=vp_level(alpha_bar[times[schedule.start]]))
    for i in range(schedule.start, steps):
        signal, noise = _level_of_next(alpha_bar, times, i)
        u = times[i] * scale
        c_skip, c_out = sigma_data**2 / (u * u + sigma_data**2), u / math.sqrt(u * u + sigma_data**2)
        builder.add(
            TableRow(
                t=times[i],
                prediction=vp_prediction(schedule.config.prediction_type, *vp_level(alpha_bar[times[i]])),
                a=signal * c_skip,
                b=[signal * c_out],
                n=noise,
                draw=i + 1 < steps,
                step=i,
                keep=(signal, noise),
            )
        )
    return builder.table()


def euler_maruyama(schedule: Schedule) -> Table:
    """Euler-Maruyama on the reverse of the variance-preserving SDE (Song et al. 2021, equations 6 and 11).

    In the time variable B = integral of beta dt, where alpha_bar = exp(-B), the reverse SDE is
    dx = (x / 2 + score) dB + dw, with score = (sqrt(A) D - x) / (1 - A). Between two timesteps B changes by log(P / A),
    so levels match the training betas exactly. The last row adds no noise, since no later row would remove it.

    Raises:
        FastsdError: zero terminal SNR, where B is infinite.
    """
    if schedule.config.rescale_betas_zero_snr:
        raise FastsdError(
            "euler_maruyama cannot start from zero terminal SNR; use ddim, euler or dpm++2m", argument="sampler"
        )
    alpha_bar, times = _grid(schedule)
    builder = TableBuilder(mix=vp_level(alpha_bar[times[schedule.start]]))
    for i in range(schedule.start, len(times)):
        A = alpha_bar[times[i]]
        keep = _level_of_next(alpha_bar, times, i)
        dB = max(math.log(keep[0] ** 2 / A), 0.0)  # 0 where a timestep that is cut to the last repeats it
        last = i + 1 == len(times)
        builder.add(
            TableRow(
                t=times[i],
                prediction=vp_prediction(schedule.config.prediction_type, *vp_level(A)),
                a=1 + dB / 2 - dB / (1 - A),
                b=[dB * math.sqrt(A) / (1 - A)],
                n=0.0 if last else math.sqrt(dB),
                draw=not last,
                step=i,
                keep=keep,
            )
        )
    return builder.table()


def distilled_timesteps(schedule: Schedule, sampler: str) -> list[int]:
    """N of the timesteps that distillation used, evenly spaced, from high to low; or those that the caller listed.

    Raises:
        FastsdError: more steps than those; it names the sampler.
    """
    steps, total = schedule.num_inference_steps, schedule.config.num_train_timesteps
    if schedule.listed:
        return [int(t) for t in schedule.listed]
    count = min(schedule.option("original_inference_steps", DISTILLED), total)
    if steps > count:
        raise FastsdError(f"{sampler} takes 1 to {count}, not {steps}", argument="num_inference_steps")
    distilled = [i * (total // count) - 1 for i in range(count, 0, -1)]
    return [distilled[i * count // steps] for i in range(steps)]


def _grid(schedule: Schedule) -> tuple[list[float], list[int]]:
    """alpha_bar of every training timestep, and the timesteps of the run."""
    return schedule.alphas_cumprod.tolist(), [int(t) for t in schedule.timesteps()]


def _level_of_next(alpha_bar: list[float], times: list[int], i: int) -> tuple[float, float]:
    """(signal, noise) at the timestep after the i-th; the clean image after the last."""
    return vp_level(alpha_bar[times[i + 1]]) if i + 1 < len(times) else (1.0, 0.0)


def _noise_or_v(prediction_type: str, alpha_bar: float) -> tuple[float, float]:
    """(p, q) for PNDM's history: the network's output itself, or the noise that a predicted sample implies."""
    if prediction_type != "sample":
        vp_prediction(prediction_type, 1.0, 0.0)  # raises for an unknown type
        return 0.0, 1.0
    signal, noise = vp_level(alpha_bar)
    return 1 / noise, -signal / noise
