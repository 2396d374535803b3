"""Prune, then train on: the network with its zeros, and the one without them.

    python -m examples.fine_tune

Both start from files that the first training wrote: a checkpoint of Lightning, of which the mask is
kept (the network has its old shape and its zeros), and the slim network, which is a plain smaller
network. On the digits of scikit-learn; a few seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from examples.data.modules import Digits
from examples.models.lenet import SmallConvNet
from examples.training import Classifier, accuracy, quiet_trainer
from lightning_wgsef import WGSEFCallback
from lightning_wgsef.slimming.files import load_slim

GROUPING: dict[str, Any] = {"grouping": "structure", "example_input": torch.zeros(2, 1, 8, 8)}


def main() -> None:
    """Train three times, and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("fine_tune"))
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    checkpoint, small = options.folder / "pruned.ckpt", options.folder / "small.safetensors"
    options.folder.mkdir(parents=True, exist_ok=True)
    data = Digits(batch_size=64)

    pl.seed_everything(0, verbose=False)
    model = Classifier(SmallConvNet())
    pruning = WGSEFCallback(k=0.25, **GROUPING, slim_to=small)
    trainer = train(model, data, options.epochs, [pruning])
    trainer.save_checkpoint(checkpoint)
    show("pruned", model, data)

    model = Classifier(SmallConvNet())
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    keep = WGSEFCallback(**GROUPING, masks=checkpoint)
    train(model, data, options.epochs, [keep])
    show("fine-tuned with its zeros", model, data)

    model = load_slim(small, lambda: Classifier(SmallConvNet()))
    train(model, data, options.epochs, [])
    show("fine-tuned without them", model, data)


def train(model: pl.LightningModule, data: Digits, epochs: int, callbacks: list[Any]) -> pl.Trainer:
    """One training on the CPU."""
    trainer = quiet_trainer(epochs, callbacks)
    trainer.fit(model.train(), data)
    return trainer


def show(name: str, model: nn.Module, data: Digits) -> None:
    """Print the test accuracy and the number of weights."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    alive = sum(int(parameter.count_nonzero()) for parameter in model.parameters())
    score = accuracy(model, data.test_dataloader())
    print(f"{name}: {score:.1f} % right, {alive:,} of {weights:,} weights alive")


if __name__ == "__main__":
    main()
