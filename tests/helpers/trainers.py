"""Small real modules and Trainers for the callback's tests, in either namespace of Lightning."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from examples.data.modules import Digits

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


def namespace(name: str) -> ModuleType:
    return import_module(name)


def make_module(name: str = "pytorch_lightning", optimizer: str = "adam") -> Any:
    """A classifier of 8 x 8 digits: conv, norm, conv, norm, dense."""

    class Digit(namespace(name).LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
            self.bn1 = nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
            self.bn2 = nn.BatchNorm2d(12)
            self.fc = nn.Linear(12, 10)

        def forward(self, images: Tensor) -> Tensor:
            x = torch.relu(self.bn1(self.conv1(images)))
            x = torch.relu(self.bn2(self.conv2(x)))
            return self.fc(x.mean((2, 3)))

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if optimizer == "sgd":
                return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    namespace(name).seed_everything(0, verbose=False)
    return Digit()


def make_trainer(callbacks: list[Any], name: str = "pytorch_lightning", **arguments: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return namespace(name).Trainer(callbacks=callbacks, **{**defaults, **arguments})


def loader(batch_size: int = 64) -> Any:
    """Training batches of the digits: 20 an epoch at the default size."""
    data = Digits(batch_size=batch_size)
    data.setup("fit")
    return data.train_dataloader()


def alive(model: nn.Module) -> dict[str, int]:
    """Input channels that are not all zero, by layer."""
    weights = {"conv2": model.conv2.weight, "fc": model.fc.weight}
    return {
        layer: int((weight.detach().transpose(0, 1).flatten(1).norm(dim=1) > 0).sum())
        for layer, weight in weights.items()
    }
