"""The gradients of attention by the kernels, against float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from fastsd.errors import FastsdError
from fastsd.kernels import candidates, dispatch
from fastsd.kernels import flash_attn as op
from fastsd.kernels.choice import decide
from fastsd.kernels.choice.decide import ChoiceMode, choosing
from fastsd.kernels.choice.op import Way
from fastsd.kernels.launch.flash_attn import Tile, in_parts
from fastsd.kernels.launch.flash_attn_gradients import TABLE, AttentionGradients, choose
from fastsd.kernels.triton import flash_attn as forward_module
from fastsd.kernels.triton import flash_attn_gradients as module
from fastsd.kernels.triton import flash_attn_tiles as tiles
from tests.support.played_gpu import PlayedGpu, played
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

HALF = torch.float16


class Case(NamedTuple):
    batch: int
    queries: int
    keys: int
    heads: int
    size: int
    causal: bool = False
    scale: float = 1.0
    launch: AttentionGradients | None = None
    low: float = 0.0  # about which all logits are below 0


def small(size: int, run: int = 2**20, rows: int = 16, keys: int = 32, padded: bool = False) -> AttentionGradients:
    """Small tiles, so that few queries and keys are several blocks of both kernels, and `run` queries a part."""
    tile = in_parts(Tile(rows, keys, 4, 2, padded), size)
    return AttentionGradients(tile, replace(tile, rows=keys, keys=rows), run)


CASES = {
    "SD1's head size, two parts": Case(2, 50, 75, 2, 40, launch=small(40)),
    "the same in one part, beyond the head": Case(1, 50, 75, 2, 40, launch=small(40, padded=True)),
    "the committed launch": Case(1, 70, 70, 2, 40),
    "SDXL's head size, whole blocks only": Case(1, 64, 64, 1, 64, launch=small(64)),
    "64 + 16": Case(1, 40, 70, 1, 80, launch=small(80)),
    "64 + 32": Case(1, 33, 40, 1, 96, launch=small(96)),
    "128": Case(1, 17, 40, 1, 128, launch=small(128)),
    "128 + 32": Case(1, 33, 40, 1, 160, launch=small(160)),
    "primes": Case(1, 37, 67, 3, 37, launch=small(37)),
    "a head narrower than any product": Case(2, 40, 35, 3, 8, launch=small(8)),
    "one query": Case(2, 1, 70, 2, 32, launch=small(32)),
    "a text": Case(1, 70, 77, 2, 40, launch=small(40, run=32)),
    "a text, one part of queries is short": Case(1, 65, 77, 1, 64, launch=small(64, run=32)),
    "CLIP": Case(1, 77, 77, 2, 64, causal=True, launch=small(64)),
    "causal, in parts of the queries": Case(1, 77, 77, 1, 16, causal=True, launch=small(16, run=32)),
    "causal, more keys than queries": Case(1, 30, 70, 1, 40, causal=True, launch=small(40)),
    "causal, more queries than keys": Case(1, 70, 33, 1, 16, causal=True, launch=small(16, rows=32, keys=16)),
    "logits near 0: nearly equal weights": Case(1, 40, 70, 1, 40, scale=1e-3, launch=small(40)),
    "logits of 30: few large weights": Case(1, 40, 70, 1, 40, scale=5.0, launch=small(40)),
    "logits about -150: the weight of a key that is not there would be infinite": Case(
        1, 20, 40, 1, 16, launch=small(16), low=150.0
    ),
    "logits of 500, beyond fp16's exponentials": Case(1, 40, 70, 1, 40, scale=20.0, launch=small(40)),
}


def inputs(case: Case, dtype: torch.dtype = HALF) -> tuple[torch.Tensor, ...]:
    """q, k, v and the gradient of the result."""
    q = rand(case.batch, case.queries, case.heads, case.size, dtype=dtype, scale=case.scale)
    k = rand(case.batch, case.keys, case.heads, case.size, dtype=dtype, scale=case.scale, seed=1)
    v = rand(case.batch, case.keys, case.heads, case.size, dtype=dtype, seed=2)
    if case.low:
        q[..., 0] = (case.low * case.size**0.5) ** 0.5
        k[..., 0] = -q[0, 0, 0, 0]
    return q, k, v, rand(case.batch, case.queries, case.heads * case.size, dtype=dtype, seed=3)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gradient: torch.Tensor, causal: bool) -> Any:
    """The result and the gradients by autograd."""
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in given), is_causal=causal)
    out = out.transpose(1, 2).flatten(2)
    return out.detach(), *torch.autograd.grad(out, given, gradient)


def run(case: Case, dtype: torch.dtype = HALF, layout: str = "contiguous", kernels: Any = module) -> None:
    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gradient: torch.Tensor) -> Any:
        out, lse = kernels.forward(q, k, v, case.causal)
        return out, *kernels.backward(gradient, q, k, v, out, lse, case.causal, case.launch)

    check(ours, lambda *given: plain(*given, case.causal), *inputs(case, dtype), layout=layout)


@pytest.mark.parametrize("reason", CASES)
def test_gradients(reason: str) -> None:
    run(CASES[reason])


@pytest.mark.parametrize("reason", ["64 + 16", "a text", "CLIP"])
def test_gradients_in_bf16(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted_bf16_products(monkeypatch, module, forward_module)
    run(CASES[reason], torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("reason", ["SD1's head size, two parts", "a text", "primes"])
def test_gradients_of_unaligned_tensors(reason: str, layout: str) -> None:
    run(CASES[reason], layout=layout)


def test_gradients_of_a_fused_projection() -> None:
    """Views of one tensor, through autograd: their gradients meet in its gradient."""
    qkv = rand(2, 40, 3, 2, 40, dtype=HALF)

    def gradient(qkv: torch.Tensor, attend: Any) -> torch.Tensor:
        qkv = qkv.detach().requires_grad_()
        out = attend(*qkv.unbind(2))
        return torch.autograd.grad(out, qkv, torch.linspace(-1, 1, out.numel()).to(out).view(out.shape))[0]

    def pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)

    with dispatch.forced("triton"):
        check(lambda x: gradient(x, op.flash_attn), lambda x: gradient(x, pytorch), qkv)


def test_gradients_do_not_depend_on_the_batch() -> None:
    case = Case(3, 37, 35, 2, 24, launch=small(24, run=32))
    q, k, v, gradient = (x.to(DEVICE) for x in inputs(case))
    out, lse = module.forward(q, k, v)
    whole = module.backward(gradient, q, k, v, out, lse, False, case.launch)
    for i in range(3):
        one = (x[i : i + 1] for x in (gradient, q, k, v, out, lse))
        for all_of, alone in zip(whole, module.backward(*one, False, case.launch)):
            assert torch.equal(all_of[i : i + 1], alone)


def test_neither_one_key_nor_its_queries_have_gradients() -> None:
    """Its weight is 1, so ds is the difference of g v and u, which are the same sum of D products in two orders."""
    q, k, v, gradient = (x.to(DEVICE) for x in inputs(Case(1, 20, 1, 1, 32)))
    out, lse = module.forward(q, k, v)
    dq, dk, dv = module.backward(gradient, q, k, v, out, lse, False, small(32))
    assert torch.equal(out, v.flatten(2).expand_as(out))
    terms = (gradient.view(q.shape) * v).float().abs().sum(-1, keepdim=True)
    ds = 2 * 32 * 2.0**-24 * terms * 32**-0.5
    assert (dq.float().abs() <= ds * k.float().abs() * (1 + 2**-10)).all()
    assert (dk.float().abs() <= (ds * q.float().abs()).sum(1) * (1 + 2**-10)).all()
    check(lambda g: dv, lambda g: g.sum(1, keepdim=True), gradient.view(q.shape))


def test_a_nan_reaches_every_gradient_that_it_moves_and_no_other() -> None:
    """NaN in the gradient of query 3: its own gradient, and all of keys and values of that head."""
    q, k, v, gradient = (x.to(DEVICE) for x in inputs(Case(1, 20, 40, 2, 16)))
    gradient[0, 3, 5] = float("nan")  # of the first head
    out, lse = module.forward(q, k, v)
    dq, dk, dv = module.backward(gradient, q, k, v, out, lse, False, small(16))
    bad = torch.zeros_like(dq, dtype=torch.bool)
    bad[0, 3, 0] = True
    assert torch.equal(dq.isnan(), bad)
    assert dk[:, :, 0].isnan().all() and dv[:, :, 0, 5].isnan().all()
    assert not dk[:, :, 1].isnan().any() and dv.isnan().sum() == 40


# fmt: off
LAST = "k1 = load_tile(k_ptr, key, live, stride_kt, D, 0, D1, "
MUTATIONS: dict[str, tuple[Any, str, str]] = {
    "leaves out the last keys": (module, "if CAUSAL or not EVEN:", "if CAUSAL:"),
    "forgets the key mask": (module, "keep = live[None, :]\n", "keep = live[None, :] | True\n"),
    "reads keys beyond the last": (module, LAST + "MASKED)", LAST + "False)"),
    "queries see one key into the future": (module, "<= row[:, None])", "<= row[:, None] + 1)"),
    "keys see one query of the past": (module, "key[:, None] <= row[None, :]", "key[:, None] <= row[None, :] + 1"),
    "keys begin a block too late": (module, "// BLOCK_M * BLOCK_M)", "// BLOCK_M * BLOCK_M + BLOCK_M)"),
    "takes a block on the diagonal for whole": (module, "tl.minimum(start, T)", "tl.minimum(start + BLOCK_N, T)"),
    "forgets u for queries": (module, '"ieee") - u[:, None]', '"ieee") - 0.0 * u[:, None]'),
    "forgets u for keys": (module, '"ieee") - u[None, :]', '"ieee") - 0.0 * u[None, :]'),
    "u of the first part of the head": (module, "u += tl.sum(", "u += 0 * tl.sum("),
    "forgets the factor of the queries": (module, "dq1 * factor", "dq1"),
    "forgets the factor of the second part": (module, "dq2 * factor", "dq2"),
    "forgets the factor of the keys": (module, "dk1 * factor", "dk1"),
    "scales the values": (module, "head, dv1, key", "head, dv1 * factor, key"),
    "values by ds": (module, "dv1 = tl.dot(rounded,", "dv1 = tl.dot((weights * 2).to(g1.dtype),"),
    "keys by the gradient": (module, "tl.dot(ds, q1, dk1)", "tl.dot(ds, g1, dk1)"),
    "forgets the second part of the keys": (module, "dk2 = tl.dot(ds, q2, dk2)", "dk2 = dk2 * 1.0"),
    "forgets the second part of the values": (module, "dv2 = tl.dot(rounded, g2, dv2)", "dv2 = dv2 * 1.0"),
    "forgets the second part of the queries": (module, "dq2 = tl.dot(ds, k2, dq2)", "dq2 = dq2 * 1.0"),
    "natural logarithm": (forward_module, "top + tl.log2(total)", "top + tl.log(total)"),
    "sums of the first head": (forward_module, "(b * heads + h) * S + row, top", "b * heads * S + row, top"),
    "writes sums beyond the queries": (forward_module, "tl.log2(total), mask=row < S", "tl.log2(total), mask=row >= 0"),
    "writes u beyond the queries": (module, "u, mask=live)", "u, mask=row >= 0)"),
    "statistics of the first image": (module, "statistics = (b * heads + h)", "statistics = h"),
    "keys read those of the first head": (module, "u_ptr += (b * heads + h) * S", "u_ptr += b * heads * S"),
    "all parts write the first one's place": (module, "head = (part * batch + b)", "head = b"),
    "parts overlap": (module, "first = part * run", "first = part * (run - BLOCK_M)"),
    "the first part only": (module, "dk.sum(0)", "dk[0]"),
    "parts of values in their dtype": (module, "dv.sum(0)", "dv[-1]"),
    "first image's keys": (module, "k_ptr += b * times", "k_ptr += 0 * b * times"),
    "stride of keys for values": (module, "live, stride_vt, D, 0", "live, stride_kt + 1, D, 0"),
    "writes keys beyond the last": (module, "dk1 * factor, key, live", "dk1 * factor, key, live | True"),
    "writes past the head": (tiles, "mask=live[:, None] & (column < D)[None, :])\n", "mask=live[:, None])\n"),
    "blocks of keys of another size": (module, "tl.cdiv(T, BLOCK_N), tl.num", "tl.cdiv(T, BLOCK_N) + 1, tl.num"),
}
# fmt: on
PARTS = Case(1, 37, 35, 1, 40, launch=small(40, run=32))
NOTICING = [
    PARTS,
    PARTS._replace(causal=True),
    Case(1, 17, 40, 1, 16, launch=small(16)),  # an extra row would end in the guard zone
    Case(1, 20, 40, 1, 16, launch=small(16), low=150.0),  # an extra key would be infinite
    PARTS._replace(batch=2, heads=2),
]


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_checks_notice_when_the_backward_pass(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, old, new = MUTATIONS[fault]
    order = [tiles, forward_module, module]
    copy = broken_with_importers(where, old, new, order[order.index(where) + 1 :], tmp_path, monkeypatch)
    with must_fail():
        for case in NOTICING:
            run(case, layout="gaps", kernels=copy)


def inputs_of(size: int = 16, dtype: torch.dtype = HALF) -> list[torch.Tensor]:
    return [rand(1, 20, 2, size, dtype=dtype, seed=i).to(DEVICE).requires_grad_() for i in range(3)]


def test_training_takes_the_kernels_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And PyTorch's op where that candidate is chosen, in fp32, and where nothing is recorded."""
    ran = []
    backward = module.backward
    monkeypatch.setattr(module, "backward", lambda *args: ran.append(args[1].dtype) or backward(*args))

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        given = inputs_of(dtype=dtype)
        return torch.autograd.grad(op.flash_attn(*given).square().sum(), given)

    if dispatch.interpreted():  # on a GPU it is measured
        ours = gradients(HALF)
        assert ran == [HALF]
        with candidates.only("flash_attn_gradients", Way(op.GRADIENTS.candidates[-1])):
            theirs = gradients(HALF)
        # Each is within two roundings to fp16 (p or ds, and the result) of the sums of 20 terms.
        for one, other in zip(ours, theirs):
            assert (one - other).abs().max() <= 4 * 2**-11 * 20**0.5 * other.abs().max()
    ran.clear()
    gradients(torch.float32)
    with torch.no_grad():
        op.flash_attn(*inputs_of())
    assert ran == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is played")
