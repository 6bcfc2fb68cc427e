"""A batch in parts, and the random numbers of each."""

from __future__ import annotations

import torch

from fastsd.train.parts import RandomStreams, split, split_evenly


def test_split_evenly() -> None:
    assert split_evenly(7, 2) == [4, 3] and split_evenly(1, 4) == [1] and split_evenly(9, 3) == [3, 3, 3]


def test_random_streams_depend_on_seed_stage_step_and_worker_alone() -> None:
    def values(*key: int | str) -> tuple[float, float]:
        streams = RandomStreams.create(*key)  # type: ignore[arg-type]
        return streams.numpy.random(), float(torch.rand(1, generator=streams.torch))

    keys = [(0, "diffusion", 3, 1), (1, "diffusion", 3, 1), (0, "autoencoder", 3, 1), (0, "diffusion", 4, 1),
            (0, "diffusion", 3, 0)]  # fmt: skip
    assert values(*keys[0]) == values(*keys[0])
    for i in range(2):  # numpy's and torch's
        assert len({values(*key)[i] for key in keys}) == len(keys)


def test_parts_cover_the_batch() -> None:
    parts = split(0, "unet", 3, 7, 3)
    assert [(part.index, part.first, part.size, part.of) for part in parts] == [
        (0, 0, 3, 7),
        (1, 3, 2, 7),
        (2, 5, 2, 7),
    ]
