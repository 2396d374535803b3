"""Plain training loops and networks that trainings under Lightning are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wgsef import WGSEFCallback
from lightning_wgsef.training.schedules import Schedule
from tests.helpers.groups import batches, dense_network
from tests.helpers.oracles import envelope as oracle
from tests.helpers.trainers import make_trainer

RATE = 0.02
K = 2
LAM = 10.0


class Recorded(Schedule):
    """A constant lam that remembers the learning rate of every proximal step, from ``first`` on."""

    def __init__(self, lam: float = LAM, first: int = 0) -> None:
        self.lam = lam
        self.first = first
        self.rates: list[float] = []

    def step_size(self, taken: int, total: int | None, lr: float | Tensor) -> float | Tensor:
        assert taken == self.first + len(self.rates)
        self.rates.append(float(lr))
        return lr * self.lam


class Dense(pl.LightningModule):
    """The dense network of the plain loops; columns of net.2 and net.3 compete."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = dense_network(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return sgd(self.net)


def sgd(net: nn.Module, **arguments: Any) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), **{"lr": RATE, "momentum": 0.9, **arguments})


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean()


def data(count: int, dtype: torch.dtype = torch.float64, batch_size: int = 16) -> DataLoader:
    """The batches of `helpers.batches`, in their order."""
    inputs, targets = (torch.cat(parts) for parts in zip(*batches(count, dtype), strict=True))
    return DataLoader(TensorDataset(inputs, targets), batch_size)


def single(count: int) -> list[list[tuple[Tensor, Tensor]]]:
    return [[batch] for batch in batches(count)]


def fit(
    model: pl.LightningModule, count: int, callback: Any = None, **arguments: Any
) -> tuple[Recorded, pl.Trainer]:
    """One epoch of ``count`` batches under a callback that takes the paper's steps."""
    schedule = Recorded()
    callback = callback or WGSEFCallback(k=K, lam=schedule, freeze=None)
    trainer = make_trainer([callback], **{"max_epochs": 1, **arguments})
    trainer.fit(model, data(count))
    return schedule, trainer


def slow_prox(net: nn.Sequential, rate: float = RATE, layers: Iterable[int] = (2, 3)) -> None:
    """The proximal step on the columns of layers, from the definition."""
    for layer in layers:
        weight = net[layer].weight
        norms = weight.detach().norm(dim=0).double().numpy()
        ones = np.ones_like(norms)
        factors = np.asarray(oracle.prox_multipliers(norms, rate * LAM, K, ones, ones, 0.0))
        with torch.no_grad():
            weight.mul_(torch.as_tensor(factors.astype(np.float64)).to(weight.dtype))


def slow_loop(
    steps: Iterable[Iterable[tuple[Tensor, Tensor]]],
    net: nn.Sequential | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    prox: Callable[..., None] = slow_prox,
) -> nn.Sequential:
    """Every step: the mean gradient of its batches, the optimizer, then the proximal step."""
    net = dense_network() if net is None else net
    optimizer = sgd(net) if optimizer is None else optimizer
    for parts in steps:
        optimizer.zero_grad()
        parts = list(parts)
        for batch in parts:
            (loss_of(net, batch) / len(parts)).backward()
        optimizer.step()
        prox(net)
    return net


def assert_same(ours: nn.Module, twin: nn.Module, tolerance: float = 1e-9) -> None:
    """The same weights, of which the same are exactly zero."""
    expected = twin.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=1e-3 * tolerance)
        assert torch.equal(value == 0, expected[name] == 0), name


def alive(net: nn.Sequential) -> list[list[int]]:
    """The columns that are not zero, of every layer whose columns compete."""
    return [net[layer].weight.detach().norm(dim=0).nonzero().flatten().tolist() for layer in (2, 3)]
