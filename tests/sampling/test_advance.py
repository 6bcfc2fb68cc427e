"""The update and its state, against the plain formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsd.config import SchedulerConfig
from fastsd.kernels import advance as op
from fastsd.sampling import advance
from fastsd.sampling.build import build
from fastsd.sampling.table import Table

SHAPE = (2, 3, 5, 4)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_table(rows: int, seed: int) -> Table:
    """A table that uses every column and flag, which no single sampler does."""
    generator = np.random.default_rng(seed)
    table = build("heun", (rows + 1) // 2, SchedulerConfig())
    flags = {name: generator.random(rows) < 0.5 for name in ("save", "push", "draw")}
    return replace(table, rows=generator.normal(size=(rows, 12)) * 0.7, **flags)


def plain_loop(table: Table, x: torch.Tensor, outs: list[torch.Tensor], noises: list[torch.Tensor], g: float) -> list:
    """The row format of `fastsd.sampling.table`, in plain PyTorch."""
    zero = torch.zeros_like(x)
    saved, history, z, z_before, states = zero, [zero, zero, zero], zero, zero, []
    for i, (_, _, p, q, a, s, b0, b1, b2, b3, n, m) in enumerate(table.rows.tolist()):
        if table.save[i]:
            saved = x
        if table.draw[i]:
            z = noises[i]
        uncond, cond = outs[i].chunk(2)
        D = p * x + q * (uncond + g * (cond - uncond))
        x = a * x + s * saved + b0 * D + b1 * history[0] + b2 * history[1] + b3 * history[2] + n * z + m * z_before
        if table.push[i]:
            history = [D, history[0], history[1]]
        z_before = z
        states.append(x)
    return states


@pytest.mark.parametrize("guidance", [7.5, torch.tensor(7.5, dtype=torch.float64)])
def test_advance_agrees_with_the_plain_loop(guidance: float | torch.Tensor) -> None:
    table, noise = random_table(9, seed=0), normal(*SHAPE, seed=1)
    outs = [normal(4, *SHAPE[1:], seed=10 + i) for i in range(len(table))]
    noises = [normal(*SHAPE, seed=30 + i) for i in range(len(table))]
    state = advance.begin(table, noise)
    expected = plain_loop(table, table.init * noise, outs, noises, 7.5)
    for i, x_next in enumerate(expected):
        advance.step(state, outs[i], guidance, 0.0, noises[i] if advance.draws_noise(state) else None)
        torch.testing.assert_close(state.x, x_next, rtol=1e-13, atol=1e-13 * float(x_next.abs().max()))
        c_in = table.rows[i + 1, 1] if i + 1 < len(table) else 1.0
        torch.testing.assert_close(advance.model_input(state), c_in * state.x)
    assert state.done


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_stays_in_fp32_for_any_dtype_of_the_network(dtype: torch.dtype) -> None:
    table = build("dpm++2m", 12, SchedulerConfig())
    outs = [normal(4, *SHAPE[1:], seed=i).to(dtype) for i in range(12)]
    narrow = advance.begin(table, normal(*SHAPE, seed=99, dtype=dtype))
    wide = advance.begin(table, normal(*SHAPE, seed=99, dtype=dtype).double())
    for out in outs:
        advance.step(narrow, out, 7.5)
        advance.step(wide, out.double(), 7.5)
    assert narrow.x.dtype == torch.float32
    # 12 rows of about ten fp32 operations, on terms up to the first rows' coefficients (14) times outputs (40).
    bound = 12 * 10 * 2.0**-24 * 14 * 40
    assert (narrow.x - wide.x).abs().max() < bound


def test_guidance_rescale_agrees_with_lin_et_al() -> None:
    out, g, phi = normal(4, *SHAPE[1:], seed=3), 9.0, 0.7
    uncond, cond = out.chunk(2)
    mixed = uncond + g * (cond - uncond)
    spread = cond.std(dim=(1, 2, 3), keepdim=True) / mixed.std(dim=(1, 2, 3), keepdim=True)
    expected = phi * (mixed * spread) + (1 - phi) * mixed
    actual = op.guided(out, 2, g, op.guidance_rescale(out, g, phi))
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_guidance_rescale_of_a_flat_output_is_finite() -> None:
    out = torch.ones(4, *SHAPE[1:])
    assert torch.equal(op.guidance_rescale(out, 5.0, 0.7), torch.ones(2))


def test_step_applies_guidance_rescale() -> None:
    table = build("euler", 4, SchedulerConfig())
    plain, by_hand, rescaled = (advance.begin(table, normal(*SHAPE, seed=1)) for _ in range(3))
    out = normal(4, *SHAPE[1:], seed=3)
    advance.step(plain, out, 9.0)
    advance.step(by_hand, op.guided(out, 2, 9.0, op.guidance_rescale(out, 9.0, 0.7)))
    advance.step(rescaled, out, 9.0, 0.7)
    assert torch.equal(rescaled.x, by_hand.x) and not torch.equal(rescaled.x, plain.x)


@pytest.mark.parametrize("sampler", ["dpm++sde", "pndm", "unipc"])
def test_a_sample_does_not_depend_on_its_batch(sampler: str) -> None:
    table = build(sampler, 5, SchedulerConfig())
    noise = normal(3, 16, 16, 4, seed=0, dtype=torch.float32)

    def run(samples: slice) -> torch.Tensor:
        state = advance.begin(table, noise[samples])
        for i in range(len(table)):
            x_in = advance.model_input(state)
            fresh = normal(3, 16, 16, 4, seed=i, dtype=torch.float32)[samples]
            out = torch.cat([x_in.sin(), x_in.cos()])
            advance.step(state, out, 7.5, 0.7, fresh if advance.draws_noise(state) else None)
        return state.x

    together = run(slice(0, 3))
    for i in range(3):
        assert torch.equal(run(slice(i, i + 1)), together[i : i + 1])


def test_begin_adds_noise_to_an_image_and_broadcasts_it() -> None:
    table = build("euler", 10, SchedulerConfig(), start=4)
    noise, image = normal(*SHAPE, seed=0), normal(3, 5, 4, seed=1)
    state = advance.begin(table, noise, image)
    torch.testing.assert_close(state.x, image + table.mix[1] * noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(advance.model_input(state), state.x / (table.mix[1] ** 2 + 1) ** 0.5)


def test_a_table_without_rows_is_done_at_the_start() -> None:
    table = build("euler", 2, SchedulerConfig()).without_rows()
    image = normal(*SHAPE, seed=0)
    state = advance.begin(table, normal(*SHAPE, seed=1), image)
    assert state.done and torch.equal(state.x, image)


def test_the_known_image_is_restored_outside_the_mask() -> None:
    table = build("euler", 3, SchedulerConfig())
    noise, image = normal(*SHAPE, seed=0), normal(*SHAPE, seed=1)
    mask = (normal(1, 3, 5, 1, seed=2) > 0).double()
    state = advance.begin(table, noise)
    for i in range(3):
        advance.step(state, advance.model_input(state).sin())
        before = state.x.clone()
        advance.restore_known(state, image, noise, mask)
        known = image + table.keep[i, 1] * noise
        assert torch.equal(state.x, torch.where(mask > 0, before, known))
        c_in = table.rows[i + 1, 1] if i < 2 else 1.0
        torch.testing.assert_close(advance.model_input(state), c_in * state.x)
    assert torch.equal(torch.where(mask > 0, image, state.x), image)  # at the end, exactly the image


def test_buffers_are_never_replaced() -> None:
    state = advance.begin(build("dpm++2m_sde", 3, SchedulerConfig()), normal(*SHAPE, seed=0))
    addresses = {name: buffer.data_ptr() for name, buffer in state.operands().items()}
    for _ in range(3):
        advance.step(state, state.x_in.sin(), noise_i=normal(*SHAPE, seed=1))
    assert {name: buffer.data_ptr() for name, buffer in state.operands().items()} == addresses


def test_misuse_raises() -> None:
    state = advance.begin(build("ddpm", 1, SchedulerConfig()), normal(*SHAPE, seed=0))
    with pytest.raises(ValueError, match="draws noise"):
        advance.step(state, state.x_in)
    with pytest.raises(ValueError, match="twice or three times its batch"):
        advance.step(state, state.x_in[:1], noise_i=state.x_in)
    with pytest.raises(ValueError, match="call restore_known after step"):
        advance.restore_known(state, state.x, state.x, state.x)
    advance.step(state, state.x_in, noise_i=state.x_in)
    with pytest.raises(ValueError, match="every row"):
        advance.step(state, state.x_in)
    with pytest.raises(ValueError, match="four dimensions"):
        advance.begin(state.host_table, torch.zeros(3, 5, 4))
