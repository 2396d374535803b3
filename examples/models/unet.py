"""A small U-Net, and the LightningModule that trains it to find garments in noisy images.

data = FashionMNIST("data/fashion-mnist")
trainer.fit(Segmenter(UNet()), data)
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, max_pool2d
from torchmetrics.classification import BinaryJaccardIndex

from examples.data.modules import FashionMNIST
from examples.training import Batch


class TwoConvolutions(nn.Sequential):
    """Two 3x3 convolutions with BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class UNet(nn.Module):
    """U-Net (Ronneberger et al., 2015), two levels deep, with padding and BatchNorm.

    As it is without arguments it has 117,073 weights.

    Args:
        channels: of the images, whose sides are multiples of 4.
        classes: logits for every pixel.
        width: filters at full resolution; below there are twice and four times as many.
    """

    def __init__(self, channels: int = 1, classes: int = 1, *, width: int = 16) -> None:
        super().__init__()
        self.down1 = TwoConvolutions(channels, width)
        self.down2 = TwoConvolutions(width, 2 * width)
        self.bottom = TwoConvolutions(2 * width, 4 * width)
        self.enlarge2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up2 = TwoConvolutions(4 * width, 2 * width)
        self.enlarge1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up1 = TwoConvolutions(2 * width, width)
        self.pixels = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, classes, height, width)."""
        x = images.contiguous(memory_format=torch.channels_last)  # faster on a CPU
        first = self.down1(x)
        second = self.down2(max_pool2d(first, 2))
        x = self.enlarge2(self.bottom(max_pool2d(second, 2)))
        x = self.enlarge1(self.up2(torch.cat([second, x], 1)))
        return self.pixels(self.up1(torch.cat([first, x], 1)))


class Segmenter(pl.LightningModule):
    """Finds the pixels of the garment in Fashion-MNIST under noise.

    The target is where the clean pixel is above 0.1 of white; the network sees the normalised image
    plus Gaussian noise. Logs train/loss, val/iou and test/iou: intersection over union of what is
    marked and what is the garment, over all pixels of the set.

    Args:
        network: Gives one logit a pixel, (batch, 1, height, width).
        lr: Learning rate of Adam.
        noise: Standard deviation of the noise, in those of the data.
    """

    def __init__(self, network: nn.Module, lr: float = 1e-3, *, noise: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="network")
        self.network = network
        self.lr = lr
        self.noise = noise
        self.val_iou = BinaryJaccardIndex()
        self.test_iou = BinaryJaccardIndex()

    def forward(self, images: Tensor) -> Tensor:
        """Returns the network's logits."""
        return self.network(images)

    def target(self, images: Tensor) -> Tensor:
        """Which pixels of clean, normalised images belong to the garment."""
        return images > (0.1 - FashionMNIST.mean[0]) / FashionMNIST.std[0]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the mean binary cross-entropy of the pixels."""
        images, _ = batch
        logits = self(images + self.noise * torch.randn_like(images))
        loss = binary_cross_entropy_with_logits(logits, self.target(images).float())
        self.log("train/loss", loss, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts the pixels."""
        self._count(self.val_iou, batch, batch_idx)
        self.log("val/iou", self.val_iou, prog_bar=True, batch_size=len(batch[0]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts the pixels."""
        self._count(self.test_iou, batch, batch_idx)
        self.log("test/iou", self.test_iou, batch_size=len(batch[0]))

    def _count(self, iou: BinaryJaccardIndex, batch: Batch, batch_idx: int) -> None:
        images, _ = batch
        # Every evaluation sees the same noise, on every device.
        generator = torch.Generator().manual_seed(batch_idx)
        noise = torch.randn(images.shape, generator=generator).to(images)
        logits = self(images + self.noise * noise)
        iou.update((logits > 0).int(), self.target(images).int())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), self.lr)
