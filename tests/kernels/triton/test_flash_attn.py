"""The attention kernels against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.errors import FastsdError
from fastsd.kernels import dispatch
from fastsd.kernels import flash_attn as op
from fastsd.kernels.launch.flash_attn import TABLE, FewKeys, Tile, Wide, choose, split
from fastsd.kernels.triton import flash_attn as module
from fastsd.kernels.triton import flash_attn_few_keys as few
from fastsd.kernels.triton import flash_attn_tiles as tiles
from fastsd.kernels.triton import flash_attn_wide as wide
from tests.support.told import told
from tests.support.triton_checks import (
    DEVICE,
    LAYOUTS,
    broken_with_importers,
    check,
    interpreted_bf16_products,
    must_fail,
    rand,
)

DTYPES = (torch.float16, torch.float32)  # the interpreter has no bf16 products, see `interpreted_bf16_products`


class Case(NamedTuple):
    batch: int
    queries: int
    keys: int
    heads: int
    size: int
    causal: bool = False
    scale: float = 1.0
    launch: Tile | FewKeys | Wide | None = None


CASES = {
    "SD1's head size: a part beyond the head": Case(2, 130, 192, 2, 40),
    "the same in two parts, as on sm_80": Case(1, 70, 70, 2, 40, launch=Tile(32, 32, 4, 2, parts=(32, 16))),
    "SDXL's head size, whole blocks only": Case(1, 128, 256, 1, 64),
    "SD1's second level: 64 + 16": Case(1, 70, 150, 2, 80),
    "64 + 32": Case(1, 65, 129, 1, 96),
    "SD1's third level: 128 + 32": Case(1, 64, 144, 1, 160),
    "a head of a power of two": Case(1, 17, 131, 1, 128),
    "a narrow head": Case(1, 65, 140, 2, 32),
    "primes": Case(1, 67, 131, 3, 37),
    "a head narrower than any product": Case(2, 70, 140, 3, 8),
    "one query": Case(2, 1, 200, 2, 40),
    "one key more than whole blocks": Case(1, 33, 129, 1, 40, launch=Tile(32, 32, 4, 2, parts=(64, 0))),
    "one key less than whole blocks": Case(1, 31, 127, 1, 40, launch=Tile(32, 32, 4, 2, parts=(64, 0))),
    "causal, long": Case(1, 140, 140, 1, 64, causal=True),
    "causal, more keys than queries": Case(1, 40, 140, 2, 40, causal=True),
    "causal, more queries than keys": Case(1, 70, 33, 1, 16, causal=True, launch=Tile(32, 16, 4, 2, parts=(16, 0))),
    "a text": Case(2, 70, 77, 2, 40),
    "a text, SDXL": Case(1, 130, 77, 2, 64),
    "a text, heads in two parts": Case(1, 33, 77, 1, 160),
    "CLIP": Case(2, 77, 77, 2, 64, causal=True),
    "several blocks per program, the last one short": Case(
        1, 75, 77, 2, 40, launch=FewKeys(16, 3, 4, 2, (32, 16), (64, 16))
    ),
    "one key": Case(2, 5, 1, 2, 40),
    "as many keys as stay on chip": Case(1, 20, 128, 1, 64),
    "the autoencoder": Case(2, 60, 60, 1, 512),
    "the autoencoder, several chunks of rows, the last one short": Case(1, 50, 50, 1, 512, launch=Wide(50 * 16, 32)),
    "wide, two heads, causal, in chunks": Case(1, 50, 45, 2, 192, causal=True, launch=Wide(45 * 32, 16)),
    "wide, a row at a time": Case(1, 5, 40, 2, 192, launch=Wide(1, 16)),
    "logits near 0: nearly equal weights": Case(1, 65, 150, 1, 40, scale=1e-4),
    "logits of 30: few large weights": Case(1, 65, 150, 1, 40, scale=5.0),
    "logits of 500, beyond fp16's exponentials": Case(1, 65, 150, 1, 40, scale=20.0),
    "logits of 500, few keys": Case(1, 65, 77, 1, 40, scale=20.0),
    "logits of 500, wide": Case(1, 40, 50, 1, 192, scale=20.0),
}


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    like = {"dtype": dtype, "scale": case.scale}
    q = rand(case.batch, case.queries, case.heads, case.size, **like)
    k = rand(case.batch, case.keys, case.heads, case.size, **like, seed=1)
    return q, k, rand(case.batch, case.keys, case.heads, case.size, dtype=dtype, seed=2)


def run(case: Case, dtype: torch.dtype, layout: str = "contiguous", kernels: Any = module) -> None:
    check(
        lambda q, k, v: kernels.flash_attn(q, k, v, case.causal, case.launch),
        lambda q, k, v: plain(q, k, v, case.causal),
        *inputs(case, dtype),
        layout=layout,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reason", CASES)
def test_flash_attn(reason, dtype):
    run(CASES[reason], dtype)


@pytest.mark.parametrize(
    "reason", ["SD1's second level: 64 + 16", "causal, long", "a text", "the autoencoder", "logits of 500, few keys"]
)
def test_flash_attn_in_bf16(reason, monkeypatch):
    interpreted_bf16_products(monkeypatch, module)
    run(CASES[reason], torch.bfloat16)


@pytest.mark.parametrize("layout", ["offset", "gaps"])
@pytest.mark.parametrize("reason", ["SD1's head size: a part beyond the head", "a text", "the autoencoder", "primes"])
def test_flash_attn_of_unaligned_tensors(reason, layout):
    run(CASES[reason], torch.float16, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "size"), [(140, 40), (77, 40), (140, 64), (40, 512)])
def test_flash_attn_of_a_fused_projection(length, size, dtype):
    """Views of one tensor with queries, keys and values, and of one with a text's keys and values."""
    check(
        lambda qkv: module.flash_attn(*qkv.unbind(2)),
        lambda qkv: plain(*qkv.unbind(2)),
        rand(2, length, 3, 2, size, dtype=dtype),
    )
    check(
        lambda q, kv: module.flash_attn(q, *kv.unbind(2)),
        lambda q, kv: plain(q, *kv.unbind(2)),
        rand(2, 30, 2, size, dtype=dtype),
        rand(2, length, 2, 2, size, dtype=dtype),
    )


