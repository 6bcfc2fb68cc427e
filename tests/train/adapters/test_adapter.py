"""An adapter on a checkpoint: its files give what it computed, and the checkpoint without it is as before."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.model.unet import AddedConditioning
from fastsd.train.adapters.adapter import AdapterSettings, TrainableAdapter
from fastsd.weights.adapters.apply import Adapter, Adapters
from fastsd.weights.adapters.write import write_adapter
from tests.support import tiny

ALL = ("linear", "convolution")


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def components(request: pytest.FixtureRequest) -> Components:
    made = {"sd1": tiny.sd1, "sdxl": tiny.sdxl}[request.param]()
    for module in (made.unet, *made.text_encoders):
        module.requires_grad_(False)
    return made


def networks(components: Components) -> tuple[str, ...]:
    return ("unet", "text_encoder", "text_encoder_2")[: 1 + len(components.text_encoders)]


def make(components: Components, **settings: object) -> TrainableAdapter:
    """A random adapter, its magnitudes beside those of the weights."""
    fields = {"rank": 3, "alpha": 2.0, "networks": networks(components), "targets": ALL} | settings
    adapter = TrainableAdapter(components, AdapterSettings(**fields), seed=0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * (1 + 0.1 * noise) if "magnitude" in name else 0.2 * noise
    return adapter


def call(components: Components) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x, ids = torch.randn(1, 8, 8, 4, generator=generator), torch.randint(0, 1000, (1, 9), generator=generator)
    texts = [encoder(ids, -2) for encoder in components.text_encoders]
    added = AddedConditioning(texts[-1].pooled, torch.arange(6.0)[None]) if components.xl else None
    context = torch.cat([text.hidden for text in texts], dim=-1)
    return components.unet(x, torch.tensor([37.0]), context, added)


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_file_gives_what_the_adapter_computed(kind: str, dora: bool, components: Components, tmp_path: Path) -> None:
    """Merged into the weights, every product is rounded after another order of sums. The network is three levels deep
    in attention and convolutions of at most 576 terms; 1000 roundings of the largest value bound its noise."""
    with torch.no_grad():
        base = call(components)
        adapter = make(components, kind=kind, dora=dora, ranks=("attn2.to_k=5",))
        adapter.attach()
        expected = call(components)
        adapter.detach()
        assert torch.equal(call(components), base)
        file = write_adapter(tmp_path / "a.safetensors", "kohya", adapter.stored(), components, dtype="fp32")
        merged = Adapters(components)
        merged.set([Adapter(file)])
        found = call(components)
        merged.set([])
    assert float((expected - base).abs().max()) > 0.1
    assert float((found - expected).abs().max()) < 1000 * 2.0**-24 * float(expected.abs().max())


def test_the_checkpoint_keeps_its_keys(components: Components) -> None:
    before = {key: value.clone() for key, value in tiny.all_weights(components).items()}
    adapter = make(components)
    adapter.attach()
    tiny.assert_same(tiny.all_weights(components), before)
    assert not any("change" in name for name, _ in components.unet.named_parameters())
    adapter.detach()


def test_only_the_adapter_has_gradients(components: Components) -> None:
    adapter = make(components, dora=True)
    adapter.attach()
    call(components).sum().backward()
    adapter.detach()
    gradients = {name: p.grad for name, p in adapter.named_parameters()}
    # Of an encoder, the last layer is not read (SDXL's first: nor its pooled text).
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert all("encoder/layers/1" in name or "text_projection" in name for name in missing), missing
    assert all(p.grad is None for p in components.unet.parameters())


def test_ranks_and_alphas_by_pattern(components: Components) -> None:
    adapter = make(components, targets=("attention",), ranks=("attn2.to_k=5",), alphas=(r"to_(q|v)=1.0",))
    stored = {f"{layer.network}.{layer.name}": layer for layer in adapter.stored()}
    keys = [key for key in stored if key.endswith("attn2.to_k")]
    assert keys and all(stored[key].rank == 5 and stored[key].alpha == 2.0 for key in keys)
    assert all(stored[key].alpha == 1.0 for key in stored if key.endswith(("to_q", "to_v")))


GROUPS = {
    "attention": {"to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"},
    "transformer": {"proj_in", "proj_out", "net.0.proj", "net.2", "fc1", "fc2"},
    "linear": {"conv_shortcut", "time_emb_proj", "linear_1"},
    "convolution": {"conv1", "conv2", "conv_in", "conv"},
}


def test_the_groups_of_layers(components: Components) -> None:
    def ends(*targets: str) -> set[str]:
        names = {layer.name for layer in make(components, targets=targets, rank=1).stored()}
        return {
            end
            for ends in GROUPS.values()
            for end in ends
            if any(name.endswith(f".{end}") or name == end for name in names)
        }

    attention = ends("attention")
    assert attention == GROUPS["attention"]
    assert ends("transformer") == attention | GROUPS["transformer"]
    assert ends("linear") == attention | GROUPS["transformer"] | GROUPS["linear"]
    assert ends("convolution") == GROUPS["convolution"]


def test_dropout_is_the_same_again_for_the_same_seed(components: Components) -> None:
    adapter = make(components, dropout=0.5)
    adapter.attach()
    found = []
    with torch.no_grad():
        for seed in (1, 2, 1, None):
            adapter.masks.set(seed)
            found.append(call(components))
        adapter.eval()
        adapter.masks.set(1)
        plain = call(components)
    adapter.detach()
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert torch.equal(found[3], plain) and not torch.equal(found[0], plain)


def test_dropout_drops_that_share() -> None:
    """10,000 elements at 30 %: five standard deviations are 0.023; what stays is scaled, so the mean stays."""
    components = tiny.sd1()
    adapter = make(components, dropout=0.3)
    layer = next(iter(adapter.layers.values()))
    adapter.masks.set(7)
    dropped = layer._dropped(torch.ones(100, 100))  # type: ignore[operator]
    assert abs(float((dropped == 0).float().mean()) - 0.3) < 0.023
    assert torch.allclose(dropped[dropped != 0], torch.tensor(1 / 0.7))


BAD = {
    "rank is 0": {"rank": 0},
    "rank is True": {"rank": True},
    "alpha is nan; it should be a number above 0": {"alpha": float("nan")},
    "dropout is 1.0": {"dropout": 1.0},
    "kind is 'lroa'; it should be lora or lokr; did you mean lora": {"kind": "lroa"},
    r"ranks \(to_q\) is -1; it should be a whole number from 1": {"ranks": ("to_q=-1",)},
    r"ranks \(to_q\) is 2.5; it should be a whole number": {"ranks": ("to_q=2.5",)},
    "alphas is 'to_q'; it should be pattern=number": {"alphas": ("to_q",)},
    r"targets: 'attn2.to_kk' names no layer of unet; did you mean attn\d.to_k": {"targets": ("attn2.to_kk",)},
    "targets: 'atention' names no layer of unet; did you mean attention": {"targets": ("atention",)},
    "targets: empty": {"targets": ()},
    r"targets: the pattern '\(a\|' has a bracket that is not closed": {"targets": ("(a|",)},
    "networks: 'text_encoder_3' is no network of this model; it has unet, text_encoder": {
        "networks": ("text_encoder_3",)
    },
    "ranks: 'conv1' names no layer of the adapter": {"ranks": ("conv1=4",), "targets": ("attention",)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings(message: str) -> None:
    with pytest.raises(FastsdError, match=message):
        fields = {"networks": ("unet",)} | BAD[message]
        TrainableAdapter(tiny.sd1(), AdapterSettings(**fields), seed=0)  # type: ignore[arg-type]


def test_weights_in_fp8_are_refused() -> None:
    components = tiny.sd1()
    components.unet.mid_block.attentions[0].proj_in.quantize()  # type: ignore[operator, union-attr, index]
    with pytest.raises(FastsdError, match="fp8 cannot be trained on"):
        TrainableAdapter(components, AdapterSettings(), seed=0)


def test_a_copy_of_the_network_has_an_adapter_of_its_own(components: Components) -> None:
    adapter = make(components)
    adapter.attach()
    with torch.no_grad():
        expected = call(components)
        other = copy.deepcopy(components)
        adapter.detach()
        assert torch.equal(call(other), expected)
