"""Winograd's convolutions against float64, at every size of map, strip and chunk; what follows a changed weight."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch
from fastsd.kernels.conv2d import Padding, conv2d, wants_packed
from fastsd.kernels.cpu import choices, winograd
from fastsd.kernels.upsample2x import KEPT, upsample2x_conv
from fastsd.model.layers import Conv2d, Upsample
from tests.support.precision import check, check_batch, rand

pytestmark = pytest.mark.skipif(
    torch.float32 not in dispatch.onednn_dtypes(), reason="PyTorch has no oneDNN for this processor"
)
SAME: Padding = (1, 1, 1, 1)
FP32 = torch.float32
SHAPES = [  # batch, height, width, in, out, padding
    (2, 16, 16, 64, 96, SAME),  # whole tiles
    (1, 9, 7, 32, 16, SAME),  # odd sizes: a row and a column of tiles are cut
    (3, 1, 1, 16, 16, SAME),  # one pixel, surrounded by padding
    (1, 2, 37, 16, 48, SAME),  # one row of tiles
    (1, 37, 2, 48, 16, SAME),  # one column of tiles
    (2, 7, 6, 16, 16, (0, 0, 0, 0)),  # no padding, as on the lanes of a map that wraps around
    (1, 5, 4, 16, 16, (0, 1, 0, 1)),  # sides that differ
    (1, 3, 3, 16, 16, (3, 2, 4, 5)),  # tiles that read nothing but padding
    (1, 12, 12, 640, 32, SAME),  # long sums
]


def layer(inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, in a checkpoint's memory, and a bias."""
    weight = rand(outputs, inputs, 3, 3, dtype=FP32, scale=(9 * inputs) ** -0.5, seed=seed)
    return weight, rand(outputs, dtype=FP32, seed=seed)


def plain(
    padding: Padding, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, r: torch.Tensor | None = None
) -> torch.Tensor:
    y = F.conv2d(F.pad(x.permute(0, 3, 1, 2), padding), w, b).permute(0, 2, 3, 1)
    return y if r is None else y + r


