"""Enlarging images by a network of ESRGAN's kind: in tiles, with transparency, to any factor."""

from fastsd.parameters.kinds import MAX_SIDE, Number, Whole

SCALES = Number(low=0.25, high=16)  # of a result's sides over the image's
TILES = Whole(low=64, high=MAX_SIDE)  # pixels of a tile's side
