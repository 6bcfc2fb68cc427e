from __future__ import annotations

from typing import Any

import pytest

from fastsd.errors import FastsdError
from fastsd.server.a1111.bodies import TextToImage
from fastsd.server.a1111.translate import translate
from fastsd.server.catalogue import Catalogue
from fastsd.server.limits import Limits
from fastsd.server.orders import Draft
from fastsd.server.settings import ServerSettings
from fastsd.server.styles import Styles


def draft(**body: Any) -> Draft:
    return translate(TextToImage(**body), {}, Catalogue(ServerSettings()), Styles(None), Limits())


def test_values_without_effect_are_taken_however_a_client_writes_them() -> None:
    """Also PHP's empty list for an empty object, and scripts that their first argument switches off."""
    written = {"restore_faces": "false", "tiling": 0, "s_churn": "0", "s_tmax": "0", "s_noise": "1"}
    found = draft(**written, styles=["None"], override_settings=[], alwayson_scripts=[])
    assert found == draft()
    with pytest.raises(FastsdError, match="not supported"):
        draft(restore_faces="true")
    scripts = {"ADetailer": {"args": [False, False, {"ad_model": "face"}]}, "Tiled Diffusion": {"args": ["False", 1]}}
    assert draft(alwayson_scripts=scripts).notes == [
        f"the script {name!r} is off by its first argument" for name in scripts
    ]


def test_options_without_effect_on_pixels_are_taken() -> None:
    found = draft(override_settings={"filter_nsfw": False, "return_grid": "false", "token_merging_ratio": 0})
    assert not found.notes
    for name, value in {"filter_nsfw": True, "samples_format": "jpg", "eta_ancestral": 0.5, "sd_vae": "x.pt"}.items():
        with pytest.raises(FastsdError, match="not with this value") as refused:
            draft(override_settings={name: value})
        assert refused.value.argument == name
    (note,) = draft(override_settings={"samples_save": True}).notes
    assert note.startswith("samples_save has no effect")
