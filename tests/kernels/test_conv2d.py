"""Convolutions against float64, plain and packed."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastsd.kernels import conv2d as conv2d_module
from fastsd.kernels import dispatch
from fastsd.kernels.conv2d import Padding, conv2d
from fastsd.kernels.cpu import onednn
from fastsd.kernels.launch import architecture
from fastsd.model.conv2d import KNOWN_SHAPES, Conv2d
from tests.support.precision import DTYPES, check, check_batch, rand

SAME: Padding = (1, 1, 1, 1)
needs_onednn = pytest.mark.skipif(not dispatch.onednn_dtypes(), reason="PyTorch has no oneDNN for this processor")
SHAPES = [  # batch, height, width, in, out, kernel, stride, padding
    (2, 8, 8, 64, 96, 3, 1, SAME),  # whole blocks of oneDNN's layouts
    (1, 9, 7, 33, 17, 3, 1, SAME),  # sizes that are no multiples of a block
    (2, 16, 16, 4, 32, 3, 1, SAME),  # the UNet's first convolution
    (1, 16, 16, 32, 3, 3, 1, SAME),  # the VAE's last one
    (1, 8, 8, 32, 32, 3, 2, SAME),  # the UNet's downsampling
    (1, 9, 8, 32, 32, 3, 2, (0, 1, 0, 1)),  # the VAE's downsampling, of an odd height
    (1, 1, 1, 16, 16, 3, 1, SAME),  # one pixel, surrounded by padding
    (1, 4, 4, 8, 8, 1, 1, (0, 0, 0, 0)),  # a 1 x 1 kernel
    (1, 8, 8, 640, 320, 3, 1, SAME),  # long sums, as in the UNet's deep levels
]


def plain(
    stride: int, padding: Padding, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, r: torch.Tensor | None = None
) -> torch.Tensor:
    y = F.conv2d(F.pad(x.permute(0, 3, 1, 2), padding), w, b, stride).permute(0, 2, 3, 1)
    return y if r is None else y + r


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "height", "width", "cin", "cout", "kernel", "stride", "padding"), SHAPES)
@torch.no_grad()
def test_conv2d(batch, height, width, cin, cout, kernel, stride, padding, dtype):
    x = rand(batch, height, width, cin, dtype=dtype)
    w = rand(cout, cin, kernel, kernel, dtype=dtype, scale=(cin * kernel**2) ** -0.5)
    b = rand(cout, dtype=dtype)
    r = rand(*plain(stride, padding, x, w, b).shape, dtype=dtype, seed=1)
    packed, terms = onednn.pack(w, x.shape, stride, padding), cin * kernel**2 + 2  # and bias and residual
    for residual in (None, r):
        for weight in (w, packed):
            check(
                lambda x, w, b, r, weight=weight: conv2d(x, weight, b, stride, padding, r),
                lambda *t: plain(stride, padding, *t),
                *(x, w, b, residual),
                roundings=terms,
            )
    with dispatch.reference_only():
        check(
            lambda x, w, b: conv2d(x, packed, b, stride, padding),
            lambda *t: plain(stride, padding, *t),
            *(x, w, b),
            roundings=terms,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("with_bias", "with_residual"), [(False, False), (False, True), (True, False), (True, True)])
@torch.no_grad()
def test_conv2d_with_relu_and_without_bias(with_bias, with_residual, dtype):
    """ReLU comes last, after the residual; half of these sums are negative."""
    x, w = rand(2, 9, 7, 33, dtype=dtype), rand(17, 33, 3, 3, dtype=dtype, scale=(9 * 33) ** -0.5)
    b = rand(17, dtype=dtype) if with_bias else None
    r = rand(2, 9, 7, 17, dtype=dtype, seed=1) if with_residual else None
    packed, terms = onednn.pack(w, x.shape, 1, SAME), 9 * 33 + 2
    for weight in (w, packed):
        check(
            lambda x, w, b, r, weight=weight: conv2d(x, weight, b, 1, SAME, r, relu=True),
            lambda *t: plain(1, SAME, *t).relu(),
            *(x, w, b, r),
            roundings=terms,
        )
        check(
            lambda x, w, b, weight=weight: conv2d(x, weight, b, 1, SAME),
            lambda *t: plain(1, SAME, *t),
            *(x, w, b),
            roundings=terms,
        )
    with dispatch.reference_only():
        check(
            lambda x, w, b, r: conv2d(x, w, b, 1, SAME, r, relu=True),
            lambda *t: plain(1, SAME, *t).relu(),
            *(x, w, b, r),
            roundings=terms,
        )


@torch.no_grad()
def test_conv2d_of_strided_views():
    x, w, b = rand(1, 9, 20, 40, dtype=torch.float32), rand(24, 16, 3, 3, dtype=torch.float32), torch.zeros(24)
    view = x[:, 1:, ::2, 3:19]
    assert torch.equal(conv2d(view, w, b, 1, SAME), conv2d(view.contiguous(), w, b, 1, SAME))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "cin", "cout"), [(8, 64, 64), (16, 4, 32), (8, 33, 17), (8, 320, 320), (1, 32, 64)])
@torch.no_grad()
def test_conv2d_does_not_depend_on_the_batch(size, cin, cout, dtype):
    w, b = rand(cout, cin, 3, 3, dtype=dtype, scale=(9 * cin) ** -0.5), rand(cout, dtype=dtype)
    x, r = rand(5, size, size, cin, dtype=dtype), rand(5, size, size, cout, dtype=dtype)
    check_batch(lambda x, r: conv2d(x, onednn.pack(w, x.shape, 1, SAME), b, 1, SAME, r), x, r)


@needs_onednn
@torch.no_grad()
def test_packing_changes_no_bit():
    x, layer = rand(2, 8, 8, 32, dtype=torch.float32), Conv2d(32, 48)
    layer.eval().requires_grad_(False)
    weight = layer.weight.clone()
    before = conv2d(x, weight, layer.bias, 1, SAME)
    layer(x)
    assert layer.weight.is_mkldnn and layer.weight.shape == weight.shape
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.state_dict()["weight"], weight)


@needs_onednn
@torch.no_grad()
def test_a_change_of_a_packed_weight_raises_or_takes_effect():
    x, layer = rand(1, 8, 8, 32, dtype=torch.float32), Conv2d(32, 48).eval()
    layer.requires_grad_(False)
    before = layer(x)
    for change in (layer.weight.add_, layer.weight.copy_, layer.weight.data.add_):
        with pytest.raises(RuntimeError):
            change(torch.ones(48, 32, 3, 3))
    layer.weight.mul_(2)  # supported by the packed layout
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias), rtol=0, atol=1e-5)
    layer.unpack()
    layer.weight.zero_()
    assert torch.equal(layer(x), layer.bias.expand(1, 8, 8, 48))


@needs_onednn
def test_a_packed_layer_is_loaded_converted_copied_pickled_and_trained_like_any_other():
    layer = Conv2d(4, 8).eval().requires_grad_(False)
    plain_weight, x = layer.weight.clone(), torch.ones(1, 4, 4, 4)
    layer(x)
    assert layer.weight.is_mkldnn
    assert torch.equal(copy.deepcopy(layer).state_dict()["weight"], plain_weight)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).weight, plain_weight)
    layer.load_state_dict({"weight": plain_weight * 2, "bias": layer.bias})
    assert torch.equal(layer.weight, plain_weight * 2)
    layer(x)
    assert layer.double().weight.dtype == torch.float64
    layer.float()(x)
    layer.train().requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.shape == plain_weight.shape


def test_conv2d_gradients():
    tensors = [rand(1, 3, 4, 2, dtype=torch.float64), rand(3, 2, 3, 3, dtype=torch.float64)]
    tensors += [rand(3, dtype=torch.float64), rand(1, 3, 4, 3, dtype=torch.float64)]
    for t in tensors:
        t.requires_grad_(True)
    for relu in (False, True):
        gradients = torch.autograd.gradcheck
        assert gradients(lambda *t, relu=relu: conv2d(*t[:3], 1, SAME, t[3], relu), tensors, fast_mode=True)


@needs_onednn
def test_gradients_reach_the_input_of_a_packed_layer():
    x, layer = rand(1, 8, 8, 16, dtype=torch.float32).requires_grad_(True), Conv2d(16, 8).eval().requires_grad_(False)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    with torch.no_grad():
        layer(x)
    assert layer.weight.is_mkldnn
    (actual,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_weight_is_packed_again_for_a_map_of_another_layout(dtype):
    """If oneDNN does not compute in the dtype, the weight is not packed.

    For 96 channels in bf16 on AVX-512, oneDNN chooses blocks of 32 at 4 x 4 and of 48 at 12 x 12.
    """
    layer = Conv2d(96, 96).to(dtype).eval().requires_grad_(False)
    weight, before = layer.weight.clone(), layer.weight
    for batch, size in ((2, 4), (2, 12), (2, 4), (1, 4), (5, 4)):
        x = rand(batch, size, size, 96, dtype=dtype)
        assert torch.equal(layer(x), conv2d(x, weight, layer.bias, 1, SAME))
        fit = onednn.layout(onednn.pack(weight, x.shape, 1, SAME))
        assert onednn.layout(layer.weight) == fit
        assert (layer.weight is before) == (onednn.layout(before) == fit)
        before = layer.weight
        layer(x)
        assert layer.weight is before  # not packed twice
        assert torch.equal(onednn.dense(before), weight)
    assert before.is_mkldnn == (dtype in dispatch.onednn_dtypes())


@needs_onednn
@torch.inference_mode()
def test_a_weight_stays_where_batches_of_two_sizes_take_turns(monkeypatch):
    """As in a server, whose requests come alone and together. A layer remembers a bounded number of shapes."""
    layer, packed, pack = Conv2d(32, 32).eval().requires_grad_(False), [], onednn.pack
    monkeypatch.setattr(onednn, "pack", lambda *given: packed.append(pack(*given)) or packed[-1])
    for batch in (1, 4, 1, 4, 1, 4):
        layer(rand(batch, 4, 4, 32, dtype=torch.float32))
    layouts = [onednn.layout(weight) for weight in packed]
    assert len(packed) == (2 if layouts[0] == layouts[1] else 6)
    for batch in range(5, 5 + 2 * KNOWN_SHAPES):
        layer(rand(batch, 4, 4, 32, dtype=torch.float32))
        assert len(layer._packed_for) <= KNOWN_SHAPES


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_a_weight_is_packed_in_the_dtypes_that_onednn_computes_in(dtype):
    weight = rand(16, 16, 3, 3, dtype=dtype)
    packed = onednn.pack(weight, torch.Size((1, 8, 8, 16)), 1, SAME)
    assert packed.is_mkldnn == (dtype in dispatch.onednn_dtypes())
    assert torch.equal(onednn.dense(packed), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 16), (4, 320), (8, 4), (9, 16), (16, 3), (5, 5)])
def test_cudnn_gets_channels_in_whole_vectors(inputs, outputs, dtype, monkeypatch):
    """Latents and images have 3, 4, 8 or 9 channels. The result is the same to the last bit: zeros are added."""
    if dispatch.interpreted():
        pytest.skip("for the process without the interpreter")
    shapes = []
    plain_conv = F.conv2d

    def watched(x, w, *rest):
        shapes.append((x.shape[1], w.shape[0], w.shape[1]))
        return plain_conv(x, w, *rest)

    x, r = rand(2, 6, 5, inputs, dtype=dtype), rand(2, 6, 5, outputs, dtype=dtype, seed=1)
    w = rand(outputs, inputs, 3, 3, dtype=dtype, scale=(9 * inputs) ** -0.5)
    cudnn = conv2d_module.OP.candidate("cudnn").run
    with monkeypatch.context() as patched:
        patched.setattr(F, "conv2d", watched)
        y = cudnn(x, w, None, 1, SAME, None, False)
    assert all(n % 8 == 0 for n in shapes[0]) and y.shape == r.shape and y.is_contiguous()
    check(lambda x, w: cudnn(x, w, None, 1, SAME, None, False), lambda x, w: plain(1, SAME, x, w, None), x, w,
          roundings=9 * inputs)  # fmt: skip


def test_wide_channels_and_fp32_are_not_copied_for_cudnn():
    for dtype, channels in ((torch.float16, 16), (torch.float32, 4)):
        x, w = rand(1, 4, 4, channels, dtype=dtype), rand(16, channels, 3, 3, dtype=dtype)
        assert conv2d_module._whole_vectors(x, w) == (x, w)


def first(height: int, inputs: int, outputs: int, **changes: Any) -> str | None:
    """The candidate that is preferred for a convolution of two maps with bias and residual."""
    x, w = (torch.empty(*shape, dtype=torch.float16, device="meta")
            for shape in ((2, height, height, inputs), (outputs, inputs, 3, 3)))  # fmt: skip
    given = {"bias": w[:, 0, 0, 0], "stride": 1, "padding": SAME, "residual": x[..., :1], "relu": False} | changes
    return conv2d_module._first(x, w, *given.values())


def test_the_preferred_candidate_is_ours_where_it_saves_more_than_it_loses():
    """By the numbers of `ConvEstimate`, for sm_90: a device of the meta kind counts as one."""
    without = {"bias": None, "residual": None}
    assert first(64, 320, 320) == "triton"  # three passes over 5 MB, 15 GFLOP
    assert first(64, 320, 320, **without) is None  # nothing to save
    assert first(32, 640, 640) is None  # half as many bytes, as many products
    assert first(8, 1280, 1280) is None  # a split, whose parts are written and read
    assert first(512, 128, 128) == "triton"  # the decoder's last level
    assert first(64, 4, 320, **without) == first(64, 320, 4, **without) == "triton"  # cuDNN would need copies


def test_on_other_classes_cudnn_is_first(monkeypatch):
    for key in (75, 80, 86, 100, 120):
        monkeypatch.setattr(architecture, "class_of", lambda device, key=key: key)
        assert first(512, 128, 128) is None
