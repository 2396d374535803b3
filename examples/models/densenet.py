"""DenseNet40 for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

LAYERS = 12  # of each of the three dense blocks


class DenseLayer(nn.Module):
    """Adds channels to those that come in."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the channels that came in, and the new ones."""
        return torch.cat([x, self.conv(relu(self.norm(x)))], 1)


class Transition(nn.Module):
    """Halves the image; the number of channels stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns an image of half the size."""
        return avg_pool2d(self.conv(relu(self.norm(x))), 2)


class DenseNet40(nn.Module):
    """DenseNet of 40 layers (Huang et al., 2017) for small images, without bottlenecks.

    With 3 channels and 10 classes it has 1,019,722 weights.

    Args:
        channels: of the images.
        classes: how many there are.
        growth: channels that every layer adds.
    """

    def __init__(self, channels: int = 3, classes: int = 10, *, growth: int = 12) -> None:
        super().__init__()
        width = 16
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for block in range(3):
            if block:
                blocks.append(Transition(width))
            for _ in range(LAYERS):
                blocks.append(DenseLayer(width, growth))
                width += growth
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, classes)."""
        x = images.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        return self.fc(relu(self.norm(self.blocks(self.conv(x)))).mean((2, 3)))
