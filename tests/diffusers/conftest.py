"""Tiny random pipelines of diffusers', once for all tests of this folder."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

from tests.support.families import Families


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    torch.manual_seed(0)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Families(tmp_path_factory.mktemp("families"))


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.heavy)  # all of these import diffusers
