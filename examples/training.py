"""Train a network dense and pruned, and print what that did to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from examples.data.modules import InMemory
from examples.models.lenet import Classifier
from lightning_wgsef import WGSEFCallback, sparsity_report

LOGS = Path("lightning_logs")


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
