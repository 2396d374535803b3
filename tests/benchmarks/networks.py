"""ResNet18 and VGG16 for 32x32 images, blocks of ViT-B/16, and the shapes of their weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.models.resnet import ResNet18
from lightning_wgsef import GroupedLayer, Groups, Member

CLASSES = 10


def vgg16() -> nn.Module:
    """VGG16 with the small head that is usual for 32x32 images, without BatchNorm."""
    layers: list[nn.Module] = []
    width = 3
    for repeats, outputs in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(repeats):
            layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.ReLU()]
            width = outputs
        layers.append(nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)]
    return nn.Sequential(*layers, *head)


class Block(nn.Module):
    """A transformer block of ViT-B: width 768, 12 heads (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1)
        mixed = F.scaled_dot_product_attention(*split.permute(2, 0, 3, 1, 4))
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """ViT-B/16 with ``depth`` of its 12 blocks; without the class token, the mean is classified."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 768, 16, 16)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.head = nn.Linear(768, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


def shapes(name: str) -> Iterator[torch.Size]:
    """The shapes of all weights of convolutions and dense layers."""
    with torch.device("meta"):
        network = {"ResNet18": ResNet18, "VGG16": vgg16, "ViT-B/16": lambda: ViT(12)}[name]()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            yield layer.weight.shape


AXES = {"filter": 0, "channel": 1}


def weights(name: str, device: str = "cpu") -> list[Tensor]:
    """Random weights in these shapes."""
    generator = torch.Generator().manual_seed(0)
    return [(0.03 * torch.randn(s, generator=generator)).to(device) for s in shapes(name)]


def grouped(tensors: list[Tensor], kind: str) -> Groups:
    """Filters or channels of each tensor, with a quarter of them as its budget."""
    axis = AXES[kind]
    layers = []
    for number, tensor in enumerate(tensors):
        count = tensor.shape[axis]
        member = Member(f"{number}.weight", tensor, (axis,))
        layers.append(GroupedLayer(f"{number}", kind, count, (member,), budget=max(1, count // 4)))
    return Groups(layers)
