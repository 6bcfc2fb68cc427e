"""What adapters add to a weight: LoRA, LoCon, LoHa, LoKr, plain differences; and DoRA's decomposition of the sum."""

from __future__ import annotations

import torch

from fastsd.weights.adapters.roles import DIMENSIONS, NO_OPTIONS, SCALARS, LayerOptions, Tensors
from fastsd.weights.adapters.rotations import rotated


def adapted(
    base: torch.Tensor, parts: Tensors, scale: float | None, options: LayerOptions = NO_OPTIONS
) -> torch.Tensor:
    """The weight that a layer has at strength 1.

    Args:
        base: fp32, `[out, in]`, `[out, in, k, k]`, or `[channels]` of a norm or a bias.
        parts: an adapter's tensors for this layer, by role (`fastsd.weights.adapters.roles`).
        scale: alpha / rank; None: from `parts`.
        options: what only PEFT's config says of the layer.

    Returns:
        fp32, the shape of `base`.

    Raises:
        ValueError: the tensors make no change of that shape; raised before memory is allocated for it.
    """
    _check(parts)
    base = parts.get("base", base).reshape(base.shape)
    if "replacement" in parts:
        return parts["replacement"].reshape(base.shape)
    form = next((form for form in _FORMS if form.needs <= parts.keys()), None)
    if form is None:
        changed = rotated(base, parts, options)
        if changed is None:
            raise ValueError("no known form of change")
        return changed
    rows, columns = form.size(parts)
    if (rows, columns) != (len(base), base.numel() // len(base)):
        raise ValueError(f"makes a change of {rows} x {columns}")
    weight = base + form.change(parts).reshape(base.shape) * form.scale(parts, scale)
    magnitude = parts.get("magnitude", parts.get("magnitude_of_outputs"))
    return weight if magnitude is None else _with_magnitude(weight, magnitude, "magnitude_of_outputs" in parts)


def _check(parts: Tensors) -> None:
    """Each role has its numbers of dimensions, none of length 0; they are checked before any size is used."""
    for role, part in parts.items():
        low, high = DIMENSIONS.get(role, (1, 4))
        if not low <= part.ndim <= high or not part.numel():
            wanted = str(low) if low == high else f"{low} to {high}"
            raise ValueError(f"its {role} is {list(part.shape)}; it should have {wanted} dimensions, none of length 0")
        if role in SCALARS and part.numel() != 1:
            raise ValueError(f"its {role} is {list(part.shape)}; it should be one number")


class _Difference:
    """The tensor is the change itself; LyCORIS's "full" and "norm"."""

    needs = {"difference"}

    def size(self, parts: Tensors) -> tuple[int, int]:
        return _matrix(parts["difference"])

    def change(self, parts: Tensors) -> torch.Tensor:
        return parts["difference"]

    def scale(self, parts: Tensors, peft_scale: float | None) -> float:
        return 1.0


class _LowRank(_Difference):
    """LoRA (Hu et al. 2021, equation 3): up @ down. A convolution's kernel is in down, or in the Tucker core mid."""

    needs = {"up", "down"}

    def size(self, parts: Tensors) -> tuple[int, int]:
        kernel = parts["mid"].shape[2:].numel() if "mid" in parts else 1
        return len(parts["up"]), _matrix(parts["down"])[1] * kernel

    def change(self, parts: Tensors) -> torch.Tensor:
        up, down = parts["up"].flatten(1), parts["down"].flatten(1)
        return up @ down if "mid" not in parts else torch.einsum("ijkl,oi,jc->ockl", parts["mid"], up, down)

    def scale(self, parts: Tensors, peft_scale: float | None) -> float:
        return _alpha_over(parts, len(parts["down"]), peft_scale)


class _Embedding(_LowRank):
    """PEFT's LoRA of a table of token embeddings, `[tokens, channels]`: the transpose of up @ down."""

    needs = {"embedding_up", "embedding_down"}

    def size(self, parts: Tensors) -> tuple[int, int]:
        return parts["embedding_down"].shape[1], len(parts["embedding_up"])

    def change(self, parts: Tensors) -> torch.Tensor:
        return (parts["embedding_up"] @ parts["embedding_down"]).t()

    def scale(self, parts: Tensors, peft_scale: float | None) -> float:
        return _alpha_over(parts, len(parts["embedding_down"]), peft_scale)


class _AddedBias(_Difference):
    """The bias of a LoRA's second matrix (PEFT's `lora_bias`), scaled like the matrix."""

    needs = {"up_bias"}

    def size(self, parts: Tensors) -> tuple[int, int]:
        return _matrix(parts["up_bias"])

    def change(self, parts: Tensors) -> torch.Tensor:
        return parts["up_bias"]

    def scale(self, parts: Tensors, peft_scale: float | None) -> float:
        return 1.0 if peft_scale is None else peft_scale


class _Hadamard(_Difference):
    """LoHa (Hyeon-Woo et al. 2022, "FedPara", proposition 2): the elementwise product of two low-rank matrices."""

    needs = {"w1_a", "w1_b", "w2_a", "w2_b"}

    def size(self, parts: Tensors) -> tuple[int, int]:
        first, second = (_product_size(parts[f"w{i}_a"], parts[f"w{i}_b"], parts.get(f"t{i}")) for i in (1, 2))
        if first != second:
            raise ValueError(f"multiplies {first[0]} x {first[1]} by {second[0]} x {second[1]} elementwise")
        return first

    def change(self, parts: Tensors) -> torch.Tensor:
        first = _product(parts["w1_a"], parts["w1_b"], parts.get("t1"))
        return first * _product(parts["w2_a"], parts["w2_b"], parts.get("t2"))

    def scale(self, parts: Tensors, peft_scale: float | None) -> float:
        return _alpha_over(parts, len(parts["w1_b"]), peft_scale)


class _Kronecker(_Difference):
    """LoKr (Yeh et al. 2024, "LyCORIS", section 3.3): the Kronecker product of two factors, each full or low-rank."""

    def __init__(self, first: set[str], second: set[str]):
        self.needs = first | second

    def size(self, parts: Tensors) -> tuple[int, int]:
        rows, columns = 1, 1
        for factor in ("1", "2"):
            full, core = parts.get(f"kron_w{factor}"), parts.get(f"kron_t{factor}")
            if full is not None:
                size = _matrix(full)
            else:
                size = _product_size(parts[f"kron_w{factor}_a"], parts[f"kron_w{factor}_b"], core)
            rows, columns = rows * size[0], columns * size[1]
        return rows, columns

    def change(self, parts: Tensors) -> torch.Tensor:
        factors = []
        for factor in ("1", "2"):
            full = parts.get(f"kron_w{factor}")
            if full is None:
                a, b = parts[f"kron_w{factor}_a"], parts[f"kron_w{factor}_b"]
                full = _product(a, b.flatten(1), parts.get(f"kron_t{factor}"))
            factors.append(full)
        first, second = factors
        return torch.kron(first.reshape(*first.shape, *(1,) * (second.ndim - first.ndim)), second.contiguous())

    def scale(self, parts: Tensors, peft_scale: float | None) -> float:
        low = [parts[name] for name in ("kron_w1_b", "kron_w2_b") if name in parts]
        if low or peft_scale is not None:
            return _alpha_over(parts, len(low[0]) if low else 1, peft_scale)
        return 1.0  # LyCORIS: without a rank, alpha has no meaning


_FIRST = ({"kron_w1"}, {"kron_w1_a", "kron_w1_b"})
_SECOND = ({"kron_w2"}, {"kron_w2_a", "kron_w2_b"})
_FORMS = (
    _Difference(),
    _LowRank(),
    _Embedding(),
    _AddedBias(),
    _Hadamard(),
    *(_Kronecker(a, b) for a in _FIRST for b in _SECOND),
)


def _matrix(x: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a weight; the columns of a convolution are its input channels times its kernel."""
    return len(x), x.numel() // max(len(x), 1)


def _product_size(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None) -> tuple[int, int]:
    """Rows and columns of `_product`."""
    rows, columns = len(a), _matrix(b)[1]
    return (rows, columns) if core is None else (a.shape[1], columns * core.shape[2:].numel())


def _product(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """a @ b; or with a Tucker core `[i, j, k, k]`, a `[i, out]` and b `[j, in]`."""
    return a @ b if core is None else torch.einsum("ijkl,ip,jr->prkl", core, a, b)


def _alpha_over(parts: Tensors, rank: int, peft_scale: float | None) -> float:
    """alpha / rank; 1 if neither file nor config gives alpha."""
    if peft_scale is not None:
        return peft_scale
    return float(parts["alpha"]) / rank if "alpha" in parts else 1.0


def _with_magnitude(weight: torch.Tensor, magnitude: torch.Tensor, of_outputs: bool) -> torch.Tensor:
    """DoRA (Liu et al. 2024, equation 5): the direction of `weight`, with a learned norm per output or per input."""
    if of_outputs or magnitude.ndim == 1 or magnitude.shape[0] != 1 or weight.shape[0] == 1:
        norms = weight.flatten(1).norm(dim=1).view(-1, *(1,) * (weight.ndim - 1))
        return weight * (magnitude.reshape(norms.shape) / norms)
    norms = weight.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *(1,) * (weight.ndim - 2))
    return weight * (magnitude.reshape(norms.shape) / norms)
