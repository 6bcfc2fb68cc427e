"""Adapters that multiply a weight: OFT in three forms, GLoRA, and (IA)^3. Each makes W' from the checkpoint's W."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastsd.weights.adapters.roles import LayerOptions, Tensors


def rotated(base: torch.Tensor, parts: Tensors, options: LayerOptions) -> torch.Tensor | None:
    """The weight at strength 1, or None if the tensors are of no such adapter.

    Args:
        base, parts, options: as `fastsd.weights.adapters.arithmetic.adapted` takes them.

    Raises:
        ValueError, RuntimeError: the shapes do not fit.
    """
    for needs, change in _FORMS.items():
        if needs in parts:
            return change(base, parts, options)
    return None


def _scaled(base: torch.Tensor, parts: Tensors, options: LayerOptions) -> torch.Tensor:
    """LyCORIS's (IA)^3 (`modules/ia3.py`): W' = W (1 + w), w for each output or, where `on_input` is 1, each input."""
    on_input = bool(parts["on_input"]) if "on_input" in parts else False
    factors = 1 + _along(parts["scaling"], base, axis=int(on_input))
    return base * factors


def _scaled_by(base: torch.Tensor, parts: Tensors, options: LayerOptions) -> torch.Tensor:
    """PEFT's (IA)^3 (Liu et al. 2022, section 3.3): W' = W l, on the outputs; in feed-forward modules on the inputs."""
    inputs = options.feedforward and base.ndim > 1
    return base * _along(parts["factors"], base, axis=int(inputs))


def _along(vector: torch.Tensor, base: torch.Tensor, axis: int) -> torch.Tensor:
    """A vector of any shape, laid along one axis of `base`."""
    if vector.numel() != base.shape[axis]:
        raise ValueError(f"{vector.numel()} factors for {base.shape[axis]} channels")
    return vector.reshape([-1 if i == axis else 1 for i in range(base.ndim)])


def _generalised(base: torch.Tensor, parts: Tensors, options: LayerOptions) -> torch.Tensor:
    """GLoRA (Chavan et al. 2023) as LyCORIS has it: W' = W + (W A1 A2 + B1 B2) alpha / rank.

    LyCORIS before version 2 named the factors the other way round; their shapes tell.
    """
    a1, a2, b1, b2 = (parts[f"glora_{name}"] for name in ("a1", "a2", "b1", "b2"))
    rank, inputs = b2.shape[0], base.shape[1]
    if not (b1.shape[1] == rank == a2.shape[0] == a1.shape[1] and a1.shape[0] == inputs):
        a1, a2, b1, b2, rank = a2, a1, b2, b1, b1.shape[0]
    a1, a2, b1, b2 = (factor.flatten(1) for factor in (a1, a2, b1, b2))
    core = parts.get("glora_mid")
    columns = b2.shape[1] * (1 if core is None else core.shape[2:].numel())
    if (len(b1), columns) != (len(base), base.numel() // len(base)) or (len(a1), a2.shape[1]) != (inputs, inputs):
        raise ValueError(f"makes changes of {len(b1)} x {columns} and of {len(a1)} x {a2.shape[1]}")
    added = b1 @ b2 if core is None else torch.einsum("ijkl,oi,jc->ockl", core, b1, b2)
    product = torch.einsum("oi...,ij->oj...", base, a1 @ a2)
    scale = float(parts["alpha"]) / rank if "alpha" in parts else 1.0
    return base + (added.reshape(base.shape) + product) * scale


def _blocks(base: torch.Tensor, parts: Tensors, options: LayerOptions) -> torch.Tensor:
    """OFT (Qiu et al. 2023) and BOFT (Liu et al. 2023) on the outputs, as LyCORIS has them.

    Three dimensions are one block-diagonal rotation, `[blocks, b, b]`; four are the factors of a butterfly, one after
    another. `alpha` times the number of outputs bounds the norm of all generators together; 0 does not.
    """
    blocks = parts["oft_blocks"]
    count, rows, size = blocks.shape[-3:]
    if rows != size or count * size != len(base):
        raise ValueError(f"rotates {count} x {size} outputs by blocks of {rows} x {size}")
    skew = blocks - blocks.transpose(-1, -2)
    bound = float(parts["alpha"]) * len(base) if "alpha" in parts else 0.0
    norm = float(skew.norm()) + 1e-8
    if 0 < bound < norm:
        skew = skew * (bound / norm)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    rotation = torch.linalg.solve(eye - skew, eye + skew, left=False)
    weight = base
    if blocks.ndim == 3:
        weight = torch.einsum("knm,kn...->km...", rotation, weight.unflatten(0, (count, size))).flatten(0, 1)
    else:
        for i, factor in enumerate(rotation):
            stride = 2**i * (size // 2)
            mixed = weight.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2).unflatten(0, (count, size))
            mixed = torch.einsum("bij,bj...->bi...", factor, mixed).flatten(0, 1)
            weight = mixed.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    return weight if "rescale" not in parts else weight * _along(parts["rescale"], base, axis=0)


def _input_blocks(base: torch.Tensor, parts: Tensors, options: LayerOptions) -> torch.Tensor:
    """PEFT's OFT (`tuners/oft/layer.py`): W' = W R^T, R block-diagonal, from the upper triangles of its generators.

    R is Cayley's transform or, by default, the first terms of its Neumann series (Qiu et al. 2025, "OFTv2").
    """
    vectors, columns = parts["oft_vectors"], base.numel() // len(base)
    size = round((1 + (1 + 8 * vectors.shape[1]) ** 0.5) / 2)
    count = columns // size
    if size * (size - 1) // 2 != vectors.shape[1] or count * size != columns or len(vectors) not in (1, count):
        raise ValueError(f"rotates {len(vectors)} x {size} inputs")
    row, column = torch.triu_indices(size, size, 1, device=vectors.device)
    skew = vectors.new_zeros(len(vectors), size, size)
    skew[:, row, column] = vectors
    skew = skew - skew.transpose(1, 2)
    if options.bound is not None:
        norm, bound = skew.norm(dim=(1, 2), keepdim=True), options.bound / len(skew) ** 0.5
        skew = torch.where(norm <= bound, skew, skew * (bound / norm))
    rotation = _cayley(skew, options.terms).expand(count, -1, -1)
    weight = base.reshape(len(base), count, size)
    return torch.einsum("kij,okj->oki", rotation, weight).reshape(base.shape)


def _cayley(skew: torch.Tensor, terms: int | None) -> torch.Tensor:
    """(I - Q) (I + Q)^-1 as PEFT has it: exactly, or the beginning of the series I + 2Q + 2Q^2 + ... + Q^n.

    Args:
        skew: the generators Q, `[blocks, b, b]`.
        terms: PEFT's number of terms, by which n is terms - 1, but 3 for three terms; None: exactly.
    """
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    if terms is None:
        return torch.linalg.solve(eye + skew, eye - skew, left=False)
    highest = max(terms, 4) - 1 if terms > 2 else terms - 1
    total, power = eye, eye
    for i in range(1, highest + 1):
        power = power @ skew
        total = total + (power if i == highest and i > 2 else 2 * power)
    return total


_FORMS: dict[str, Callable[[torch.Tensor, Tensors, LayerOptions], torch.Tensor]] = {
    "scaling": _scaled,
    "factors": _scaled_by,
    "glora_a1": _generalised,
    "oft_blocks": _blocks,
    "oft_vectors": _input_blocks,
}
