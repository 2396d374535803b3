"""A small one-stage detector in the manner of YOLO, without anchors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, softplus


class Convolution(nn.Sequential):
    """A convolution with BatchNorm and SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
        )


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, and a shortcut where ``shortcut``."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.first = Convolution(width, width)
        self.second = Convolution(width, width)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Returns as many channels."""
        inner = self.second(self.first(x))
        return x + inner if self.shortcut else inner


class CSP(nn.Module):
    """A cross-stage partial block (Wang et al., 2020), as in YOLOv8.

    Half of the channels pass through bottlenecks, every one of which is heard at the end.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        self.enter = Convolution(inputs, outputs, 1)
        self.blocks = nn.ModuleList(Bottleneck(outputs // 2, shortcut) for _ in range(blocks))
        self.leave = Convolution(outputs // 2 * (2 + blocks), outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``outputs`` channels."""
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling (He et al., 2015) by three poolings in a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = Convolution(width, width // 2, 1)
        self.leave = Convolution(4 * (width // 2), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns as many channels."""
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(max_pool2d(parts[-1], 5, 1, 2))
        return self.leave(torch.cat(parts, 1))


class Head(nn.Module):
    """Boxes and logits of the classes at every place of a feature map."""

    def __init__(self, width: int, classes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.boxes = nn.Sequential(Convolution(width, width), nn.Conv2d(width, 4, 1))
        self.classes = nn.Sequential(Convolution(width, width), nn.Conv2d(width, classes, 1))
        last = self.classes[-1]
        nn.init.constant_(last.bias, -4.0)  # few of the places have an item

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, places, 4 + classes), boxes as corners in pixels."""
        distances = self.stride * softplus(self.boxes(x)).flatten(2).transpose(1, 2)
        centres = places(x.shape[2], x.shape[3], self.stride).to(x)
        corners = torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], 2)
        return torch.cat([corners, self.classes(x).flatten(2).transpose(1, 2)], 2)


def places(rows: int, columns: int, stride: int) -> Tensor:
    """Centres x, y in pixels of the places of a feature map, row by row.

    >>> places(1, 2, 8)
    tensor([[ 4.,  4.],
            [12.,  4.]])
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return (torch.stack([x, y], 2).flatten(0, 1) + 0.5) * stride


class YOLO(nn.Module):
    """CSP blocks down to a sixteenth of the image, SPPF, a neck up and down again, three heads.

    As it is without arguments it has 929,434 weights.

    Args:
        channels: of the images, whose sides are multiples of 16.
        classes: how many there are.
        width: filters of the first convolution; at the end there are eight times as many.
    """

    strides = (4, 8, 16)

    def __init__(self, channels: int = 1, classes: int = 10, *, width: int = 16) -> None:
        super().__init__()
        fine, middle, coarse = 2 * width, 4 * width, 8 * width
        self.stem = Convolution(channels, width, stride=2)
        self.stage1 = nn.Sequential(Convolution(width, fine, stride=2), CSP(fine, fine))
        self.stage2 = nn.Sequential(Convolution(fine, middle, stride=2), CSP(middle, middle))
        self.stage3 = nn.Sequential(
            Convolution(middle, coarse, stride=2), CSP(coarse, coarse), SPPF(coarse)
        )
        self.up2 = CSP(coarse + middle, middle, shortcut=False)
        self.up1 = CSP(middle + fine, fine, shortcut=False)
        self.shrink1 = Convolution(fine, fine, stride=2)
        self.down2 = CSP(fine + middle, middle, shortcut=False)
        self.shrink2 = Convolution(middle, middle, stride=2)
        self.down3 = CSP(middle + coarse, coarse, shortcut=False)
        self.heads = nn.ModuleList(
            Head(width, classes, stride)
            for width, stride in zip((fine, middle, coarse), self.strides, strict=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns (batch, places, 4 + classes): corners x1, y1, x2, y2 in pixels, then logits."""
        x = images.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        fine = self.stage1(self.stem(x))
        middle = self.stage2(fine)
        coarse = self.stage3(middle)
        middle = self.up2(torch.cat([interpolate(coarse, scale_factor=2.0), middle], 1))
        fine = self.up1(torch.cat([interpolate(middle, scale_factor=2.0), fine], 1))
        middle = self.down2(torch.cat([self.shrink1(fine), middle], 1))
        coarse = self.down3(torch.cat([self.shrink2(middle), coarse], 1))
        maps = (fine, middle, coarse)
        return torch.cat([head(x) for head, x in zip(self.heads, maps, strict=True)], 1)