def doubled(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    return plain(SAME, x.repeat_interleave(2, 1).repeat_interleave(2, 2), w, b)


@pytest.mark.parametrize("strip", [1, 8, winograd.STRIP])
@pytest.mark.parametrize(("batch", "height", "width", "cin", "cout", "padding"), SHAPES)
@torch.no_grad()
def test_convolve(batch, height, width, cin, cout, padding, strip, monkeypatch):
    """Strips of one row of tiles, of some rows that do not divide the map, of the whole map; chunks of 16 channels."""
    monkeypatch.setattr(winograd, "STRIP", strip)
    monkeypatch.setattr(winograd, "CHUNK", 1)
    x, (w, b) = rand(batch, height, width, cin, dtype=FP32), layer(cin, cout)
    r, terms = rand(*plain(padding, x, w, b).shape, dtype=FP32, seed=1), 9 * cin + 2
    for bias, residual in ((b, None), (None, r), (b, r)):
        check(
            lambda *t: winograd.convolve(*t[:3], padding, *t[3:]),
            lambda *t: plain(padding, *t),
            *(x, w, bias, residual),
            roundings=terms,
        )
    check(
        lambda *t: winograd.convolve(*t[:3], padding, t[3], relu=True),
        lambda *t: plain(padding, *t).relu(),
        *(x, w, b, r),
        roundings=terms,
    )


@pytest.mark.parametrize("strip", [1, 8, winograd.STRIP])
@pytest.mark.parametrize(
    ("batch", "height", "width", "cin", "cout"),
    [(2, 8, 8, 64, 32), (1, 7, 5, 16, 48), (1, 1, 1, 16, 16), (1, 1, 9, 32, 16)],
)
@torch.no_grad()
def test_convolve_doubled(batch, height, width, cin, cout, strip, monkeypatch):
    monkeypatch.setattr(winograd, "STRIP", strip)
    x, (w, b) = rand(batch, height, width, cin, dtype=FP32), layer(cin, cout)
    for bias in (b, None):
        check(winograd.convolve_doubled, doubled, x, w, bias, roundings=9 * cin + 1)


@pytest.mark.parametrize("run", [lambda *t: winograd.convolve(*t, SAME), winograd.convolve_doubled])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(run):
    w, b = layer(32, 48)
    check_batch(lambda x: run(x, w, b), rand(4, 9, 12, 32, dtype=FP32))


@torch.no_grad()
def test_the_error_is_within_what_rounding_explains_which_is_half_of_a_plain_sums():
    """With x and w of variance 1: a product m(i, k) adds up Cin terms of variance 4 u(i) u(k), u = 1, 3/4, 3/4, 1 being
    those of the sums of taps; a result adds up nine such products, whose variances are 25 in all. One chain adds up
    9 Cin terms of variance 1. Rounding a sum is off by at most 2^-24 of it, evenly, so by a third of the square of that
    on average; over n partial sums, by n / 2 times that of the last. That is 25 Cin^2 / 2 against 81 Cin^2 / 2, an
    error of sqrt(25/81) = 0.56 of the chain's. Rounding the sums of pixels, of taps and of results (twelve roundings of
    terms whose variance is at most 25 Cin) is 24 / Cin of the former.
    """
    cin = 320
    x, (w, _) = rand(1, 16, 16, cin, dtype=FP32), layer(cin, 64)
    truth = plain(SAME, x.double(), w.double(), None)
    error = (winograd.convolve(x, w, None, SAME) - truth).square().mean().sqrt()
    chain = (81 * cin**2 / 2 / (9 * cin)) ** 0.5 * 2.0**-24 / 3**0.5  # `layer` divides the weight by sqrt(9 Cin)
    assert error < (25 / 81 * (1 + 24 / cin)) ** 0.5 * chain


@torch.no_grad()
def test_what_is_not_finite_spreads_over_its_tiles_and_no_further():
    """A convolution makes 3 x 3 results of an infinite pixel infinite or NaN; here it is whole tiles of 2 x 2."""
    w, b = layer(16, 16)
    for value in (float("inf"), float("nan")):
        for at in ((0, 0), (4, 5), (5, 4), (8, 8)):
            x = rand(1, 9, 9, 16, dtype=FP32)
            clean = winograd.convolve(x, w, b, SAME)
            x[0, at[0], at[1], 3] = value
            y, direct = winograd.convolve(x, w, b, SAME), plain(SAME, x, w, b)
            wrong = ~y.isfinite().all(-1)[0]
            assert bool(wrong[~direct.isfinite().all(-1)[0]].all())
            rows, columns = wrong.nonzero().unbind(1)
            assert max((rows - at[0]).abs().max(), (columns - at[1]).abs().max()) <= 2
            assert torch.equal(y[0][~wrong], clean[0][~wrong])


@torch.no_grad()
def test_no_sum_overflows_that_a_convolution_keeps_far_from_the_limit():
    w, b = layer(16, 16)
    x = rand(1, 8, 8, 16, dtype=FP32, scale=1e37)
    check(lambda *t: winograd.convolve(*t, SAME), lambda *t: plain(SAME, *t), x, w, b, roundings=9 * 16 + 1)


@torch.no_grad()
def test_views_are_read_as_they_lie():
    w, b = layer(16, 32)
    wide, residual = rand(2, 9, 20, 40, dtype=FP32), rand(2, 10, 8, 64, dtype=FP32)
    x, r = wide[:, 1:, ::2, 3:19], residual[:, 1:9, :, ::2]
    x = x[:, :, :8]
    same = winograd.convolve(x.contiguous(), w.contiguous(memory_format=torch.channels_last), b, SAME, r.contiguous())
    assert torch.equal(winograd.convolve(x, w, b, SAME, r), same)


def test_only_what_it_computes_is_taken():
    weight = torch.empty(32, 48, 3, 3)
    assert winograd.takes(weight, 1)
    assert not winograd.takes(weight, 2)
    for other in ((32, 48, 1, 1), (32, 48, 3, 1), (33, 48, 3, 3), (32, 47, 3, 3), (0, 48, 3, 3), (32, 0, 3, 3)):
        assert not winograd.takes(torch.empty(other), 1)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert not winograd.takes(weight.to(dtype), 1)


def test_the_choice_does_not_depend_on_the_batch_and_keeps_small_layers_packed():
    weight = torch.empty(640, 640, 3, 3)
    for side in (8, 16, 32, 64):
        one, many = (torch.Size((batch, side, side, 640)) for batch in (1, 50))
        assert wants_packed(one, weight, 1, SAME) == wants_packed(many, weight, 1, SAME)
    assert wants_packed(torch.Size((1, 8, 8, 640)), weight, 1, SAME)
    assert not wants_packed(torch.Size((1, 32, 32, 640)), weight, 1, SAME)
    assert wants_packed(torch.Size((1, 64, 64, 32)), torch.empty(32, 32, 3, 3), 1, SAME)
    assert wants_packed(torch.Size((1, 64, 64, 640)), weight, 2, SAME)


@pytest.fixture
def chosen():
    """Winograd's way for every layer that it takes, in this thread."""
    with choices.forced("conv2d", "winograd"), choices.forced("upsample2x_conv, Winograd's", "winograd"):
        yield


@pytest.mark.usefixtures("chosen")
@torch.no_grad()
def test_a_layer_keeps_its_weight_and_follows_every_change_of_it():
    """Nothing is kept that could be older than the weight: in place, by assignment, by loading, in a copy."""
    module, x = Conv2d(16, 32).eval().requires_grad_(False), rand(1, 6, 6, 16, dtype=FP32)
    before = module.weight.clone()

    def follows(m: Conv2d) -> None:
        check(lambda x, w, b: m(x), lambda *t: plain(SAME, *t), x, m.weight, m.bias, roundings=9 * 16 + 1)

    follows(module)
    assert not module.weight.is_mkldnn and torch.equal(module.weight, before)
    assert list(module.state_dict()) == ["weight", "bias"] and torch.equal(module.state_dict()["weight"], before)
    twin = copy.deepcopy(module)
    module.weight.mul_(2)  # as merging an adapter does
    follows(module)
    follows(twin)
    assert torch.equal(twin.weight, before)
    module.weight.data[3] += 1
    follows(module)
    module.load_state_dict(twin.state_dict())
    follows(module)
    assert torch.equal(module(x), twin(x))
    module.weight = torch.nn.Parameter(3 * before, requires_grad=False)
    follows(module)
    assert module.to(torch.float64).weight.dtype == torch.float64 and module(x.double()).dtype == torch.float64
    module.to(torch.float32).train().requires_grad_(True)
    with torch.enable_grad():
        module(x).sum().backward()
    assert module.weight.grad is not None


@torch.no_grad()
def test_a_layer_goes_from_one_way_to_the_other_and_back():
    """A map's shape chooses; the weight is packed for one and ordinary for the other, with the same values."""
    module, x = Conv2d(16, 16).eval().requires_grad_(False), rand(1, 6, 6, 16, dtype=FP32)
    before = module.weight.clone()
    for name in ("direct", "winograd", "direct", "winograd"):
        x = x[:, :-1]  # another shape, so that the layer asks
        with choices.forced("conv2d", name):
            check(lambda x, w, b: module(x), lambda *t: plain(SAME, *t), x, before, module.bias, roundings=9 * 16 + 1)
        assert module.weight.is_mkldnn == (name == "direct")
        assert torch.equal(module.state_dict()["weight"], before)


@torch.no_grad()
def test_upsampling_goes_winograds_way_where_no_sums_are_kept():
    channels = 176
    module, x = Upsample(channels).eval().requires_grad_(False), rand(1, 8, 9, channels, dtype=FP32)
    weight = module.conv.weight.clone()
    assert weight.numel() > KEPT
    check(lambda x, w, b: module(x), doubled, x, weight, module.conv.bias, roundings=9 * channels + 1)
    assert not module.conv.weight.is_mkldnn
    with dispatch.forced("onednn"):
        assert torch.equal(upsample2x_conv(x, weight, module.conv.bias), module(x))
    module(rand(1, 3, 3, channels, dtype=FP32))  # too small: doubled, then convolved
    assert module.conv.weight.is_mkldnn
    check(lambda x, w, b: module(x), doubled, x, weight, module.conv.bias, roundings=9 * channels + 1)


@pytest.mark.usefixtures("chosen")
@torch.no_grad()
def test_threads_that_share_a_layer_get_their_own_results():
    """All memory of a call is its own."""
    w, b = layer(32, 32)
    maps = [rand(1, 24, 24, 32, dtype=FP32, seed=seed) for seed in range(4)]
    expected = [conv2d(x, w, b, 1, SAME) for x in maps]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(5):
            with torch.no_grad():
                if not torch.equal(winograd.convolve(maps[i], w, b, SAME), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(maps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
