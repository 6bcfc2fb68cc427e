"""The kernels of `groupnorm_silu` against float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.kernels.launch.groupnorm_silu import TABLE, GroupNormLaunch, choose, power_of_two
from fastsd.kernels.triton import groupnorm_silu as module
from fastsd.kernels.triton import groupnorm_silu_split as split
from fastsd.kernels.triton import groupnorm_silu_tiles as tiles
from tests.support.triton_checks import DEVICE, DTYPES, LAYOUTS, broken_with_importers, check, must_fail, rand

EPS = 1e-5
SPLIT = GroupNormLaunch(groups=1, block_p=16, warps=4, split_pixels=32, apply_pixels=48)
MERGE = replace(SPLIT, merge=True)


class Case(NamedTuple):
    batch: int
    height: int
    width: int
    channels: int
    groups: int
    skip: int = 0  # further channels
    launch: GroupNormLaunch | None = None
    mean: float = 0.0
    std: float = 1.0


CASES = {
    "ten channels per group, as in SD1.5": Case(2, 8, 8, 40, 4),
    "all sizes odd": Case(1, 5, 7, 33, 3),
    "primes": Case(1, 7, 11, 39, 13),
    "one value per group": Case(2, 1, 1, 8, 8),
    "one pixel": Case(2, 1, 1, 64, 4),
    "one group": Case(1, 3, 4, 20, 1),
    "one channel": Case(1, 3, 4, 1, 1),
    "more pixels than a tile": Case(1, 17, 15, 64, 2, launch=GroupNormLaunch(1, 32, 4)),
    "several groups per program": Case(2, 9, 5, 36, 12, launch=GroupNormLaunch(3, 16, 4)),
    "a group with channels of both parts": Case(2, 4, 5, 40, 2, skip=20),
    "a narrow first part": Case(1, 3, 5, 2, 3, skip=7),
    "split, the last one short": Case(2, 9, 9, 20, 2, launch=SPLIT),
    "split, one pixel in the last": Case(1, 3, 11, 20, 2, launch=SPLIT),
    "split, one only": Case(1, 3, 5, 20, 2, launch=SPLIT),
    "split and merged": Case(2, 9, 9, 24, 2, launch=MERGE),
    "split, of two parts": Case(2, 7, 7, 20, 4, skip=12, launch=replace(SPLIT, groups=2)),
    "E[x^2] - E[x]^2 would cancel": Case(1, 8, 8, 16, 4, mean=30.0, std=1e-3),
    "the same, where rounding the mean matters": Case(
        2, 8, 8, 64, 32, launch=GroupNormLaunch(16, 64, 4), mean=30.0, std=1e-3
    ),
    "the same, split": Case(1, 9, 9, 16, 4, launch=SPLIT, mean=30.0, std=1e-3),
    "eps decides": Case(1, 8, 8, 16, 4, std=1e-6),
    "large activations of the autoencoder": Case(1, 8, 8, 16, 4, std=1e4),
}

# Each case runs in one variant per dtype; hypothesis combines them.
VARIANTS = {
    torch.float32: (True, 0, "contiguous"),
    torch.float16: (False, "batch", "offset"),
    torch.bfloat16: (True, 1, "gaps"),
}


def plain(groups: int, silu: bool, x, weight, bias, add, skip, ahead):
    """In contiguous memory, where PyTorch's norm does not cancel as it does in channels-last memory."""
    x = x if skip is None else torch.cat([x, skip], -1)
    x = x if add is None else x + add[:, None, None, :]
    y = torch.group_norm(x.permute(0, 3, 1, 2).contiguous(), groups, weight, bias, EPS).permute(0, 2, 3, 1)
    y = F.silu(y) if silu else y
    return y if ahead is None else (y, x + ahead)


