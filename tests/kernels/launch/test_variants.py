"""The launches to choose from, for each kernel."""

from __future__ import annotations

from typing import Any

import pytest

from fastsd.kernels.launch import conv2d, flash_attn, flash_attn_gradients, groupnorm_silu, linear, rowwise, variants

SM = 90
CASES: list[tuple[str, Any, tuple[int, ...], Any]] = [
    ("groupnorm_silu", variants.groupnorm_silu, (4096, 320, 32, 2), groupnorm_silu.choose),
    ("groupnorm_silu", variants.groupnorm_silu, (64, 1280, 32, 2), groupnorm_silu.choose),
    ("groupnorm_silu", variants.groupnorm_silu, (1, 7, 7, 4), groupnorm_silu.choose),
    ("layernorm", variants.rows, (320,), rowwise.layernorm),
    ("geglu", variants.rows, (1280,), rowwise.geglu),
    ("advance", variants.rows, (), rowwise.advance),
    ("flash_attn", variants.attention, (4096, 4096, 8, 40, 2), flash_attn.choose),
    ("flash_attn", variants.attention, (4096, 77, 8, 40, 2), flash_attn.choose),
    ("flash_attn", variants.attention, (4096, 4096, 1, 512, 2), flash_attn.choose),
    *(
        ("flash_attn_gradients", variants.attention_gradients, sizes, flash_attn_gradients.choose)
        for sizes in ((4096, 4096, 8, 40), (4096, 77, 8, 40), (256, 256, 8, 160), (77, 77, 12, 64))
    ),
    ("linear", variants.products, (2048, 1280, 1280, 0, 2), linear.choose),
    ("linear", variants.products, (128, 1280, 5120, 0, 2), linear.choose),
    ("linear", variants.products, (8192, 1280, 320, 1, 2), linear.choose),
    ("conv2d", variants.convolutions, (64, 64, 320, 320, 9, 1, 1), conv2d.choose),
    ("conv2d", variants.convolutions, (8, 8, 1280, 1280, 9, 1, 1), conv2d.choose),
    ("conv2d", variants.convolutions, (32, 32, 320, 320, 9, 2, 1), conv2d.choose),
    ("conv2d", variants.convolutions, (512, 512, 128, 3, 9, 1, 1), conv2d.choose),
    ("conv2d_fp8", variants.convolutions, (64, 64, 320, 320, 9, 1, 1, 1), conv2d.choose),
    ("conv2d_fp8", variants.convolutions, (8, 8, 1280, 1280, 9, 1, 1, 1), conv2d.choose),
    ("conv2d_fp8", variants.convolutions, (32, 32, 320, 320, 9, 2, 1, 1), conv2d.choose),
    ("conv2d_fp8", variants.convolutions, (8, 8, 96, 96, 9, 1, 1, 1), conv2d.choose),
    ("upsample2x_conv", variants.convolutions, (32, 32, 640, 640, 4, 1, 4), conv2d.choose),
]


def launches_of(op: str, function: Any, sizes: tuple[int, ...], thorough: bool) -> list[Any]:
    return function(*([op] if function is variants.rows else []), thorough, SM, *sizes)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("op", "function", "sizes", "choose"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_all_are_valid_launches_of_one_kind_and_the_committed_one_is_first(
    op: str, function: Any, sizes: tuple[int, ...], choose: Any
) -> None:
    committed = choose(SM, *sizes)
    launches = launches_of(op, function, sizes, thorough=True)
    assert launches[0] == committed and len(set(launches)) == len(launches) <= 300
    assert {type(launch) for launch in launches} == {type(committed)}
    assert len(launches) > 3 or isinstance(committed, flash_attn.Wide)
    for launch in launches:
        if isinstance(launch, groupnorm_silu.GroupNormLaunch):
            pixels, _, groups, _ = sizes
            assert groups % launch.groups == 0 and launch.split_pixels < max(pixels, 2)
            assert launch.split_pixels % launch.block_p == 0
        if isinstance(launch, flash_attn.Tile):
            assert sum(launch.parts) >= sizes[3]
        if isinstance(launch, flash_attn_gradients.AttentionGradients):
            assert min(sum(launch.of_queries.parts), sum(launch.of_keys.parts)) >= sizes[3]
            assert launch.run % launch.of_keys.rows == 0
        if isinstance(launch, conv2d.ConvBoxes):
            assert launch.channels == committed.channels or not launch.swapped
        if isinstance(launch, linear.Gemm) and sizes[3]:
            assert launch.columns == launch.more and launch.splits == 1


@pytest.mark.parametrize(("op", "function", "sizes", "choose"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_the_first_use_compiles_two_at_most(op: str, function: Any, sizes: tuple[int, ...], choose: Any) -> None:
    short = launches_of(op, function, sizes, thorough=False)
    assert short[0] == choose(SM, *sizes) and len(short) <= 2
    assert set(short[1:]) <= set(launches_of(op, function, sizes, thorough=True))
