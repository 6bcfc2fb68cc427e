"""What people reported of images whose colours or transparency change on reading."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from fastsd.errors import FastsdError
from fastsd.image.files import flatten, open_image, open_mask
from tests.support.pipelines import tiny_pipeline

GREY = Image.fromarray(np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16))
COLOURS = Image.merge("RGB", [GREY, GREY.rotate(90), GREY.rotate(180)])


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_mode(mode: str) -> Image.Image:
    """The colours, or the greys, in a mode."""
    if mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        return ImageCms.applyTransform(COLOURS, transform)
    if mode.startswith("I;"):
        order = ">u2" if mode in ("I;16B",) else "<u2"
        data = (np.asarray(GREY).astype(np.uint16) * 257).astype(order)
        return Image.frombytes(mode, GREY.size, data.tobytes())
    if mode in ("PA", "RGBa", "La"):
        return {"PA": COLOURS.convert("P").convert("PA"), "RGBa": COLOURS.convert("RGBA").convert("RGBa")}.get(
            mode
        ) or GREY.convert("LA").convert("La")
    return (GREY if mode in ("L", "LA", "I", "F", "1") else COLOURS).convert(mode)


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_pillow_mode_reads_as_it_is_shown(mode: str) -> None:
    """Right: the colours or greys that were put into the mode; those of LAB to its own precision."""
    image = in_mode(mode)
    if mode == "LAB":
        found = np.asarray(flatten(image, "RGB", 255), int)
        assert np.abs(found - np.asarray(COLOURS)).mean() < 4  # LAB's 8 bits are coarser than sRGB's
        return
    wanted = GREY if mode in ("L", "LA", "La", "I", "F") or mode.startswith("I;") else image.convert("RGB")
    np.testing.assert_array_equal(np.asarray(flatten(image, "RGB", 255)), np.asarray(wanted.convert("RGB")))
    assert flatten(image, "L", 0).mode == "L"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_every_mode_that_a_format_can_write_is_read(kind: str) -> None:
    """Right: Pillow's own `convert`, for the modes that it shows without loss."""
    count = 0
    for mode in Image.MODES:
        try:
            data = saved(in_mode(mode), kind)
        except (OSError, ValueError, KeyError):
            continue
        count += 1
        found = np.asarray(open_image(data), float)
        assert found.shape == (16, 16, 3) and found.std() > 10
        with Image.open(io.BytesIO(data)) as opened:
            if opened.mode in ("L", "RGB", "P"):
                np.testing.assert_array_equal(found, np.asarray(opened.convert("RGB")))
    assert count >= 2


def test_16_bit_grey_keeps_its_transparency() -> None:
    """The PNG specification, tRNS: one grey value is clear. 30000 of 65535 is 117 of 255."""
    values = np.full((4, 4), 30000, dtype=np.uint16)
    values[0, 0] = 30001
    data = saved(Image.fromarray(values), transparency=30001)
    found, mask = open_image(data), open_mask(data)
    assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((1, 1)) == (117, 117, 117)
    assert mask.getpixel((0, 0)) == 0 and mask.getpixel((1, 1)) == 117


def wide_profile(gamma: float = 1.8) -> bytes:
    """sRGB's profile with its curves replaced by a gamma: colours mean something else."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for k in range(struct.unpack(">I", data[128:132])[0]):
        tag, at, size = struct.unpack(">4sII", data[132 + 12 * k : 144 + 12 * k])
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            curve = b"curv" + b"\0" * 4 + struct.pack(">IH", 1, round(gamma * 256))
            assert size >= len(curve)
            data[at : at + len(curve)] = curve
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_embedded_profiles_are_converted_to_srgb(kind: str) -> None:
    """Values v under a gamma of 1.8 are v^1.8 of light, and in sRGB the number that means the same light."""
    profile, options = wide_profile(), {"quality": 100} if kind == "JPEG" else {}
    if kind == "WEBP":
        options = {"lossless": True}
    found = open_image(saved(GREY.convert("RGB"), kind, icc_profile=profile, **options))
    light = (np.asarray(GREY) / 255.0) ** 1.8
    wanted = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(np.asarray(found.getchannel("G")) - wanted).max() < 3 and "notes" not in found.info


def test_an_srgb_profile_changes_no_pixel() -> None:
    """Most cameras and editors embed one."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(open_image(saved(COLOURS, icc_profile=profile)), COLOURS)


def test_a_profiled_image_in_python_is_converted_too_and_its_damage_is_a_note() -> None:
    pipe, image = tiny_pipeline(), COLOURS.resize((64, 64))
    image.info["icc_profile"] = wide_profile()
    settings: dict[str, Any] = {"image": image, "strength": 0.0, "seed": 1}
    result = pipe("a cat", **settings)
    np.testing.assert_array_equal(result.images[0], flatten(image, "RGB", 255))
    assert np.abs(np.asarray(result.images[0], int) - np.asarray(image)).max() > 5
    for profile in (b"junk", wide_profile()[:200], b"\0" * (2**24 + 1)):
        image.info["icc_profile"] = profile
        result = pipe("a cat", **settings)
        assert any("the colour profile is" in note for note in result.notes)
        np.testing.assert_array_equal(result.images[0], image)


def test_a_damaged_profile_in_a_file_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    image = open_image(saved(COLOURS.resize((64, 64)), icc_profile=b"junk"))
    result = tiny_pipeline()("a cat", image=image, strength=0.0, seed=1)
    assert any("damaged" in note for note in result.notes)


def test_floating_point_pixels_from_0_to_1_are_refused_by_name() -> None:
    with pytest.raises(FastsdError, match="at most 1"):
        flatten(Image.new("F", (8, 8), 0.5), "RGB", 255)