def run(
    case: Case,
    dtype: torch.dtype,
    silu: bool,
    add: int,
    layout: str = "contiguous",
    ahead: bool = False,
    kernels: Any = module,
):
    """Check one case. add: its number of rows, 0 for none."""
    channels, space = case.channels + case.skip, (case.batch, case.height, case.width)
    like = {"dtype": dtype, "scale": case.std, "mean": case.mean}
    check(
        lambda x, w, b, a, s, h: kernels.groupnorm_silu(x, w, b, case.groups, EPS, silu, a, s, h, case.launch),
        lambda *inputs: plain(case.groups, silu, *inputs),
        rand(*space, case.channels, **like),
        rand(channels, dtype=dtype),
        rand(channels, dtype=dtype, seed=1),
        rand(add, channels, dtype=dtype, scale=case.std) if add else None,
        rand(*space, case.skip, **like, seed=2) if case.skip else None,
        rand(channels, dtype=dtype, scale=min(case.std, 1.0), seed=3) if ahead else None,
        layout=layout,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reason", CASES)
def test_groupnorm_silu(reason, dtype):
    case, (silu, add, layout) = CASES[reason], VARIANTS[dtype]
    run(case, dtype, silu, case.batch if add == "batch" else add, layout, ahead=dtype is not torch.bfloat16)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_groupnorm_silu_at_any_shape(data):
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    height, width, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 2))
    skip = data.draw(st.integers(0, groups * size - 1))
    per_program = data.draw(st.sampled_from([g for g in range(1, groups + 1) if groups % g == 0]))
    block = data.draw(st.sampled_from([16, 32]))
    in_splits = GroupNormLaunch(
        per_program, block, 4, block * data.draw(st.integers(1, 2)), block, data.draw(st.booleans())
    )
    launch = data.draw(st.sampled_from([None, GroupNormLaunch(per_program, block, 4), in_splits]))
    case = Case(batch, height, width, groups * size - skip, groups, skip, launch)
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS))
    run(
        case,
        dtype,
        data.draw(st.booleans()),
        data.draw(st.sampled_from([0, 1, batch])),
        layout,
        data.draw(st.booleans()),
    )


@pytest.mark.parametrize("launch", [None, SPLIT, MERGE])
def test_groupnorm_silu_does_not_depend_on_the_batch(launch):
    x, add = rand(3, 7, 7, 20, dtype=torch.float32).to(DEVICE), rand(3, 20, dtype=torch.float32).to(DEVICE)
    w, b = torch.ones(20, device=DEVICE), torch.zeros(20, device=DEVICE)
    whole = module.groupnorm_silu(x, w, b, 2, EPS, True, add, launch=launch)
    for i in range(3):
        alone = module.groupnorm_silu(x[i : i + 1], w, b, 2, EPS, True, add[i : i + 1], launch=launch)
        assert torch.equal(whole[i : i + 1], alone)


def test_groupnorm_silu_keeps_a_nan_in_its_group():
    x = rand(1, 4, 4, 12, dtype=torch.float32).to(DEVICE)
    x[0, 1, 2, 5] = float("nan")
    for launch in (GroupNormLaunch(3, 16, 4), replace(SPLIT, groups=3), replace(MERGE, groups=3)):
        y = module.groupnorm_silu(
            x, torch.ones(12, device=DEVICE), torch.zeros(12, device=DEVICE), 3, EPS, launch=launch
        )
        assert bool(y[..., 4:8].isnan().all()) and bool(y[..., :4].isfinite().all() and y[..., 8:].isfinite().all())


