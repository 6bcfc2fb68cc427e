"""The kernel of `add_bias_residual` against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.kernels import candidates, moments
from fastsd.kernels.choice.op import Way
from fastsd.kernels.conv2d import OP, conv2d
from fastsd.kernels.launch.groupnorm_silu import GroupNormLaunch
from fastsd.kernels.launch.rowwise import ADD_BIAS_RESIDUAL
from fastsd.kernels.launch.rowwise import add_bias_residual as choose
from fastsd.kernels.triton import add_bias_residual as module
from fastsd.kernels.triton import groupnorm_silu as norm
from fastsd.kernels.triton import groupnorm_silu_split as split
from fastsd.kernels.triton import groupnorm_silu_tiles as tiles
from tests.support.triton_checks import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    Guards,
    broken,
    broken_with_importers,
    check,
    must_fail,
    rand,
)

CASES = {  # shape
    "the decoder's last convolution": (1, 5, 7, 3),
    "the UNet's top level": (2, 3, 3, 320),
    "a prime": (1, 7, 37),
    "wider than a tile": (3, 300),
    "one column": (5, 1),
    "one row": (1, 64),
}


def run(shape, dtype, bias, residual, relu, layout="contiguous", kernels: Any = module):
    def in_place(y, b, r):
        out = torch.empty_like(y).copy_(y)  # between guard zones
        assert kernels.add_bias_residual(out, b, r, relu) is out
        return out

    def plain(y, b, r):
        y = y if b is None else y + b
        y = y if r is None else y + r
        return y.relu() if relu else y

    b = rand(shape[-1], dtype=dtype, seed=1) if bias else None
    r = rand(*shape, dtype=dtype, seed=2) if residual else None
    check(in_place, plain, rand(*shape, dtype=dtype), b, r, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reason", CASES)
def test_add_bias_residual(reason, dtype):
    run(CASES[reason], dtype, True, True, False, "gaps")
    run(CASES[reason], dtype, True, False, True)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 300)),
    st.sampled_from(DTYPES),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(LAYOUTS),
)
def test_add_bias_residual_at_any_shape(shape, dtype, parts, layout):
    run(shape, dtype, *parts, layout)


def test_relu_keeps_what_is_not_a_number():
    y = torch.tensor([[-1.0, torch.nan, 2.0]], device=DEVICE)
    result = module.add_bias_residual(y, relu=True).cpu()
    assert result[0, 0] == 0 and result[0, 1].isnan() and result[0, 2] == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_leaves_bias_residual_and_relu_to_it(dtype, monkeypatch):
    """Each convolution that has any of them takes one pass more, one that has none takes no pass."""
    passes = []
    launch = module.add_bias_residual
    monkeypatch.setattr(module, "add_bias_residual", lambda *a: passes.append(1) or launch(*a))
    x, w = rand(1, 4, 5, 8, dtype=dtype).to(DEVICE), rand(6, 8, 3, 3, dtype=dtype, scale=0.1).to(DEVICE)
    b, r = rand(6, dtype=dtype).to(DEVICE), rand(1, 4, 5, 6, dtype=dtype).to(DEVICE)
    with torch.no_grad():
        y = conv2d(x, w, None, 1, (1, 1, 1, 1))
        assert not passes
        whole = conv2d(x, w, b, 1, (1, 1, 1, 1), r, relu=True)
    assert len(passes) == 1
    # One rounding of the sum, where the convolution's own result was rounded before.
    wanted = (y.float() + b.float() + r.float()).relu()
    torch.testing.assert_close(whole.float(), wanted, rtol=torch.finfo(dtype).eps, atol=0)


MUTATIONS = {
    "reads and writes past the rows": ("row < R", "row < R + 1"),
    "reads and writes past the columns": ("column < C", "column < C + 1"),
    "omits the bias": ("y += tl.load(bias_ptr", "z = tl.load(bias_ptr"),
    "omits the residual": ("y += tl.load(residual_ptr", "z = tl.load(residual_ptr"),
    "wrong stride of the residual": ("r * stride_rr", "r * C"),
    "omits ReLU": ("y = tl.where(y < 0.0", "z = tl.where(y < 0.0"),
    "handles one block of columns": ("-(-columns // launch.block_columns))](", "1)]("),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_checks_notice_when_add_bias_residual(fault: str, tmp_path: Path):
    copy = broken(module, *MUTATIONS[fault], tmp_path)
    with must_fail():
        run((3, 300), torch.float32, True, True, False, "gaps", kernels=copy)
        run((3, 37), torch.float32, True, True, True, kernels=copy)


SPLIT = GroupNormLaunch(groups=4, block_p=16, warps=4, split_pixels=32, apply_pixels=48)
MAPS = {  # batch, height, width, channels, mean, deviation
    "ten channels a group, as in SD1.5": (2, 8, 8, 320, 0.0, 1.0),
    "a short last run": (2, 7, 7, 64, 0.0, 1.0),
    "one pixel in the last run": (1, 3, 11, 64, 0.0, 1.0),
    "one run": (1, 3, 5, 32, 0.0, 1.0),
    "a large mean": (1, 7, 7, 64, 100.0, 1.0),
    "a constant map": (1, 7, 7, 64, 30.0, 0.0),
}


def run_moments(case, dtype, residual=True, kernels: Any = module):
    """Check the sum by the rule, and the moments against those of the written map in float64."""
    batch, height, width, channels, mean, std = case
    shape, found = (batch, height, width, channels), []

    def in_place(y, b, r):
        out = torch.empty_like(y).copy_(y)  # between guard zones
        stride = 0 if r is None else r.stride(2)
        assert kernels._with_moments(out, b, r, stride, SPLIT) is out
        found.append((out.double().cpu(), moments.of(out)))
        return out

    check(
        in_place,
        lambda y, b, r: y + b if r is None else y + b + r,
        rand(*shape, dtype=dtype, mean=mean, scale=std),
        rand(channels, dtype=dtype, scale=std, seed=1),
        rand(*shape, dtype=dtype, scale=std, seed=2) if residual else None,
    )
    y, noted = found[0]
    assert noted is not None and noted.run == SPLIT.split_pixels
    runs = y.flatten(1, 2).split(noted.run, dim=1)
    groups = [part.unflatten(2, (moments.GROUPS, -1)).transpose(1, 2).flatten(2) for part in runs]  # [B, groups, n]
    means = torch.stack([part.mean(2) for part in groups], 1)
    squares = torch.stack([(part - part.mean(2, keepdim=True)).square().sum(2) for part in groups], 1)
    n = groups[0].shape[2]
    # Roundings of a mean: 3 in each of 2 updates of a lane, 6 in the sum of 16 lanes, 6 in that of up to 10 channels.
    error = 18 * 2.0**-24 * y.abs().max()
    assert bool(noted.values.isfinite().all())
    values = noted.values.double().cpu()
    assert (values[:, 0] - means).abs().max() <= error
    assert bool(
        (
            (values[:, 1] - squares).abs()
            <= 32 * 2.0**-24 * squares + 2 * n**0.5 * error * squares.sqrt() + n * error**2
        ).all()
    )


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("reason", MAPS)
def test_the_pass_takes_the_moments_of_what_it_writes(reason, dtype):
    run_moments(MAPS[reason], dtype, residual=reason != "one run")


MOMENT_MUTATIONS: dict[str, tuple[Any, str, str]] = {
    "reads past the run": (module, "offset + row < n\n        mask", "offset + row <= n\n        mask"),
    "writes past the channels": (
        module,
        "live[:, None] & within[None, :]\n        pointers",
        "live[:, None]\n        pointers",
    ),
    "first image for all": (module, "b * HW + start", "0 * b + start"),
    "takes the moments before rounding": (module, "rounded.to(tl.float32), 0.0)", "y, 0.0)"),
    "omits the residual": (module, "y += tl.load(others", "z = tl.load(others"),
    "writes moments of the next group": (module, "block * G + g\n", "block * G + g + 1\n"),
    "counts the padding": (tiles, "tl.where(live[:, None], y - mean, 0.0)", "y - mean"),
    "weights all lanes equally": (
        tiles,
        "((n - tl.arange(0, BLOCK_P) + BLOCK_P - 1)",
        "((n + BLOCK_P - 1) + 0 * tl.arange(0, BLOCK_P)",
    ),
    "omits the spread between channels": (tiles, "n * centred * centred, 1)", "0 * centred, 1)"),
}


@pytest.mark.parametrize("fault", MOMENT_MUTATIONS)
def test_the_checks_notice_when_the_pass(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    where, old, new = MOMENT_MUTATIONS[fault]
    copy = broken_with_importers(where, old, new, [] if where is module else [module], tmp_path, monkeypatch)
    with must_fail():
        run_moments(MAPS["a short last run"], torch.float16, kernels=copy)
        run_moments(MAPS["ten channels a group, as in SD1.5"], torch.float16, kernels=copy)
        run_moments(MAPS["a large mean"], torch.float16, kernels=copy)


def given_and_own(case, dtype, launch, kernels: Any = norm):
    """The norm of a map with noted moments, and of its copy, which has none."""
    batch, height, width, channels, mean, std = case
    y = rand(batch, height, width, channels, dtype=dtype, mean=mean, scale=std).to(DEVICE)
    module._with_moments(y, None, None, 0, SPLIT)
    w, b = rand(channels, dtype=dtype).to(DEVICE), rand(channels, dtype=dtype, seed=1).to(DEVICE)
    guards = Guards()
    with guards:
        given = kernels.groupnorm_silu(y, w, b, moments.GROUPS, 1e-5, launch=launch)
    guards.intact()
    return given, kernels.groupnorm_silu(y.clone(), w, b, moments.GROUPS, 1e-5, launch=launch)


@pytest.mark.parametrize("merged", [1, 64])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("reason", MAPS)
def test_a_norm_takes_given_moments_instead_of_its_own(reason, dtype, merged, monkeypatch):
    """The moments differ by a few fp32 roundings of the mean, the result by one rounding of the dtype."""
    launches = []
    first = split._groupnorm_moments_kernel
    monkeypatch.setattr(split, "MERGED", merged)
    monkeypatch.setattr(split, "_groupnorm_moments_kernel", Counting(first, launches))
    given, own = given_and_own(MAPS[reason], dtype, SPLIT)
    assert len(launches) == 1  # of the copy
    allowed = 2 * torch.finfo(dtype).eps * own.abs().max().item()
    if MAPS[reason][5] == 0:  # one rounding of the mean, 30, divided by the square root of eps
        allowed += 4 * 30 * 2.0**-24 / 1e-5**0.5
    assert (given - own).abs().max().item() <= allowed


class Counting:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, launches: list[int]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches.append(1)
        return self.kernel[grid]


def test_given_moments_are_only_for_the_norm_they_fit():
    """Not with an addition, a skip connection or other groups, and not for a copy or a view of the map."""
    y = rand(1, 7, 7, 64, dtype=torch.float16).to(DEVICE)
    module._with_moments(y, None, None, 0, SPLIT)
    assert split.given_moments(y, y, None, 32) is moments.of(y) is not None
    assert split.given_moments(y, y, torch.ones(1, 64), 32) is None
    assert split.given_moments(y, y.clone(), None, 32) is None
    assert split.given_moments(y, y, None, 16) is None
    assert moments.of(y.clone()) is moments.of(y[:]) is None


def test_a_convolution_hands_its_moments_to_the_norm_after_it():
    """Of maps that the norm would read twice, in 16 bits."""
    cudnn = OP.candidate("cudnn")
    assert cudnn is not None
    for side, dtype, noted in ((136, torch.float16, True), (136, torch.float32, False), (16, torch.float16, False)):
        x, w = rand(1, side, side, 8, dtype=dtype).to(DEVICE), rand(128, 8, 1, 1, dtype=dtype).to(DEVICE)
        with torch.no_grad(), candidates.only("conv2d", Way(cudnn)):
            y = conv2d(x, w, rand(128, dtype=dtype).to(DEVICE))
        assert (moments.of(y) is not None) == noted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.ones(2, 8, dtype=torch.float64)}, "float64"),
        ({"y": torch.ones(8, 2).T}, "contiguous"),
        ({"bias": torch.ones(4)}, r"shape \[8\]"),
        ({"residual": torch.ones(3, 8)}, "residual needs the shape"),
        ({"residual": torch.ones(8, 2).T}, "strides"),
        ({"bias": torch.ones(8, requires_grad=True)}, "no gradients"),
    ],
)
def test_add_bias_residual_refuses(changes: dict[str, Any], message: str):
    good = {"y": torch.ones(2, 8), "bias": torch.ones(8), "residual": torch.ones(2, 8)}
    with pytest.raises(ValueError, match=message):
        module.add_bias_residual(**(good | changes))


def test_add_bias_residual_of_no_rows():
    assert module.add_bias_residual(torch.ones(0, 8), torch.ones(8)).shape == (0, 8)


@pytest.mark.parametrize("architecture", ADD_BIAS_RESIDUAL)
def test_launches_of_add_bias_residual_waste_no_column_of_a_model(architecture: int):
    for columns in (128, 256, 320, 512, 640, 960, 1280):
        launch = choose(architecture, columns)
        assert columns % launch.block_columns == 0 and launch.warps in (1, 2, 4, 8, 16)
    for columns in (1, 3, 4, 37, 300):
        assert choose(architecture, columns).block_columns >= min(columns, 256)
