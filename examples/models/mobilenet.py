"""MobileNetV1 for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Filters and stride of the thirteen separable convolutions.
STAGES = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class SeparableConvolution(nn.Sequential):
    """A 3x3 convolution of every channel alone and a 1x1 convolution, with BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al., 2017) with a stem of stride 1, as usual for small images.

    With 3 channels and 10 classes it has 3,217,226 weights.

    Args:
        channels: of the images.
        classes: how many there are.
        width: factor of the number of filters.
    """

    def __init__(self, channels: int = 3, classes: int = 10, *, width: float = 1.0) -> None:
        super().__init__()
        inputs = round(32 * width)
        self.conv = nn.Conv2d(channels, inputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(inputs)
        blocks = []
        for filters, stride in STAGES:
            outputs = round(filters * width)
            blocks.append(SeparableConvolution(inputs, outputs, stride))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, classes)."""
        x = images.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(self.blocks(x).mean((2, 3)))
