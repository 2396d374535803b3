"""The step in Adam's metric, against the same step in the identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from examples.models.resnet import ResNet18
from lightning_wgsef import WGSEF, Constant
from tests.benchmarks.measure import Rounds

METRICS = ("auto", "group", "identity")


class Trained:
    """A ResNet18 that Adam trains on random gradients, and the regularizer beside it."""

    def __init__(self, metric: str, kind: str) -> None:
        torch.manual_seed(0)
        self.model = ResNet18()
        for layer in self.model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.requires_grad_(False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.scales = [1e-3 * torch.randn_like(p).exp() for p in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3)
        self.regularizer = WGSEF(
            self.model, k=0.25, lam=Constant(1e-2), grouping=kind, metric=metric, freeze=None
        ).attach(self.optimizer)
        self.regularizer.detach()  # its steps are taken by hand
        self.train()
        for parameter, scale in zip(self.parameters, self.scales, strict=True):
            state = self.optimizer.state[parameter]  # as in the midst of training
            state["step"].fill_(1000)
            state["exp_avg_sq"].copy_(scale).square_()
        for _ in range(4):
            self.step()
            self.train()

    def train(self) -> None:
        """A step of Adam, so that weights, metric and warm start are those of a training run."""
        for parameter, scale in zip(self.parameters, self.scales, strict=True):
            parameter.grad = torch.randn_like(parameter) * scale
        self.optimizer.step()

    def step(self) -> None:
        self.regularizer.step(self.optimizer)


@pytest.mark.parametrize("kind", ["filter", "channel"])
def test_metric(benchmark: Any, kind: str) -> None:
    trained = {metric: Trained(metric, kind) for metric in METRICS}
    measured = Rounds(
        benchmark,
        {metric: trained[metric].step for metric in METRICS},
        each_round=lambda: [one.train() for one in trained.values()],
        rounds=9,
        warmup=1,
    )
    for metric in ("auto", "group"):
        measured.row(
            metric,
            "identity",
            target=4,
            case="metric of Adam",
            name=f"ResNet18, {kind}",
            what=f'WGSEF.step, constant lam, metric="{metric}", warm start',
            floor='WGSEF.step, metric="identity"',
        )
