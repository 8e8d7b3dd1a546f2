"""I3D, whose logits FVD compares: Inception-v1 inflated to video, trained on Kinetics-400 (arXiv 1705.07750).

FVD is the Fréchet distance between those logits (Unterthiner et al., arXiv 1812.01717). Names and numerics are those
that published FVDs are computed with: the weights `i3d_pretrained_400.pt` of VideoGPT, TATS and cd-fvd, whole pictures
resized to 224x224, colours in [-1, 1]. They judge single frames more than motion (Ge et al., arXiv 2404.12391).
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from .network_file import fill, read_state_dict

SIDE = 224
MIN_FRAMES = 9
"""Below these, too few are left for the last pooling."""
NUM_CLASSES = 400

Sizes = tuple[int, int, int]

INCEPTION = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
"""Channels of each block: branch 0, the two layers of branches 1 and 2, branch 3."""
POOLED_BEFORE = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


class I3d(nn.Module):
    """Logits of clips; a network of random weights until `load`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, (7, 7, 7), (2, 2, 2))
        self.Conv3d_2b_1x1 = _Unit(64, 64, (1, 1, 1))
        self.Conv3d_2c_3x3 = _Unit(64, 192, (3, 3, 3))
        channels = 192
        for name, sizes in INCEPTION.items():
            self.add_module(name, _Inception(channels, sizes))
            channels = sizes[0] + sizes[2] + sizes[4] + sizes[5]
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(channels, NUM_CLASSES, 1)})

    @classmethod
    def load(cls, path: Path) -> Self:
        network = cls()
        fill(network, read_state_dict(path), path, "the I3D of FVD, i3d_pretrained_400.pt")
        return network

    def forward(self, video: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b 400"]:
        x = self.Conv3d_1a_7x7(_prepared(video))
        x = self.Conv3d_2b_1x1(_max_pool(x, (1, 3, 3), (1, 2, 2)))
        x = self.Conv3d_2c_3x3(x)
        for name in INCEPTION:
            if name in POOLED_BEFORE:
                x = _max_pool(x, *POOLED_BEFORE[name])
            x = self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits["conv3d"](x).mean((2, 3, 4))


class _Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: Sizes, stride: Sizes = (1, 1, 1)) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(channels, width, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(width, eps=1e-5)

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b d t2 h2 w2"]:
        return F.relu(self.bn(self.conv3d(_padded(x, self.kernel, self.stride))))


class _Inception(nn.Module):
    def __init__(self, channels: int, sizes: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        point, cube = (1, 1, 1), (3, 3, 3)
        self.b0 = _Unit(channels, sizes[0], point)
        self.b1a, self.b1b = _Unit(channels, sizes[1], point), _Unit(sizes[1], sizes[2], cube)
        self.b2a, self.b2b = _Unit(channels, sizes[3], point), _Unit(sizes[3], sizes[4], cube)
        self.b3b = _Unit(channels, sizes[5], point)

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b d t h w"]:
        pooled = _max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


def _max_pool(x: Float[Tensor, "b c t h w"], kernel: Sizes, stride: Sizes) -> Float[Tensor, "b c t2 h2 w2"]:
    return F.max_pool3d(_padded(x, kernel, stride), kernel, stride)  # zeros change no maximum behind a ReLU


def _padded(x: Float[Tensor, "b c t h w"], kernel: Sizes, stride: Sizes) -> Float[Tensor, "b c t2 h2 w2"]:
    """Zeros around it, as TensorFlow's "SAME" has them: as many results as strides begin, the odd zero behind."""
    padding: list[int] = []
    for size, width, step in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(0, (-(-size // step) - 1) * step + width - size)
        padding = [total // 2, total - total // 2, *padding]  # torch wants the last axis first
    return F.pad(x, padding)


def _prepared(video: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b 3 f 224 224"]:
    frames = video.flatten(0, 1).movedim(-1, 1).float()
    resized = F.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return (resized / 127.5 - 1).unflatten(0, video.shape[:2]).movedim(1, 2)
