"""A1111's rules of emphasis (modules/sd_emphasis.py), and which layer of the text encoder each program reads."""

from __future__ import annotations

import pytest
import torch

from fastsd.components import Components
from fastsd.text.encode import LAYERS, encode_text
from fastsd.text.parse import parse_text
from tests.support import tiny

TEXT = "a (red:1.7) [cat]"


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def components(request: pytest.FixtureRequest) -> Components:
    return getattr(tiny, request.param)()


def test_each_rule_is_a1111s(components: Components) -> None:
    """ "Original" is tested in test_encode.py."""
    parsed = parse_text(components, TEXT, "a1111")
    plain = encode_text(components, parse_text(components, "a red cat"), 1).context
    weights = torch.ones(1, 77, 1)
    weights[0, 2], weights[0, 3] = 1.7, 1 / 1.1
    found = {name: encode_text(components, parsed, 1, emphasis=name).context for name in ("no_norm", "ignore", "none")}
    assert torch.equal(found["no_norm"], plain * weights)
    assert torch.equal(found["ignore"], plain) and torch.equal(found["none"], plain)


def test_without_emphasis_brackets_are_text(components: Components) -> None:
    """A1111, `tokenize_line`: `parsed = [[line, 1.0]]`, in chunks as ever; BREAK is a word."""
    literal = parse_text(components, TEXT + " BREAK " + "x " * 80, "literal")
    assert literal.sections[0][0].text.startswith(TEXT + " BREAK") and len(literal.chunks[0]) == 2
    one = parse_text(components, TEXT, "literal")
    assert one.chunks[0][0].ids == components.tokenizers[0].ids(TEXT)


# Of 3 layers, from the end; SD 2's encoder here lacks the last one, as in its diffusers folder.
READ = {
    # diffusers: `hidden_states[-(clip_skip + 1)]`, SDXL `-(clip_skip + 2)`; its clip_skip is one less than ours.
    "added": {"quick_gelu": (-1, -2, -3), "gelu": (-1, -2, -3), "xl": (-2, -3, -4)},
    # A1111: modules/sd_hijack_clip.py reads "CLIP_stop_at_last_layers"; modules/sd_hijack_open_clip.py does not, nor
    # does SDXL's first encoder without "sdxl_clip_l_skip".
    "fixed": {"quick_gelu": (-1, -2, -3), "gelu": (-1, -1, -1), "xl": (-2, -2, -2)},
    # ComfyUI: `CLIPSetLastLayer` sets the layer itself, which is -2 in SD 2 and SDXL until it is set.
    "from_end": {"quick_gelu": (-1, -2, -3), "gelu": (-1, -1, -2), "xl": (-2, -2, -3)},
}


@pytest.mark.parametrize("rule", READ)
def test_clip_skip_counts_as_each_program_counts(rule: str) -> None:
    for kind, layers in READ[rule].items():
        assert tuple(LAYERS[rule](kind, skip) for skip in (1, 2, 3)) == layers