def test_flash_attn_of_heads_in_the_outer_dimension():
    """`[B, heads, S, D]` in memory."""
    case = Case(2, 40, 140, 3, 40)
    q, k, v = (x.transpose(1, 2).contiguous() for x in inputs(case, torch.float16))
    check(
        lambda q, k, v: module.flash_attn(*(x.transpose(1, 2) for x in (q, k, v))),
        lambda q, k, v: plain(*(x.transpose(1, 2) for x in (q, k, v))),
        *(q, k, v),
    )


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_flash_attn_at_any_shape(data):
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    queries, keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 50))
    size = data.draw(st.one_of(st.integers(1, 48), st.integers(1, 20).map(lambda n: 8 * n)))
    rows, columns = data.draw(st.sampled_from([16, 32])), data.draw(st.sampled_from([16, 32]))
    launches = [
        None,
        Tile(rows, columns, 4, 2, parts=split(size)),
        FewKeys(rows, data.draw(st.integers(1, 3)), 4, 2, split(size), split(keys)),
        Wide(data.draw(st.integers(1, 4000)), columns),
    ]
    launch = data.draw(st.sampled_from(launches))
    dtype = data.draw(st.sampled_from(DTYPES))
    # With large logits and few fp32 results, it would be chance whose largest error is smaller.
    scale = 1.0 if dtype == torch.float16 else 0.3
    case = Case(batch, queries, keys, heads, size, data.draw(st.booleans()), scale, launch)
    run(case, dtype, data.draw(st.sampled_from(LAYOUTS)))


