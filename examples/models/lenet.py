"""LeNet-5 and other small networks of convolutions in a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu


class SmallConvNet(nn.Module):
    """Three convolutions with BatchNorm and global average pooling, for 8 x 8 grey digits."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1, stride=2, bias=False)
        self.norm3 = nn.BatchNorm2d(third)
        self.fc = nn.Linear(third, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, 10)."""
        x = relu(self.norm1(self.conv1(images)))
        x = relu(self.norm2(self.conv2(x)))
        x = relu(self.norm3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling, for 28 x 28 grey images.

    Args:
        widths: Filters of conv1 and conv2, units of fc1 and fc2.
    """

    def __init__(self, widths: Sequence[int] = (6, 16, 120, 84)) -> None:
        super().__init__()
        first, second, third, fourth = widths
        self.conv1 = nn.Conv2d(1, first, 5, padding=2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * 5 * 5, third)
        self.fc2 = nn.Linear(third, fourth)
        self.fc3 = nn.Linear(fourth, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, 10)."""
        x = max_pool2d(relu(self.conv1(images)), 2)
        x = max_pool2d(relu(self.conv2(x)), 2)
        x = relu(self.fc1(x.flatten(1)))
        x = relu(self.fc2(x))
        return self.fc3(x)


class LeNet5BatchNorm(nn.Module):
    """LeNet-5 with a BatchNorm before every ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.norm2 = nn.BatchNorm2d(16)
        self.fc1 = nn.Linear(400, 120)
        self.norm3 = nn.BatchNorm1d(120)
        self.fc2 = nn.Linear(120, 84)
        self.norm4 = nn.BatchNorm1d(84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, 10)."""
        x = max_pool2d(relu(self.norm1(self.conv1(images))), 2)
        x = max_pool2d(relu(self.norm2(self.conv2(x))), 2)
        x = relu(self.norm3(self.fc1(x.flatten(1))))
        x = relu(self.norm4(self.fc2(x)))
        return self.fc3(x)


class FiveLayerBatchNorm(nn.Module):
    """Five stages of convolution, BatchNorm and ReLU for 32 x 32 colour images.

    Stages 1 to 4 halve the image by max pooling (before ReLU: the same values for a quarter of the
    work); global average pooling and one dense layer follow.

    Args:
        widths: Filters of the five convolutions.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 128, 128)) -> None:
        super().__init__()
        first, second, third, fourth, fifth = widths
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(third)
        self.conv4 = nn.Conv2d(third, fourth, 3, padding=1, bias=False)
        self.norm4 = nn.BatchNorm2d(fourth)
        self.conv5 = nn.Conv2d(fourth, fifth, 3, padding=1, bias=False)
        self.norm5 = nn.BatchNorm2d(fifth)
        self.fc = nn.Linear(fifth, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, 10)."""
        x = images.contiguous(memory_format=torch.channels_last)  # saves 40 % of a step on a CPU
        x = relu(max_pool2d(self.norm1(self.conv1(x)), 2))
        x = relu(max_pool2d(self.norm2(self.conv2(x)), 2))
        x = relu(max_pool2d(self.norm3(self.conv3(x)), 2))
        x = relu(max_pool2d(self.norm4(self.conv4(x)), 2))
        x = relu(self.norm5(self.conv5(x)))
        return self.fc(x.mean((2, 3)))
