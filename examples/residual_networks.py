"""ResNet18 for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016), with a 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output, of its own width."""
        inner = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet18 with a 3x3 stem and no pooling behind it, as usual for images of 28 or 32 pixels.

    Args:
        channels: of the images.
        classes: how many there are.
    """

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        blocks, width = [], 64
        for outputs in (64, 128, 256, 512):
            blocks.append(ResidualBlock(width, outputs, 1 if width == outputs else 2))
            blocks.append(ResidualBlock(outputs, outputs, 1))
            width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, classes)."""
        x = images.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        x = relu(self.norm(self.conv(x)))
        return self.fc(self.blocks(x).mean((2, 3)))
