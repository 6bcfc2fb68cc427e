"""One row of the sampler's table on the device, eagerly or as the replay of one captured graph.

What a graph must not fix is in buffers: the state with its table and row, the row's time embedding, keys and values of
the text, guidance. So one graph serves every sampler, number of steps, prompt, seed, guidance scale and strength.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import nn

from fastsd.graph import graph_key
from fastsd.kernels.advance import advance, guidance_rescale
from fastsd.model.call_options import PLAIN, CallOptions
from fastsd.model.controlnet import ControlNet
from fastsd.model.unet import UNet
from fastsd.sampling.advance import SamplerState

MAX_ROWS = 3072  # of a captured table: 1000 steps of a sampler that calls the network three times


@dataclass(eq=False)
class Conditioning:
    """What a network is given beside the latent.

    Attributes:
        time: of each row `[1 or UNet samples, sum of channels]`, the projected time embeddings.
        key_values: of every cross-attention, `[UNet samples, L, 2, heads, D]` each, then those of image prompts, see
            `UNet.denoise`. Between two rows another tuple of
            the same shapes may replace it.
    """

    time: Sequence[torch.Tensor]
    key_values: tuple[torch.Tensor, ...] = ()

    def buffers(self, row: int) -> Conditioning:
        """A copy for one row."""
        return Conditioning([self.time[row].clone()], tuple(x.clone() for x in self.key_values))


@dataclass(frozen=True, eq=False)
class GuidanceScales:
    """What combines the outputs of an image's UNet samples in a row.

    Attributes:
        guidance: `[1]` fp32, or None: one sample.
        image_guidance: `[1]` fp32 of three samples, see `fastsd.kernels.advance.guided`; or None.
        rescale: `[1]` fp32, the share of guidance rescaling, or None.
    """

    guidance: torch.Tensor | None = None
    image_guidance: torch.Tensor | None = None
    rescale: torch.Tensor | None = None

    @property
    def parts(self) -> int:
        """UNet samples of each image."""
        return 1 if self.guidance is None else 2 if self.image_guidance is None else 3

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.guidance, self.image_guidance, self.rescale


@dataclass(eq=False)
class ActiveControl:
    """A ControlNet that takes part in the current row.

    Attributes:
        hint: `[1, h, w, C]`, its image after its first layers.
        weight: `[1]` fp32.
    """

    net: ControlNet
    conditioning: Conditioning
    hint: torch.Tensor
    weight: torch.Tensor


@dataclass(eq=False)
class StepInputs:
    """The tensors that a row reads and writes.

    Attributes:
        state: the sampler's; while a graph works on this batch, its tensors are the graph's buffers.
        conditioning: the UNet's in the current row.
        scales: of the current row.
        extra_channels: what the UNet reads beside the latent, `[UNet samples, h, w, channels]`, or None. A row with
            fewer samples reads the last of them.
        controls: the ControlNets that take part in the current row.
        adapter: the maps that T2I-Adapters add to the UNet's levels in the current row, `[1, h, w, C]` each.
        options: what the UNet does otherwise in the current row.
    """

    state: SamplerState
    conditioning: Conditioning
    scales: GuidanceScales = GuidanceScales()
    extra_channels: torch.Tensor | None = None
    controls: tuple[ActiveControl, ...] = ()
    adapter: tuple[torch.Tensor, ...] = ()
    options: CallOptions = PLAIN
    _keys: dict[Hashable, Hashable] = field(default_factory=dict, repr=False)  # of graphs, by what differs in a row

    def constants(self) -> Iterator[torch.Tensor | None]:
        """What stays the same over the rows."""
        yield from (self.extra_channels, self.options.freeu)
        for control in self.controls:
            yield from (control.hint, control.weight)

    def conditionings(self) -> list[Conditioning]:
        """The UNet's, then the ControlNets'."""
        return [self.conditioning, *(control.conditioning for control in self.controls)]


def denoise_row(unet: UNet, inputs: StepInputs, row: int) -> torch.Tensor:
    """Call the UNet and update the latent. Nothing here depends on a number of the host but `row`, of the times.

    Returns:
        The UNet's output, `[UNet samples, h, w, C]`: of the unconditional samples first.
    """
    state, scales, parts = inputs.state, inputs.scales, inputs.scales.parts
    dtype = unet.conv_in.weight.dtype
    latent = torch.cat([state.x_in] * parts) if parts > 1 else state.x_in
    residuals: list[torch.Tensor] | None = None
    for control in inputs.controls:
        given = control.conditioning
        added = control.net.denoise(latent.to(dtype), given.time[row], given.key_values, control.hint, control.weight)
        residuals = added if residuals is None else [a + b for a, b in zip(residuals, added, strict=True)]
    if inputs.extra_channels is not None:
        latent = torch.cat([latent, inputs.extra_channels[-len(latent) :]], dim=-1)
    out = unet.denoise(
        latent.to(dtype),
        inputs.conditioning.time[row],
        inputs.conditioning.key_values,
        residuals,
        inputs.adapter,
        inputs.options,
    )
    scale = 1.0 if scales.guidance is None else scales.guidance
    image = scales.image_guidance
    rescale = None if scales.rescale is None else guidance_rescale(out, scale, scales.rescale, image)
    advance(out=out, guidance=scale, rescale=rescale, image_guidance=image, **state.operands())
    state.row += 1
    return out


class CapturedStep:
    """A row captured on buffers of its own, which one batch at a time owns."""

    def __init__(self, unet: UNet, inputs: StepInputs):
        """Buffers of the shapes of `inputs`, with its contents."""

        def copy(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.clone()

        row = inputs.state.index

        def copy_control(control: ActiveControl) -> ActiveControl:
            # A graph must not keep a ControlNet alive that its owner gave up: the key holds addresses of weights,
            # which are never seen again once they are freed, unless equal shapes land in the very same places.
            net = cast(ControlNet, weakref.proxy(control.net))
            return ActiveControl(net, control.conditioning.buffers(row), control.hint.clone(), control.weight.clone())

        self.unet = unet
        self.buffers = StepInputs(
            inputs.state.copy(MAX_ROWS),
            inputs.conditioning.buffers(row),
            GuidanceScales(*map(copy, inputs.scales.tensors())),
            copy(inputs.extra_channels),
            tuple(map(copy_control, inputs.controls)),
            tuple(x.clone() for x in inputs.adapter),
            inputs.options.buffers(),
        )
        self._owner: Callable[[], StepInputs | None] = lambda: None
        # Whose contents the buffers hold:
        self._key_values: list[tuple[torch.Tensor, ...]] = []
        self._scales: GuidanceScales | None = None
        self._adapter: tuple[torch.Tensor, ...] = ()

    @staticmethod
    def key(unet: UNet, inputs: StepInputs) -> Hashable:
        """Equal for batches that one capture serves: the same networks and backend, tensors of the same shapes."""
        networks = (unet, *(control.net for control in inputs.controls))
        which = (inputs.scales.parts, len(inputs.adapter), inputs.options.key, *map(id, networks))
        if which not in inputs._keys:  # a key reads the address of every weight
            inputs._keys[which] = CapturedStep._make_key(networks, inputs)
        return inputs._keys[which]

    @staticmethod
    def _make_key(networks: Sequence[nn.Module], inputs: StepInputs) -> Hashable:
        tensors = (*inputs.scales.tensors(), *inputs.constants(), *inputs.adapter)
        shapes: list[Hashable] = [None if x is None else (tuple(x.shape), x.dtype) for x in tensors]
        for conditioning in inputs.conditionings():
            time = conditioning.time[inputs.state.index]
            shapes += [tuple(time.shape), *(tuple(x.shape) for x in conditioning.key_values)]
        return ("step", inputs.options.key, *map(graph_key, networks), tuple(inputs.state.x.shape), tuple(shapes))

    def run(self) -> torch.Tensor:
        """The row that is captured."""
        return denoise_row(self.unet, self.buffers, 0)

    def load(self, inputs: StepInputs) -> None:
        """Make the buffers those of `inputs` for its current row, after saving the state of the batch before it.

        A batch whose networks change from row to row moves between graphs: it may have owned these buffers before, and
        its state be elsewhere since.
        """
        owner, buffers = self._owner(), self.buffers
        if owner is not inputs or inputs.state.x is not buffers.state.x:
            if owner is not None and owner is not inputs and owner.state.x is buffers.state.x:
                owner.state = owner.state.copy()
            _copy_all(buffers.constants(), inputs.constants())
            buffers.state.load(inputs.state)
            inputs.state = replace(buffers.state, host_table=inputs.state.host_table, index=inputs.state.index)
            self._owner, self._key_values = weakref.ref(inputs), [() for _ in inputs.conditionings()]
            self._scales, self._adapter = None, ()
        if self._scales is not inputs.scales:
            _copy_all(buffers.scales.tensors(), inputs.scales.tensors())
            self._scales = inputs.scales
        if self._adapter is not inputs.adapter:
            _copy_all(buffers.adapter, inputs.adapter)
            self._adapter = inputs.adapter
        if inputs.options.deep is not None and buffers.options.deep is not None and inputs.options.deep.reuses:
            buffers.options.deep.features.copy_(inputs.options.deep.features)
        for i, (own, given) in enumerate(zip(buffers.conditionings(), inputs.conditionings(), strict=True)):
            if self._key_values[i] is not given.key_values:
                _copy_all(own.key_values, given.key_values)
                self._key_values[i] = given.key_values
            own.time[0].copy_(given.time[inputs.state.index])

    def give_back(self, inputs: StepInputs) -> None:
        """After a replay: what later rows, of other graphs, read of this one."""
        own, given = self.buffers.options.deep, inputs.options.deep
        if own is not None and given is not None and not given.reuses:
            given.features.copy_(own.features)


def _copy_all(buffers: Iterable[torch.Tensor | None], given: Iterable[torch.Tensor | None]) -> None:
    for buffer, x in zip(buffers, given, strict=True):
        if buffer is not None and x is not None:
            buffer.copy_(x)
