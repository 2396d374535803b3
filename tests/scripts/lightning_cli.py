"""A training script of one line, as users of LightningCLI write it: NAMESPACE, then its arguments.

Prints what the callback did as JSON, for the test that runs it.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wgsef import WGSEFCallback


def module_class(name: str) -> type:
    """Dense layers net.0, net.2 and net.4 of 4, 8 and 8 inputs, and their data."""

    class Small(import_module(name).LightningModule):
        def __init__(self, rate: float = 0.02) -> None:
            """Make the network.

            Args:
                rate: the learning rate.
            """
            super().__init__()
            torch.manual_seed(0)
            self.rate = rate
            self.net = nn.Sequential(
                nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
            )

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def train_dataloader(self) -> DataLoader:
            inputs = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
            return DataLoader(TensorDataset(inputs, inputs[:, :2]), batch_size=8)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.rate)

    return Small


def alive_columns(net: nn.Sequential) -> dict[str, int]:
    """How many columns of the grouped layers are not zero."""
    return {
        f"net.{layer}": int((net[layer].weight.detach().norm(dim=0) > 0).sum()) for layer in (2, 4)
    }


def main(name: str, arguments: list[str]) -> Any:
    cli = import_module(f"{name}.cli").LightningCLI(module_class(name), args=arguments)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, WGSEFCallback))
    (part,) = callback.regularizer.pruners
    alive = alive_columns(cli.model.net)
    print(json.dumps({"alive": alive, "taken": part.taken, "frozen": part.frozen}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
