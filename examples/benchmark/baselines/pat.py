"""PAT of torchao: proximal steps on filters, by a hard budget or by the group lasso."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torchao.prototype.pat.optim import PruneOptimizer

from examples.benchmark.callbacks import total_steps
from examples.benchmark.method_api import Pruning, Situation, by_filter, count_rows, filters
from lightning_wgsef import group_parameters
from lightning_wgsef.training.schedules import in_steps


class CutToBudget(pl.Callback):
    """Sets the weakest rows of weights to zero when it is time."""

    def __init__(self, layers: dict[str, tuple[nn.Module, int]], freeze: float) -> None:
        self.layers, self.freeze = layers, freeze

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Cut after the last step before the freeze."""
        if trainer.global_step == in_steps("freeze", self.freeze, total_steps(trainer)):
            for layer, kept in self.layers.values():
                norms = layer.weight.flatten(1).norm(dim=1)
                weakest = norms.argsort()[: len(norms) - kept]
                layer.weight[weakest] = 0


class AfterClosure(PruneOptimizer):
    """PAT as in a plain loop: gradients are there when its step begins.

    Lightning hands over a closure that computes them within the step. PAT's "healing" would then
    mask the gradients of the step before, and in the first step of a resumed run nothing at all:
    all that was zero would come back.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compute the gradients, then step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        super().step()
        return loss


def pat_min_sparsity(situation: Situation, warm_up: float) -> Pruning:
    """PAT of torchao with a hard budget that falls along a cubic ramp.

    Args:
        situation: network, task and example.
        warm_up: share of training before it begins.
    """

    def settings(layer: nn.Module, kept: int) -> dict[str, Any]:
        rows = layer.weight.shape[0]
        return {
            "prox_type": "MinSparsityConstraint",
            "min_sparsity": max((rows - kept) / rows - 1e-9, 0.0),  # it takes the ceiling
            "min_sparsity_schedule": True,
        }

    return _pat(situation, settings, 0.0, warm_up)


def pat_lasso(situation: Situation, lam: float) -> Pruning:
    """PAT of torchao with the group lasso, cut to the budget before its "healing"."""
    pruning = _pat(situation, lambda *_: {"prox_type": "ProxGroupLasso"}, lam, 0.0)
    pruning.callbacks = [CutToBudget(filters(situation, situation.network), situation.task.freeze)]
    return pruning


def pat_global(situation: Situation, warm_up: float) -> Pruning:
    """PAT of torchao with one hard budget for the filters of all layers.

    They are ranked by the root mean square of their weights, and a layer may lose all of them.

    Args:
        situation: network, task and example.
        warm_up: share of training before it begins.
    """
    arguments = by_filter(situation, scope="global")
    groups = group_parameters(situation.network, **arguments)
    share = (len(groups) - float(groups.budgets.sum())) / len(groups)
    settings = {
        "prox_type": "GlobalMinSparsityConstraint",
        "min_sparsity": max(share - 1e-9, 0.0),  # it takes the ceiling
        "min_sparsity_schedule": True,
    }
    every = replace(situation, task=replace(situation.task, k=1.0))
    pruning = _pat(every, lambda *_: settings, 0.0, warm_up, joint=True)
    pruning.groups = arguments
    return pruning


def _pat(
    situation: Situation, settings: Any, lam: float, warm_up: float, joint: bool = False
) -> Pruning:
    def wrap(optimizer: Optimizer, network: nn.Module, steps: int) -> Optimizer:
        layers = filters(situation, network)
        pruned = {id(layer.weight) for layer, _ in layers.values()}
        (own,) = optimizer.param_groups
        shared = {key: value for key, value in own.items() if key != "params"}
        rest = [parameter for parameter in own["params"] if id(parameter) not in pruned]
        groups = [{**shared, "params": rest}]
        pieces = [([layer.weight], settings(layer, kept)) for layer, kept in layers.values()]
        if joint:
            pieces = [([weight for (weight,), _ in pieces], pieces[0][1])]
        for weights, own in pieces:
            groups.append({**shared, "group_type": "Dim0Grouper", **own, "params": weights})
        base = type(optimizer)(groups)
        return AfterClosure(
            base,
            warmup_steps=int(warm_up * steps),
            healing_start_step=in_steps("freeze", situation.task.freeze, steps),
            reg_lambda=lam,
        )

    return Pruning(wrap=wrap, groups=by_filter(situation), count=count_rows(situation))