@pytest.mark.parametrize(("keys", "size"), [(140, 40), (77, 80), (50, 192)])
def test_flash_attn_does_not_depend_on_the_batch(keys, size):
    q, k, v = (x.to(DEVICE) for x in inputs(Case(3, 40, keys, 2, size), torch.float16))
    whole = module.flash_attn(q, k, v)
    for i in range(3):
        assert torch.equal(whole[i : i + 1], module.flash_attn(q[i : i + 1], k[i : i + 1], v[i : i + 1]))


@pytest.mark.parametrize(("keys", "size"), [(140, 40), (77, 40), (50, 192)])
def test_flash_attn_keeps_a_nan_in_its_row_or_column(keys, size):
    """NaN in a query stays in its row, NaN in a value in its column."""
    case = Case(1, 20, keys, 2, size)
    q, k, v = (x.to(DEVICE) for x in inputs(case, torch.float32))
    q[0, 3, 0, 1] = v[0, 5, 1, 2] = float("nan")
    y = module.flash_attn(q, k, v).unflatten(-1, (2, size))
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[0, 3, 0], bad[0, :, 1, 2] = True, True
    assert torch.equal(y.isnan(), bad)


@pytest.mark.parametrize(("keys", "length", "size"), [(140, 135, 40), (140, 70, 40), (77, 9, 64), (60, 33, 192)])
def test_flash_attn_reads_no_keys_beyond_key_length(keys, length, size):
    q, k, v = inputs(Case(2, 40, keys, 2, size), torch.float16)
    k[:, length:], v[:, length:] = float("nan"), float("nan")
    with dispatch.forced("triton"):
        check(
            lambda q, k, v: op.flash_attn(q, k, v, key_length=length),
            lambda q, k, v: plain(q, k, v),
            *(q, k[:, :length], v[:, :length]),
        )
        y = op.flash_attn(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), key_length=length)
    assert torch.equal(y.isnan(), torch.zeros_like(y, dtype=torch.bool))


