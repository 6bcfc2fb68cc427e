"""Tiles: they cover an image once, give what the whole gives where they see enough, and show no edge elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsd.model.upscalers import CompactConfig, RRDBConfig, make_network
from fastsd.upscale.tiles import CHEAP, Seam, count_tiles, in_tiles, spans
from tests.support.upscalers import random_state

SEAMS = [Seam.of(5), Seam.of(34), Seam.of(349), Seam.of(698, 2), Seam.of(1396, 4)]


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.margin} and {seam.fade} by {seam.step}")
@pytest.mark.parametrize("length", [1, 63, 200, 257, 260, 511, 1000])
def test_spans_cover_a_side(length: int, seam: Seam) -> None:
    """Each pixel is given by one tile, or by the two that are cross-faded there, with a margin inside the image."""
    length, tile = -(-length // seam.step) * seam.step, max(200, seam.smallest)
    tile -= tile % seam.step
    found = spans(length, tile, seam)
    given = np.zeros(length, dtype=int)
    for i, span in enumerate(found):
        given[span.first : span.last] += 1
        given[span.first : span.first + span.rise] -= 1
        assert span.start % seam.step == 0 and span.end - span.start == min(tile, length)
        assert span.first - span.start >= (seam.margin if i else 0)
        assert span.end - span.last >= (seam.margin if span is not found[-1] else 0)
        assert i == 0 or span.rise == seam.fade and found[i - 1].last == span.first + span.rise
    assert (given == 1).all() and found[0].start == 0 and found[-1].end == length


def network_of(config: RRDBConfig | CompactConfig) -> object:
    network = make_network(config).eval().requires_grad_(False)
    network.load_state_dict(random_state(config))

    def run(part: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.array(part)).float()[None] / 255
        return (network(pixels)[0] * 64 + 128).clamp(0, 255).numpy()

    return run


EXACT = {
    "compact": CompactConfig(features=16, convolutions=4, scale=2),
    "one block": RRDBConfig(features=8, growth=4, blocks=1, doublings=1),
    "one block, unshuffled": RRDBConfig(features=8, growth=4, blocks=1, doublings=1, unshuffle=2),
}


@pytest.mark.parametrize("name", EXACT)
def test_tiles_that_see_enough_give_the_whole(name: str) -> None:
    """Their sums are the same, in an order that may differ, so a value may be rounded to the next of 256."""
    config = EXACT[name]
    seam = Seam.of(config.radius, config.unshuffle)
    assert config.radius <= CHEAP and seam.fade == 0
    image = np.random.default_rng(0).integers(0, 256, (134, 240, 3), dtype=np.uint8)
    run = network_of(config)
    *steps, whole = in_tiles(run, image, config.scale, 240, seam)  # type: ignore[arg-type]
    assert steps == []
    *steps, tiled = in_tiles(run, image, config.scale, seam.smallest, seam)  # type: ignore[arg-type]
    assert len(steps) == count_tiles(134, 240, seam.smallest, seam) - 1 >= 1
    assert whole is not None and tiled is not None and tiled.shape == whole.shape
    off = np.abs(tiled.astype(int) - whole.astype(int))
    assert off.max() <= 1 and (off > 0).mean() < 1e-3


def test_other_tiles_are_cross_faded() -> None:
    """Tiles that are lighter or darker in turn by 30 of 255 meet in a slope: 30 over 8 pixels, so 4 from one to the
    next, in each direction."""
    seam, turn = Seam.of(349), [0]

    def run(part: np.ndarray) -> np.ndarray:
        turn[0] += 1
        return np.full((*part.shape[:2], 3), 100.0 + 30 * (turn[0] % 2), dtype=np.float32)

    image = np.zeros((300, 410, 3), dtype=np.uint8)
    *_, found = in_tiles(run, image, 1, 128, seam)
    assert turn[0] == count_tiles(300, 410, 128, seam) > 9 and found is not None
    assert {100, 130} <= set(np.unique(found))
    assert max(np.abs(np.diff(found.astype(int), axis=axis)).max() for axis in (0, 1)) <= 5


def test_every_tile_has_the_same_size() -> None:
    """A layer's weight is packed for a size, which takes as long as some tiles."""
    sizes = set()

    def run(part: np.ndarray) -> np.ndarray:
        sizes.add(part.shape)
        return part.astype(np.float32)

    image = np.random.default_rng(1).integers(0, 256, (150, 333, 3), dtype=np.uint8)
    *_, found = in_tiles(run, image, 1, 128, Seam.of(20))
    assert sizes == {(128, 128, 3)} and found is not None and (found == image).all()
