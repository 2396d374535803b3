"""Training of classifiers: the LightningModule, accuracies, and dense against pruned."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from examples.data.batches import Batches
from examples.data.modules import InMemory
from lightning_wgsef import WGSEFCallback, sparsity_report

Batch = tuple[Tensor, Tensor]
LOGS = Path("lightning_logs")


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
        self.save_hyperparameters(ignore=["network", "teacher"])
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


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of right answers in percent, in evaluation mode; the mode is restored."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    pairs = ((images.to(device), labels.to(device)) for images, labels in batches)
    right = torch.stack([(model(images).argmax(1) == labels).sum() for images, labels in pairs])
    model.train(training)
    return 100 * int(right.sum()) / len(batches.labels)


def train(
    network: nn.Module,
    data: InMemory,
    epochs: int,
    lr: float,
    name: str,
    callback: pl.Callback | None = None,
) -> float:
    """Train ``network`` with a progress bar and TensorBoard; its test accuracy in percent."""
    # Data in memory needs no worker processes, whatever Lightning thinks of that.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    torch.set_flush_denormal(True)  # shrinking weights become denormal, which is slow
    model = Classifier(network, lr=lr)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback] if callback else [],
        logger=TensorBoardLogger(LOGS, name=name),
        log_every_n_steps=10,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data)
    (metrics,) = trainer.test(model, data, verbose=False)
    return 100 * metrics["test/accuracy"]


def quiet_trainer(
    epochs: int, callbacks: list[pl.Callback | None], limit_batches: int | float = 1.0
) -> pl.Trainer:
    """A Trainer on the CPU that writes and shows nothing."""
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback for callback in callbacks if callback is not None],
        limit_train_batches=limit_batches,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def compare(
    make_network: Callable[[], nn.Module],
    data: InMemory,
    epochs: int,
    lr: float,
    name: str,
    callback: WGSEFCallback,
) -> None:
    """Train dense, train again with ``callback``, and print accuracies and the sparsity table."""
    pl.seed_everything(0)
    dense = train(make_network(), data, epochs, lr, f"{name}-dense")
    pl.seed_everything(0)
    network = make_network()
    sparse = train(network, data, epochs, lr, f"{name}-sparse", callback)
    regularizer = callback.regularizer
    assert regularizer is not None
    example = torch.zeros(1, *data.image_shape)
    print(f"\n{sparsity_report(regularizer.model, regularizer.groups, example)}")
    print(f"\ntest accuracy: dense {dense:.1f} %, sparse {sparse:.1f} %")
    print(f"the curves: tensorboard --logdir {LOGS}")
