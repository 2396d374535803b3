"""Residual networks for small images: ResNet18, ResNet20, ResNet56."""

from __future__ import annotations

from collections.abc import Sequence

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


class ResidualNetwork(nn.Module):
    """A 3x3 stem without pooling, stages of residual blocks, and global average pooling.

    Every stage but the first halves the image.

    Args:
        channels: of the images.
        classes: how many there are.
        widths: of the stages.
        blocks: in every stage.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        width = widths[0]
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages = []
        for outputs in widths:
            stages.append(ResidualBlock(width, outputs, 1 if width == outputs else 2))
            stages += [ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
            width = outputs
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, classes)."""
        x = images.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        x = relu(self.norm(self.conv(x)))
        return self.fc(self.blocks(x).mean((2, 3)))


class ResNet18(ResidualNetwork):
    """ResNet18 (He et al., 2016) as usual for images of 28 or 32 pixels: 11,173,962 weights.

    Args:
        channels: of the images.
        classes: how many there are.
    """

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__(channels, classes, (64, 128, 256, 512), blocks=2)


class CifarResNet(ResidualNetwork):
    """The networks of He et al. (2016), section 4.2: ResNet20, ResNet56 and so on.

    Where the shape changes the shortcut is a 1x1 convolution with BatchNorm (option B), so that
    the channels of each stage are one set. The paper pads with zeros there (option A): 2,752
    weights less. ResNet20 has 272,474 weights, ResNet56 855,770.

    Args:
        depth: layers with weights, 6 n + 2, those of the shortcuts not counted.
        channels: of the images.
        classes: how many there are.
        width: of the first stage; the others are twice and four times as wide.

    Raises:
        ValueError: there is no such depth.
    """

    def __init__(
        self, depth: int = 20, channels: int = 3, classes: int = 10, *, width: int = 16
    ) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6 n + 2: 8, 14, 20, .., got {depth}")
        super().__init__(channels, classes, (width, 2 * width, 4 * width), blocks=depth // 6)
