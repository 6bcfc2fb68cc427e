from __future__ import annotations

import base64

import numpy as np
import pytest
from PIL import Image

from fastsd.server.a1111.bodies import ImageToImage
from fastsd.server.a1111.translate import translate
from fastsd.server.catalogue import Catalogue
from fastsd.server.images import read_painted
from fastsd.server.limits import Limits
from fastsd.server.settings import ServerSettings
from fastsd.server.styles import Styles
from tests.support.server import encoded, png


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255)])
def test_a_mask_with_transparency_is_what_is_painted(colour: tuple[int, int, int]) -> None:
    mask = Image.new("RGBA", (64, 64), (*colour, 0))
    mask.paste((*colour, 255), (0, 0, 32, 64))
    body = ImageToImage(init_images=[png()], mask=encoded(mask), inpainting_mask_invert=False)  # type: ignore[arg-type]
    given = translate(body, {}, Catalogue(ServerSettings()), Styles(None), Limits()).arguments
    pixels = np.asarray(given["mask_image"])
    assert given["mask_invert"] is False and (pixels[:, :32] == 255).all() and (pixels[:, 32:] == 0).all()


def test_a_mask_without_transparency_is_read_by_its_colours() -> None:
    assert read_painted(base64.b64decode(png(mode="RGBA", colour=(255, 255, 255, 255))), "mask") is None