LONG = Case(2, 45, 75, 2, 40, launch=Tile(32, 32, 4, 2, parts=(32, 16)))
LONG_CAUSAL = LONG._replace(queries=75, causal=True)
FEW = Case(2, 45, 77, 2, 40, launch=FewKeys(16, 2, 4, 2, (32, 16), (64, 16)))
FEW_CAUSAL = FEW._replace(causal=True)
NARROW = Case(1, 17, 40, 1, 16, launch=Tile(16, 16, 4, 2, parts=(16, 0)))  # an extra row would end in the guard zone
WIDE = Case(2, 20, 45, 2, 24, launch=Wide(45 * 2 * 8, 16))
WIDE_CAUSAL = WIDE._replace(causal=True)
# fmt: off
MUTATIONS: dict[str, tuple[Any, str, str]] = {
    "sees keys beyond the last": (module, "live = start + n < T", "live = start + n <= T"),
    "forgets the key mask": (module, "keep = live[None, :]\n", "keep = live[None, :] | True\n"),
    "leaves out the last keys": (module, "if CAUSAL or not EVEN:", "if CAUSAL:"),
    "sees one key into the future": (module, "<= row[:, None]", "<= row[:, None] + 1"),
    "takes a block on the diagonal for whole": (module, "tl.minimum(start, T)", "tl.minimum(start + BLOCK_N, T)"),
    "does not shrink the sums": (module, "acc1 * shrink[:, None]", "acc1"),
    "does not shrink the second part": (module, "acc2 * shrink[:, None]", "acc2"),
    "does not shrink the total": (module, "total * shrink +", "total +"),
    "other top than the weights": (module, "tl.max(scores, 1) * scale)", "tl.max(scores, 1))"),
    "forgets the scale": (module, "tl.exp2(scores * scale -", "tl.exp2(scores -"),
    "e in place of 2": (module, "tl.exp2(scores", "tl.exp(scores"),
    "scale of the natural exponential": (module, "size**-0.5 * math.log2(math.e)", "size**-0.5"),
    "stride of keys for values": (module, "v_ptr += BLOCK_N * stride_vt", "v_ptr += BLOCK_N * (stride_vt + 1)"),
    "first head's keys for all": (module, "+ h * times(stride_kh, UNIT)", "+ 0 * h * times(stride_kh, UNIT)"),
    "first image's values for all": (module, "v_ptr += b * times", "v_ptr += 0 * b * times"),
    "writes past the queries": (module, "row < S, heads * D, D, 0", "row < S + 1, heads * D, D, 0"),
    "first image's output for all": (module, "out_ptr += b * S", "out_ptr += 0 * b * S"),
    "few: sees keys beyond the last": (few, "keep = (key < T)[None, :]", "keep = (key <= T)[None, :]"),
    "few: sees one key into the future": (few, "<= row[:, None]", "<= row[:, None] + 1"),
    "few: forgets the scale": (few, "scores * scale", "scores"),
    "few: top of the first part only": (few, "tl.maximum(top, tl.max(scores2, 1))", "top"),
    "few: sums the first part only": (few, "total += tl.sum(weights2, 1)", "total += 0"),
    "few: values of the first part only": (few, "if v2 is not None:", "if False:"),
    "few: skips blocks": (few, "tl.minimum(first + blocks * BLOCK_M, S)", "tl.minimum(first + BLOCK_M, S)"),
    "few: stride of queries": (few, "row < S, stride_qs, D, 0, D1", "row < S, stride_qs + 1, D, 0, D1"),
    "few: first head's values for all": (few, "+ h * times(stride_vh, UNIT)", "+ 0 * h"),
    "few: first image's queries for all": (few, "q_ptr += b * times", "q_ptr += 0 * b * times"),
    "wide: sees one key into the future": (wide, "first + row + 1", "first + row + 2"),
    "wide: counts rows from the chunk": (wide, "first + row + 1", "row + 1"),
    "wide: forgets the scale": (wide, "(score - top) * scale", "(score - top)"),
    "wide: forgets keys that are masked": (wide, "mask=key < T)", "mask=key < end)"),
    "wide: total of the next row": (wide, "total_ptr + head_row", "total_ptr + head_row + 1"),
    "wide: rows of the first head": (wide, "head.to(tl.int64) * rows + row", "row.to(tl.int64)"),
    "wide: first image's keys for all": (wide, "k[b].transpose", "k[0].transpose"),
    "reads past the head": (tiles, "live[:, None] & (column < D)[None, :], other", "live[:, None], other"),
    "reads past the head in whole blocks": (tiles, "mask=(column < D)[None", "mask=(column <= D)[None"),
    "writes past the head": (tiles, "mask=live[:, None] & (column < D)[None, :])\n", "mask=live[:, None])\n"),
    "forgets the second part of the head": (tiles, "if k2 is not None:", "if False:"),
    "strides in other units": (tiles, "return stride.to(tl.int64) * UNIT", "return stride.to(tl.int64)"),
    "rounds strides down": (tiles, "stride % unit == 0 for", "stride > 0 for"),
}
# fmt: on


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_checks_notice_when_flash_attn(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    where, old, new = MUTATIONS[fault]
    order = [tiles, few, wide, module]
    copy = broken_with_importers(where, old, new, order[order.index(where) + 1 :], tmp_path, monkeypatch)
    dtype, gaps = torch.float32, "gaps"
    with must_fail():
        run(NARROW, dtype, kernels=copy)
        if where in (module, tiles):
            run(LONG, dtype, kernels=copy)
            run(LONG_CAUSAL, dtype, gaps, kernels=copy)
            run(LONG._replace(scale=8.0), dtype, kernels=copy)
        if where in (few, tiles):
            run(FEW, dtype, kernels=copy)
            run(FEW_CAUSAL, dtype, gaps, kernels=copy)
            run(FEW._replace(scale=20.0), dtype, kernels=copy)
        if where is wide:
            run(WIDE, dtype, kernels=copy)
            run(WIDE_CAUSAL, dtype, kernels=copy)


REFUSED = {
    "float64": (
        dict.fromkeys("qkv", torch.ones(1, 2, 1, 8, dtype=torch.float64)),
        r"q \[1, 2, 1, 8\] is float64.*one of float16",
    ),
    "two dtypes": ({"k": torch.ones(1, 3, 1, 8, dtype=torch.float16)}, r"k \[1, 3, 1, 8\] is float16"),
    "heads not contiguous": ({"q": torch.ones(1, 2, 1, 16)[..., ::2]}, r"q \[1, 2, 1, 8\] has strides .* needs 1"),
    "no keys": ({"k": torch.ones(1, 0, 1, 8), "v": torch.ones(1, 0, 1, 8)}, "at least one key"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_flash_attn_refuses(what: str, monkeypatch: pytest.MonkeyPatch):
    changes, message = REFUSED[what]
    good = {"q": torch.ones(1, 2, 1, 8), "k": torch.ones(1, 3, 1, 8), "v": torch.ones(1, 3, 1, 8)}
    arguments = {name: x.to(DEVICE) for name, x in (good | changes).items()}
    with pytest.raises(ValueError, match=message):
        module.flash_attn(**arguments)
    if what == "two dtypes":  # PyTorch refuses it too
        return
    with dispatch.forced("triton"), pytest.raises(FastsdError, match=message):
        op.flash_attn(**arguments)
    if what == "no keys":  # not given to the kernels unless they are forced
        return
    monkeypatch.setattr(dispatch, "backend", lambda *inputs, gradients: "triton")
    monkeypatch.setattr(dispatch, "_warned", set())
    with told(match=message) as warned:
        for _ in range(2):
            y = op.flash_attn(**arguments)
    assert len(warned) == 1 and torch.equal(y, torch.ones_like(y))


def test_the_launcher_refuses_gradients():
    x = torch.ones(1, 3, 1, 8, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients"):
        module.flash_attn(x, x, x)


def test_flash_attn_of_no_queries():
    q, k = torch.ones(2, 0, 3, 8, device=DEVICE), torch.ones(2, 5, 3, 8, device=DEVICE)
    assert module.flash_attn(q, k, k).shape == (2, 0, 24)


@pytest.mark.parametrize("length", [0, 4, -1])
def test_flash_attn_says_which_key_lengths_it_takes(length):
    x = torch.ones(1, 3, 1, 8)
    with pytest.raises(ValueError, match="1 to 3"):
        op.flash_attn(x, x, x, key_length=length)


def test_flash_attn_goes_to_pytorch_on_old_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.architecture, "class_of", lambda device: 75)
    x = torch.ones(1, 3, 1, 8)
    assert "sm_75" in str(module.refusal(x, x, x))


@pytest.mark.parametrize("n", range(1, 200))
def test_splits_cover_what_they_split(n):
    first, second = split(n)
    assert first + second >= n and first >= 16 and first & (first - 1) == 0 and second & (second - 1) == 0
    assert second == 0 or 16 <= second < first < n
    assert first + second < 2 * max(n, 16) and (second == 0 or first + second < 2 * first)


@pytest.mark.parametrize("architecture", TABLE)
def test_launches_of_flash_attn_cover_every_call(architecture):
    for size in (*range(1, 200), 512):
        for queries, keys in ((1, 1), (64, 77), (256, 256), (1024, 1024), (4096, 4096), (4096, 77), (77, 128)):
            for itemsize in (2, 4):
                launch = choose(architecture, queries, keys, 8, size, itemsize)
                if isinstance(launch, Wide):
                    assert size > 160
                    continue
                assert launch.parts[0] + launch.parts[1] >= size
                if isinstance(launch, FewKeys):
                    assert sum(launch.keys) >= keys
                else:
                    assert launch.rows % launch.keys == 0 or launch.keys % launch.rows == 0


def test_narrow_heads_need_no_power_of_two():
    """40, 80, 96 and 160 are split where products bound the kernel, and never padded to the next power of two."""
    parts = {size: choose(80, 4096, 4096, 8, size, 2).parts for size in (40, 80, 96, 160)}
    assert parts == {40: (32, 16), 80: (64, 16), 96: (64, 32), 160: (128, 32)}
    assert choose(90, 4096, 4096, 8, 40, 2).parts == (64, 0)
