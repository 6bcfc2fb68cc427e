"""An adapter in training: its parameters, put on a checkpoint's layers and taken off again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastsd.components import Components
from fastsd.errors import FastsdError, nearest
from fastsd.kernels.cpu import onednn
from fastsd.model.layers import Conv2d, Linear
from fastsd.train.adapters.changes import KINDS, WeightChange
from fastsd.train.adapters.layers import AdaptedLayer, AdaptedRows, MaskSeed
from fastsd.train.adapters.targets import LayerTarget, by_pattern, chosen
from fastsd.weights.adapters.write import StoredLayer

MAX_RANK = 1024


@dataclass(frozen=True)
class AdapterSettings:
    """What kind of adapter, of which layers.

    Attributes:
        kind: "lora" or "lokr".
        dora: DoRA's magnitudes beside the change.
        rank: of the change; alpha: the change is multiplied by alpha / rank.
        dropout: the share of a layer's input that the change does not see in training.
        networks: of the checkpoint, by the names of its folders.
        targets: the layers, see `fastsd.train.adapters.targets.chosen`.
        ranks, alphas: other values for the layers that a pattern names: "attn2.to_k=16".
        factor: of LoKr, the side of its first factor; -1: the square root.
    """

    kind: str = "lora"
    dora: bool = False
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    networks: tuple[str, ...] = ("unet",)
    targets: tuple[str, ...] = ("transformer",)
    ranks: tuple[str, ...] = ()
    alphas: tuple[str, ...] = ()
    factor: int = -1

    def check(self) -> None:
        """Raises FastsdError where a value is none that it could have."""
        if self.kind not in KINDS:
            raise FastsdError(
                f"it should be {' or '.join(KINDS)}{nearest(self.kind, KINDS)}", argument="kind", value=self.kind
            )
        for name, rank in (("rank", self.rank), *_named("ranks", self.ranks)):
            if type(rank) is not int or not 1 <= rank <= MAX_RANK:
                raise FastsdError(f"it should be a whole number from 1 to {MAX_RANK}", argument=name, value=rank)
        for name, alpha in (("alpha", self.alpha), *_named("alphas", self.alphas)):
            if not _is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:
                raise FastsdError("it should be a number above 0", argument=name, value=alpha)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise FastsdError("it should be a number from 0 to below 1", argument="dropout", value=self.dropout)
        if type(self.factor) is not int or (self.factor < 1 and self.factor != -1):
            raise FastsdError("it should be a whole number above 0, or -1", argument="factor", value=self.factor)


class TrainableAdapter(nn.Module):
    """The trainable parameters of an adapter for one checkpoint, whose weights stay as they are.

    At first it changes nothing, bit for bit in exact arithmetic: one factor of each change is zero.

    Args:
        components: the checkpoint. Its keys and parameters do not change.
        settings: which layers, and how.
        seed: of the initial values.

    Attributes:
        masks: to be set before each part of a step, where there is dropout.
        networks: those whose layers it changes.

    Raises:
        FastsdError: a target that the checkpoint lacks, weights in fp8.
    """

    def __init__(self, components: Components, settings: AdapterSettings, seed: int):
        super().__init__()
        settings.check()
        self.settings = settings
        targets = chosen(components, settings.networks, settings.targets)
        ranks = by_pattern("ranks", patterns("ranks", settings.ranks), targets)
        alphas = by_pattern("alphas", patterns("alphas", settings.alphas), targets)
        generator = torch.Generator("cpu").manual_seed(seed)
        owners: dict[str, list[tuple[LayerTarget, AdaptedRows]]] = {}
        for target in targets:
            key = f"{target.network}.{target.name}"
            rank, alpha = int(ranks.get(key, settings.rank)), float(alphas.get(key, settings.alpha))
            rows = _rows(target, settings, rank, alpha, generator)
            owners.setdefault(f"{target.network}.{target.path}", []).append((target, rows))
        self.layers = nn.ModuleDict()
        self._targets: list[tuple[LayerTarget, AdaptedRows]] = []
        self.masks = MaskSeed()
        for number, (name, parts) in enumerate(owners.items()):
            rows_only = [rows for _, rows in parts]
            layer = AdaptedLayer(parts[0][0].owner, rows_only, settings.dropout, self.masks, number)
            self.layers[name.replace(".", "/")] = layer.to(parts[0][0].owner.weight.device)
            self._targets += parts
        self.networks = tuple(dict.fromkeys(target.network for target in targets))

    def attach(self) -> None:
        """Put the adapter on the checkpoint's layers."""
        for layer in self._layers():
            layer.attach()

    def detach(self) -> None:
        """Take it off: the checkpoint computes as before."""
        for layer in self._layers():
            layer.detach()

    @torch.no_grad()
    def stored(self) -> Iterator[StoredLayer]:
        """What a file stores of each layer, in the model's order, fp32 on the CPU."""
        for target, rows in self._targets:
            change = rows.change
            tensors = change.tensors()
            if rows.magnitude is not None:
                tensors["magnitude"] = rows.magnitude.detach()
            tensors = {role: tensor.detach().float().cpu() for role, tensor in tensors.items()}
            alpha = change.rank * change.scale
            yield StoredLayer(target.network, target.name, target.source.shape, tensors, change.rank, alpha)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _layers(self) -> list[AdaptedLayer]:
        return list(self.layers.values())  # type: ignore[arg-type]


def _rows(
    target: LayerTarget, settings: AdapterSettings, rank: int, alpha: float, generator: torch.Generator
) -> AdaptedRows:
    owner: Linear | Conv2d = target.owner
    if owner.weight.dtype == torch.uint8:
        raise FastsdError("weights in fp8 cannot be trained on: load the model in another dtype", argument="dtype")
    place: dict[str, Any] = {}
    if isinstance(owner, Conv2d):
        place = {"stride": owner.stride, "padding": owner.padding}
    if settings.kind == "lokr":
        place["factor"] = settings.factor
    change: WeightChange = KINDS[settings.kind](target.source.shape, rank, alpha, generator, **place)
    weight = onednn.dense(owner.weight.detach())[target.source.rows] if settings.dora else None
    return AdaptedRows(change, target.source.rows, weight)


def patterns(argument: str, texts: Sequence[str]) -> dict[str, float]:
    """Texts "pattern=number" as a table.

    Raises:
        FastsdError: a text of another form.
    """
    table: dict[str, float] = {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            table[pattern] = int(number) if number.strip().lstrip("-").isdigit() else float(number)
        except ValueError:
            pattern = ""
        if not pattern:
            raise FastsdError("it should be pattern=number, such as attn2.to_k=16", argument=argument, value=text)
    return table


def _named(argument: str, texts: Sequence[str]) -> list[tuple[str, float]]:
    return [(f"{argument} ({pattern})", value) for pattern, value in patterns(argument, texts).items()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
