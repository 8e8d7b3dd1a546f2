"""LPIPS: how different two pictures look, by the features of an image classifier (Zhang et al., arXiv 1801.03924).

Version 0.1 of the authors' release, on AlexNet or VGG16. Weights are given as two files: the classifier's in
torchvision's names (`alexnet-owt-….pth`, `vgg16-….pth`) and the linear heads (`alex.pth`, `vgg.pth` of LPIPS). Which
network it is follows from the files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from configs.loader import UserError

from .network_file import fill, read_state_dict

FRAMES_AT_ONCE = 8
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of colours in [-1, 1]
EPSILON = 1e-10


def alexnet_features() -> nn.Sequential:
    """Names and numerics of torchvision's `alexnet().features`."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def vgg16_features() -> nn.Sequential:
    """Names and numerics of torchvision's `vgg16().features`, up to its last ReLU."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Backbone:
    name: str
    features: Callable[[], nn.Sequential]
    read_after: tuple[int, ...]  # layers whose results are compared
    channels: tuple[int, ...]  # of those
    first_kernel: int  # by which its file is recognised
    smallest_side: int  # pixels below which nothing would be left to compare


BACKBONES = (
    Backbone("AlexNet", alexnet_features, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 11, 31),
    Backbone("VGG16", vgg16_features, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 3, 16),
)


class Lpips(nn.Module):
    """Distances between pictures, from 0 on; a network of random weights until `load`."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = backbone.features()
        self.heads = nn.ModuleDict({_head(place): _Head(channels) for place, channels in enumerate(backbone.channels)})

    @classmethod
    def load(cls, backbone_path: Path, heads_path: Path) -> Lpips:
        found = read_state_dict(backbone_path)
        kernel = found["features.0.weight"].shape[-1] if "features.0.weight" in found else None
        backbone = next((one for one in BACKBONES if one.first_kernel == kernel), None)
        if backbone is None:
            names = " or ".join(one.name for one in BACKBONES)
            raise UserError(f"{backbone_path}: is no {names}; give a file with its weights in torchvision's names.")
        network = cls(backbone)
        prefix = "features."
        features = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        fill(network.features, features, backbone_path, f"the {backbone.name} of torchvision")
        fill(network.heads, read_state_dict(heads_path), heads_path, f"the heads of LPIPS for {backbone.name}")
        return network.eval().requires_grad_(False)

    def forward(self, x: UInt8[Tensor, "n h w 3"], y: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n"]:
        parts = zip(x.split(FRAMES_AT_ONCE), y.split(FRAMES_AT_ONCE), strict=True)
        return torch.cat([self._distances(*part) for part in parts])

    def _distances(self, x: UInt8[Tensor, "n h w 3"], y: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n"]:
        of_both = torch.cat([_scaled(x), _scaled(y)])
        distances = torch.zeros(len(x), device=x.device)
        for number, layer in enumerate(self.features):
            of_both = layer(of_both)
            if number in self.backbone.read_after:
                head = self.heads[_head(self.backbone.read_after.index(number))]
                directions = of_both / (torch.linalg.vector_norm(of_both, dim=1, keepdim=True) + EPSILON)
                of_x, of_y = directions.chunk(2)
                distances = distances + head((of_x - of_y).square()).mean((1, 2, 3))
        return distances


class _Head(nn.Module):
    """A weight per channel; its names are those of the release, which had dropout as item 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 h w"]:
        return self.model(x)


def _head(place: int) -> str:
    return f"lin{place}"


def _scaled(pictures: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n 3 h w"]:
    shift, scale = (torch.tensor(numbers, device=pictures.device) for numbers in (SHIFT, SCALE))
    return ((pictures.float() / 127.5 - 1 - shift) / scale).movedim(-1, 1)