@pytest.mark.parametrize("error", [0.0, 0.05])
def test_the_way_of_both_passes_is_compared_and_timed(
    error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels whose gradients are wrong on this GPU are excluded and named, and PyTorch trains instead."""
    gpu, backward, ran = PlayedGpu(), module.backward, []
    gpu.takes = 1e-5

    def played_backward(*args: Any) -> Any:
        ran.append(args)
        dq, dk, dv = backward(*args)
        return dq, dk * (1 + error), dv

    monkeypatch.setattr(module, "backward", played_backward)
    with played(tmp_path, gpu, monkeypatch), choosing(ChoiceMode(probe=False)):
        given = inputs_of()
        with told(match="'triton .*' is excluded: it is wrong") if error else nullcontext():
            out = op.flash_attn(*given)
        ((place, entry),) = decide.gpu_of(torch.device("cpu")).table.entries.items()
        compared = len(ran)
        torch.autograd.grad(out.sum(), given)
    committed = op.GRADIENTS.candidates[0].launches(False, *given, False)[0]
    ours = Way(op.GRADIENTS.candidates[0], committed)
    assert place[0] == "flash_attn_gradients" and (ours.label in entry.excluded) == bool(error)
    assert len(ran) - compared == (0 if error else 1)
    assert error or (set(entry.microseconds) == {ours.label, "torch"} and entry.way(op.GRADIENTS) == ours)


def test_a_second_derivative_is_refused() -> None:
    given = inputs_of()
    out = op.AttentionByTriton.apply(*given, False, None)
    (dq,) = torch.autograd.grad(out.square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("size", "dtype", "reason"),
    [(16, torch.float32, "q is float32; .* take float16"), (200, HALF, "heads of 200; .* up to 160")],
)
def test_what_the_kernels_do_not_take(size: int, dtype: torch.dtype, reason: str) -> None:
    given = inputs_of(size, dtype)
    with pytest.raises(ValueError, match=reason):
        module.forward(*given)
    with dispatch.forced("triton"), pytest.raises(FastsdError, match=reason):
        op.flash_attn(*given)


def test_gradients_of_no_queries_and_of_no_images() -> None:
    for shape in ((2, 0, 3, 8), (0, 4, 3, 8)):
        q = torch.ones(*shape, dtype=HALF, device=DEVICE)
        k = torch.ones(shape[0], 5, 3, 8, dtype=HALF, device=DEVICE)
        out, lse = module.forward(q, k, k)
        dq, dk, dv = module.backward(out, q, k, k, out, lse)
        assert out.shape == (*shape[:2], 24) and dq.shape == q.shape
        assert dk.shape == dv.shape == k.shape and not dk.any() and not dv.any()


@pytest.mark.parametrize("architecture", TABLE)
def test_launches_cover_every_query_once(architecture: int) -> None:
    for size in (*range(1, 161, 7), 160):
        for queries, keys, heads in ((1, 1, 1), (64, 77, 8), (1024, 1024, 8), (4096, 77, 8), (4096, 4096, 8)):
            launch = choose(architecture, queries, keys, heads, size)
            for tile in (launch.of_queries, launch.of_keys):
                assert sum(tile.parts) >= size
            assert launch.run % launch.of_keys.rows == 0
            parts = -(-queries // launch.run)
            assert parts == 1 or launch.run >= 4 * launch.of_keys.rows
            assert (parts - 1) * launch.run < queries


def test_a_text_is_in_parts_of_the_queries_and_an_image_is_not() -> None:
    """With 77 keys and 8 heads, 16 programs would leave most of a GPU's multiprocessors idle."""
    assert -(-4096 // choose(90, 4096, 77, 8, 40).run) == 8
    assert choose(90, 4096, 4096, 8, 40).run >= 4096
