"""The table of single-file layouts: rows that can be told apart, and the row for a model."""

from __future__ import annotations

import pytest

from fastsd.weights.layouts.file_layouts import FILE_LAYOUTS, layout_for


def test_no_row_hides_a_later_one() -> None:
    """A file has the first layout whose prefixes it holds, so a later row must not need all prefixes of an earlier.

    Two rows may share them if the UNet of one reads sizes and that of the other does not.
    """
    for i, earlier in enumerate(FILE_LAYOUTS):
        needed = {earlier.unet_prefix, *(text.prefix for text in earlier.texts)}
        for later in FILE_LAYOUTS[i + 1 :]:
            same = bool(later.size_inputs) == bool(earlier.size_inputs)
            assert not same or not needed <= {later.unet_prefix, *(text.prefix for text in later.texts)}, later.family


@pytest.mark.parametrize(
    ("folders", "added_conditioning", "openclip", "scaling_factor", "family"),
    [
        (["text_encoder"], False, False, 0.18215, "SD 1"),
        (["text_encoder"], False, True, 0.18215, "SD 2"),
        (["text_encoder"], False, True, 0.5, "SD 2"),  # refused later, by what it would be read back as
        (["text_encoder", "text_encoder_2"], True, True, 0.13025, "SDXL"),
        (["text_encoder_2"], True, True, 0.13025, "SDXL refiner"),
        (["text_encoder", "text_encoder_2"], False, True, 0.13025, None),  # two text encoders without their sizes
    ],
)
def test_the_layout_of_a_model(
    folders: list[str], added_conditioning: bool, openclip: bool, scaling_factor: float, family: str | None
) -> None:
    layout = layout_for(folders, added_conditioning, openclip, scaling_factor)
    assert (layout and layout.family) == family


def test_the_layout_of_a_few_step_model() -> None:
    """SD-Turbo has SD 2's networks; its published file has a layout of its own."""
    for few_step, family in ((None, "SD 2"), ("turbo", "SD-Turbo"), ("lcm", "SD 2")):
        layout = layout_for(["text_encoder"], False, True, 0.18215, few_step)
        assert layout is not None and layout.family == family
    layout = layout_for(["text_encoder"], False, False, 0.18215, "turbo")
    assert layout is not None and layout.family == "SD 1"
