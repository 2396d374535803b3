"""VGG16 and VGG19 for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Width of the convolutions of each stage; a stage ends with max pooling.
STAGES = {
    16: ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)),
    19: ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)),
}


class VGG(nn.Module):
    """VGG (Simonyan and Zisserman, 2015) as usual for CIFAR: dense layers of 512, 512 and classes.

    Five max pools take 32 x 32 pixels to one; they round up, so that 28 x 28 end as one, too.
    There is no dropout. With BatchNorm, 3 channels and 10 classes VGG16 has 15,253,578 weights and
    VGG19 20,565,834; without BatchNorm 8,448 and 11,008 less.

    Args:
        depth: layers with weights, 16 or 19.
        channels: of the images.
        classes: how many there are.
        batch_norm: behind every convolution?
        width: factor of the number of filters and of dense units.

    Raises:
        ValueError: there is no such depth.
    """

    def __init__(
        self,
        depth: int = 16,
        channels: int = 3,
        classes: int = 10,
        *,
        batch_norm: bool = True,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"depth must be 16 or 19, got {depth}")
        layers: list[nn.Module] = []
        for filters, count in STAGES[depth]:
            for _ in range(count):
                outputs = round(filters * width)
                layers.append(nn.Conv2d(channels, outputs, 3, padding=1))
                layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if batch_norm else [nn.ReLU()]
                channels = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        units = round(512 * width)
        self.classifier = nn.Sequential(
            nn.Linear(channels, units),
            nn.ReLU(),
            nn.Linear(units, units),
            nn.ReLU(),
            nn.Linear(units, classes),
        )
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):  # torch's own start fades without BatchNorm
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, classes)."""
        x = images.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        return self.classifier(self.features(x).mean((2, 3)))