# fmt: off
MUTATIONS: dict[str, tuple[Any, str, str]] = {
    "reads past the pixels": (tiles, "offset + row < n\n", "offset + row < n + 1\n"),
    "writes past the pixels": (tiles, "live = pixel < end", "live = pixel <= end"),
    "writes past the channels": (tiles, "live[:, None] & within[None, :]\n", "live[:, None]\n"),
    "omits what is ahead": (tiles, "(total + ahead[None, :])", "total"),
    "returns the normalised map as the sum": (tiles, "(total + ahead[None, :])", "(y + ahead[None, :])"),
    "first image's sum for all": (module, "sum_ptr += b * HW", "sum_ptr += 0 * HW"),
    "first image's sum for all, split": (split, "sum_ptr += b * HW", "sum_ptr += 0 * HW"),
    "omits the size of a group": (tiles, "group_m2 / HW / CPG", "group_m2 / HW"),
    "omits eps": (tiles, "/ CPG + eps", "/ CPG"),
    "omits the mean": (tiles, "((total - pivot) - mean[None, :]) * scale", "(total - pivot) * scale"),
    "adds no shift": (tiles, "* scale[None, :] + shift[None, :]", "* scale[None, :]"),
    "weights all tiles equally": (tiles, "delta * (1.0 / count)", "delta * 0.5"),
    "weights all lanes equally": (tiles, "(n - tl.arange(0, BLOCK_P) + ", "(n + 0 * tl.arange(0, BLOCK_P) + "),
    "omits the spread between channels": (tiles, "n * centred * centred, 1)", "0 * centred, 1)"),
    "one pivot for each channel": (tiles, "channel // CPG * CPG", "channel"),
    "no pivot": (tiles, "zero == 0, first", "zero != 0, first"),
    "wrong stride of pixels in x": (tiles, "p * stride_xp", "p * (stride_xp + 1)"),
    "stride of the first part for the second": (tiles, "left, stride_xp, stride_x2p", "left, stride_xp, stride_xp"),
    "seam one channel late": (tiles, "left = c < C1", "left = c <= C1"),
    "second part from its end": (tiles, "(c - C1)", "c"),
    "wrong stride of the output": (tiles, "[:, None] * C + channel", "[:, None] * C1 + channel"),
    "inverts the choice of SiLU": (tiles, "if SILU:", "if not SILU:"),
    "takes the next group's channels": (module, "lane < G * CPG", "lane < G * CPG + 1"),
    "first image's skip for all": (module, "x2_ptr += b * stride_x2b", "x2_ptr += 0 * stride_x2b"),
    "first image's addition for all": (module, "add_ptr += b * stride_ab", "add_ptr += 0 * stride_ab"),
    "takes the next group's channels, split": (split, "lane < G * CPG", "lane < G * CPG + 1"),
    "weights all splits equally": (split, "tl.minimum(split_pixels, HW - s * split_pixels)", "split_pixels + 0 * s"),
    "omits the spread between splits": (split, "m2 + n * CPG * centred * centred", "m2"),
    "takes means for those less the first": (split, "- first[None, :]  #", "- 0 * first[None, :]  #"),
    "returns the mean less the first": (split, "return first + mean", "return mean"),
    "counts splits by pixels": (split, "n * CPG * centred", "n * centred"),
    "first image's skip for all, split": (split, "x2_ptr += b * stride_x2b", "x2_ptr += 0 * stride_x2b"),
    "first image's addition for all, split": (split, "add_ptr += b * stride_ab", "add_ptr += 0 * stride_ab"),
    "first image's moments for all": (split, "moments_ptr += b * 2", "moments_ptr += 0 * b * 2"),
}
# fmt: on


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_checks_notice_when_groupnorm_silu(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    where, old, new = MUTATIONS[fault]
    order = [tiles, split, module]
    copy = broken_with_importers(where, old, new, order[order.index(where) + 1 :], tmp_path, monkeypatch)
    with must_fail():
        run(CASES["the same, split"], torch.float32, True, 0, kernels=copy)
        run(CASES["several groups per program"], torch.float32, True, 2, ahead=True, kernels=copy)
        run(CASES["a group with channels of both parts"], torch.float32, True, 2, kernels=copy)
        run(CASES["split, of two parts"], torch.float32, True, 2, ahead=True, kernels=copy)
        run(CASES["split and merged"], torch.float32, True, 0, kernels=copy)
        run(CASES["eps decides"], torch.float32, True, 0, kernels=copy)
        run(CASES["the same, where rounding the mean matters"], torch.float32, True, 0, kernels=copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(1, 2, 2, 8, dtype=torch.float64)}, "float64"),
        ({"groups": 3}, "3 groups do not divide 8"),
        ({"weight": torch.ones(4)}, r"shape \[8\]"),
        ({"add": torch.ones(2, 8)}, r"\[1 or 1, 8\]"),
        ({"skip": torch.ones(1, 2, 3, 8)}, "skip needs shape"),
        ({"ahead": torch.ones(4)}, r"ahead needs shape \[8\]"),
        ({"x": torch.ones(1, 8, 2, 2).permute(0, 2, 3, 1)}, "channels next to each other"),
        ({"x": torch.ones(1, 2, 3, 8)[:, :, :2]}, "rows of pixels without gaps"),
        ({"weight": torch.ones(8, requires_grad=True)}, "no gradients"),
    ],
)
def test_groupnorm_silu_refuses(changes: dict[str, Any], message: str):
    good = {"x": torch.ones(1, 2, 2, 8), "weight": torch.ones(8), "bias": torch.ones(8), "groups": 2, "eps": EPS}
    with pytest.raises(ValueError, match=message):
        module.groupnorm_silu(**(good | changes))


@pytest.mark.parametrize("architecture", TABLE)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_launches_of_groupnorm_silu_fit(architecture: int, itemsize: int):
    """Every launch covers its channels with tiles of a sensible size, at the shapes of the models and odd ones."""
    sizes = [(p * p, c, 32) for p in (1, 8, 15, 16, 32, 64, 128) for c in (320, 640, 960, 1280, 1920, 2560)]
    sizes += [(p * p, c, 32) for p in (64, 512, 1024, 2048) for c in (128, 256, 512)]
    sizes += [(1, 1, 1), (1, 10007, 1), (7, 33, 3), (81, 10007, 1), (10**6, 3, 3)]
    for pixels, channels, groups in sizes:
        launch = choose(architecture, pixels, channels, groups, itemsize)
        class_settings = TABLE[architecture]
        columns = power_of_two(launch.groups * channels // groups)
        assert (
            groups % launch.groups == 0
            and launch.block_p == power_of_two(launch.block_p)
            and launch.warps in (1, 2, 4, 8, 16)
        )
        assert launch.block_p * columns <= max(class_settings.whole_tile, class_settings.tile, columns)
        assert launch.split_pixels % launch.block_p == 0 and launch.apply_pixels % launch.block_p == 0
        if launch.split_pixels:
            assert -(-pixels // launch.split_pixels) <= (1024 if launch.merge else class_settings.merge)
