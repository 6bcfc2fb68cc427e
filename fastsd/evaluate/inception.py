"""The Inception network whose features FID is defined on: Inception v3 as trained in 2015, with 1008 classes.

Szegedy et al. 2015, "Rethinking the Inception architecture", in the form of TensorFlow's graph of 2015-12-05: average
pools leave the border out of the mean, and the last block takes a maximum in place of one. Names of the parameters are
those of the public file `pt_inception-2015-12-05-*.pth`, which is read as tensors alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from fastsd.errors import FastsdError
from fastsd.files import reason

SIDE, FEATURES, CLASSES = 299, 2048, 1008
MAX_BYTES = 2**28  # the file has 91 MiB

# A convolution: output channels, height and width of the kernel, stride. Borders are padded where the stride is 1.
Spec = tuple[int, int, int, int]
# A branch: its convolutions by the end of their names. A pair, "_2a" and "_2b", both read what is before them, and are
# concatenated.
Branch = dict[str, Spec]


class InceptionConv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, spec: Spec, padded: bool):
        super().__init__()
        out, height, width, stride = spec
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False, dtype=torch.float32)
        self.bn = nn.BatchNorm2d(out, eps=0.001, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Branches side by side, and a pool: "average", "maximum", or "stride", a maximum at every second pixel."""

    def __init__(self, channels: int, branches: dict[str, Branch], pool: str, pooled: int = 0):
        super().__init__()
        self.pool, self.paths = pool, [[f"{name}{end}" for end in branch] for name, branch in branches.items()]
        for name, branch in branches.items():
            before = entering = channels
            for end, spec in branch.items():
                entering = entering if end.endswith("b") else before
                setattr(self, f"{name}{end}", InceptionConv(entering, spec, padded=spec[3] == 1))
                before = spec[0]
        if pooled:
            self.branch_pool = InceptionConv(channels, (pooled, 1, 1, 1), padded=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for path in self.paths:
            y = x
            for name in path:
                if name.endswith("b"):
                    continue
                if name.endswith("a"):
                    found += [getattr(self, name)(y), getattr(self, name[:-1] + "b")(y)]
                else:
                    y = getattr(self, name)(y)
            if not path[-1].endswith("b"):
                found.append(y)
        if self.pool == "stride":
            return torch.cat([*found, F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*found, self.branch_pool(pooled)], 1)


def _block_a(channels: int, pooled: int) -> InceptionBlock:
    branches = {
        "branch1x1": {"": (64, 1, 1, 1)},
        "branch5x5": {"_1": (48, 1, 1, 1), "_2": (64, 5, 5, 1)},
        "branch3x3dbl": {"_1": (64, 1, 1, 1), "_2": (96, 3, 3, 1), "_3": (96, 3, 3, 1)},
    }
    return InceptionBlock(channels, branches, "average", pooled)


def _block_b(channels: int) -> InceptionBlock:
    branches = {
        "branch3x3": {"": (384, 3, 3, 2)},
        "branch3x3dbl": {"_1": (64, 1, 1, 1), "_2": (96, 3, 3, 1), "_3": (96, 3, 3, 2)},
    }
    return InceptionBlock(channels, branches, "stride")


def _block_c(channels: int, inner: int) -> InceptionBlock:
    branches = {
        "branch1x1": {"": (192, 1, 1, 1)},
        "branch7x7": {"_1": (inner, 1, 1, 1), "_2": (inner, 1, 7, 1), "_3": (192, 7, 1, 1)},
        "branch7x7dbl": {
            "_1": (inner, 1, 1, 1),
            "_2": (inner, 7, 1, 1),
            "_3": (inner, 1, 7, 1),
            "_4": (inner, 7, 1, 1),
            "_5": (192, 1, 7, 1),
        },
    }
    return InceptionBlock(channels, branches, "average", 192)


def _block_d(channels: int) -> InceptionBlock:
    branches = {
        "branch3x3": {"_1": (192, 1, 1, 1), "_2": (320, 3, 3, 2)},
        "branch7x7x3": {"_1": (192, 1, 1, 1), "_2": (192, 1, 7, 1), "_3": (192, 7, 1, 1), "_4": (192, 3, 3, 2)},
    }
    return InceptionBlock(channels, branches, "stride")


def _block_e(channels: int, pool: str) -> InceptionBlock:
    branches = {
        "branch1x1": {"": (320, 1, 1, 1)},
        "branch3x3": {"_1": (384, 1, 1, 1), "_2a": (384, 1, 3, 1), "_2b": (384, 3, 1, 1)},
        "branch3x3dbl": {
            "_1": (448, 1, 1, 1),
            "_2": (384, 3, 3, 1),
            "_3a": (384, 1, 3, 1),
            "_3b": (384, 3, 1, 1),
        },
    }
    return InceptionBlock(channels, branches, pool, 192)


class FidInception(nn.Module):
    """Images to features and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = InceptionConv(3, (32, 3, 3, 2), padded=False)
        self.Conv2d_2a_3x3 = InceptionConv(32, (32, 3, 3, 1), padded=False)
        self.Conv2d_2b_3x3 = InceptionConv(32, (64, 3, 3, 1), padded=True)
        self.Conv2d_3b_1x1 = InceptionConv(64, (80, 1, 1, 1), padded=False)
        self.Conv2d_4a_3x3 = InceptionConv(80, (192, 3, 3, 1), padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_block_c(768, n) for n in (128, 160, 160, 192))
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, "average"), _block_e(2048, "maximum")
        self.fc = nn.Linear(FEATURES, CLASSES, dtype=torch.float32)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[N, 3, H, W]` in [0, 1] to features `[N, 2048]` and logits `[N, 1008]`.

        Images are resized to 299 x 299 without antialiasing and scaled to [-1, 1]. The logits have no bias, as in the
        program that defined the Inception score.
        """
        x = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False) * 2 - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        features = x.mean((2, 3))
        return features, F.linear(features, self.fc.weight)


def load_inception(path: Path) -> FidInception:
    """The network with the weights of a file: a `.pth` that holds tensors alone, or a `.safetensors`.

    Raises:
        FastsdError: the file cannot be read, holds anything but tensors, or the tensors of another network.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FastsdError("is larger than an Inception network", path=path)
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FastsdError(reason(error), path=path) from error
    except FastsdError:
        raise
    except Exception as error:  # what torch and safetensors raise on damaged files has no common class
        raise FastsdError("holds no weights, or more than tensors, and was not read", path=path) from error
    with torch.device("meta"):
        network = FidInception()
    wanted = {k: v.shape for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    tensors = isinstance(weights, dict) and all(isinstance(v, torch.Tensor) for v in weights.values())
    found = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")} if tensors else {}
    if {k: v.shape for k, v in found.items()} != wanted:
        raise FastsdError(
            "is not the Inception network of FID; its public file is pt_inception-2015-12-05-6726825d.pth", path=path
        )
    counters = {
        k: torch.zeros((), dtype=torch.int64, device="cpu")
        for k in network.state_dict()
        if k.endswith("num_batches_tracked")
    }
    network.load_state_dict({k: v.float() for k, v in found.items()} | counters, assign=True)
    return network.eval()
