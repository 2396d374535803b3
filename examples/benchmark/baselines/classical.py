"""Classical baselines in a few lines, on the same groups as the package's own method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from examples.benchmark.method_api import Situation
from lightning_wgsef import (
    GroupLasso,
    Groups,
    HalfSpace,
    WGSEFCallback,
    group_parameters,
    prox_multipliers,
    slim,
)


def smaller_network(situation: Situation) -> nn.Module:
    """A network of the widths that the budget leaves, with fresh weights."""
    network = copy.deepcopy(situation.network)
    groups = group_parameters(network, **situation.groups())
    groups.scale_(_first(groups))
    small = slim(network, situation.example)
    for module in small.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return small


def _first(groups: Groups) -> Tensor:
    """1 for as many of the first groups of every layer as its budget admits, 0 for the others."""
    masks = [torch.arange(layer.count) < layer.budget for layer in groups.layers]
    return torch.cat(masks).to(groups.dtype)


class Masking(pl.Callback):
    """What masks weights after every step, and goes on after a stop.

    Attributes:
        taken: number of steps.
        mask: 1 for groups that stay, 0 for others; None before the first.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.mask: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken, and the mask."""
        return {"taken": self.taken, "mask": self.mask}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.taken, self.mask = state_dict["taken"], state_dict["mask"]


class GradualMagnitude(Masking):
    """Gradual magnitude pruning (Zhu and Gupta, 2017, equation 1), on groups.

    After every step only the k(t) strongest groups of each layer stay, where the number that died,
    ``groups - k(t) = (groups - k) * (1 - (1 - t)^3)``, grows over the first ``length`` of training;
    then the mask is fixed. Groups that were cut may come back until then.

    Args:
        length: share of training after which the mask is fixed.
        groups: what `group_parameters` takes.
    """

    def __init__(self, length: float = 0.5, **groups: Any) -> None:
        super().__init__()
        self.length, self.arguments = length, groups

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act after every step of the first optimizer."""
        groups = group_parameters(pl_module, **self.arguments)
        counts = torch.tensor(groups.counts, dtype=torch.float64)
        last = max(1, round(self.length * trainer.estimated_stepping_batches))

        def after_step(*_: object) -> None:
            self.taken += 1
            if self.taken <= last or self.mask is None:
                left = (1 - min(self.taken / last, 1)) ** 3
                budgets = groups.budgets + (counts - groups.budgets) * left
                self.mask = prox_multipliers(
                    groups.norms(), 1.0, budgets, segments=groups.segments, debias=1.0
                )
            groups.scale_(self.mask.to(groups.device))

        trainer.optimizers[0].register_step_post_hook(after_step)


def prox_sgd(lam: float, **groups: Any) -> WGSEFCallback:
    """ProxSGD with the group lasso: after every step all norms shrink by learning rate times lam.

    Args:
        lam: weight of the penalty.
        groups: what `WGSEFCallback` takes to make groups; filters by default. There is no budget.
    """
    return WGSEFCallback(**_group_lasso(lam, groups))


def hspg(lam: float, epsilon: float, start: int | float, **groups: Any) -> WGSEFCallback:
    """HSPG (Chen et al., 2020, arXiv 2009.12078): ProxSGD, then half-space steps.

    The trial point of a half-space step is where ProxSGD would go. The paper's takes the penalty's
    gradient instead of its proximal step; the two differ in second order of the learning rate, and
    more only for groups that one step could take to zero.

    Args:
        lam: weight of the penalty.
        epsilon: see `HalfSpace`.
        start: when half-space steps begin: steps (int), or share of training (float).
        groups: see `prox_sgd`.
    """
    return WGSEFCallback(half_space=HalfSpace(epsilon, start), **_group_lasso(lam, groups))


def classification_loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of a network's logits on a batch (inputs, labels)."""
    inputs, labels = batch
    return cross_entropy(network(inputs), labels)


class AdaHSPG(WGSEFCallback):
    r"""AdaHSPG+ (Dai et al., 2023, TMLR): variance-reduced proximal steps and half-space steps.

    Epochs 0, 2, 4, ... are proximal; the gradient on a batch B is replaced by the variance-reduced

    .. math:: \nabla f_B(\theta) - \nabla f_B(\bar\theta) + \nabla f(\bar\theta)

    where the snapshot :math:`\bar\theta` is what the weights were when the epoch started (SVRG,
    Johnson and Zhang, 2013). Epochs 1, 3, 5, ... take half-space steps, see `hspg`.

    The published algorithm chooses the kind of step from optimality measures and adapts its
    parameters to them. Chosen here instead: the kinds alternate by epochs; half-space steps use the
    plain gradient; epsilon starts at 0, a half-space epoch in which less than 1 % of the groups
    became zero halves its distance to 1 (up to ``highest``), and a proximal epoch that brought back
    a group halves epsilon.

    The snapshot is a copy of the network, in the mode of training but with its own running
    statistics; it sees each batch under the random numbers of the training step, which are left as
    they were. A proximal epoch costs as much as three plain ones. Gradients of batches cannot be
    accumulated. A run is resumed at the end of an epoch.

    Args:
        lam: weight of the penalty.
        highest: what epsilon stays below or at, in [0, 1).
        loss: the training loss of a network on a batch.
        network: the module's attribute that holds the network.
        groups: see `prox_sgd`.

    Attributes:
        epsilon: of the half-space steps now, or of the next ones.
        half_space_epoch: are half-space steps taken now?
    """

    def __init__(
        self,
        lam: float,
        highest: float = 0.9,
        *,
        loss: Callable[[nn.Module, Any], Tensor] = classification_loss,
        network: str = "network",
        **groups: Any,
    ) -> None:
        super().__init__(half_space=HalfSpace(highest, start=1), **_group_lasso(lam, groups))
        self.highest, self.loss, self.network = highest, loss, network
        self.epsilon = 0.0
        self.half_space_epoch = False
        self._zero: Tensor | None = None
        self._snapshot: nn.Module | None = None
        self._full: list[Tensor] = []
        self._batch: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Of the regularizer, with epsilon and who was zero."""
        return {**super().state_dict(), "epsilon": self.epsilon, "zero": self._zero}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        own = {name: value for name, value in state_dict.items() if name == "attachments"}
        super().load_state_dict(own)
        self.epsilon, self._zero = state_dict["epsilon"], state_dict["zero"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change the kind of step."""
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"accumulate_grad_batches must be 1, got {trainer.accumulate_grad_batches}"
            )
        regularizer = self.regularizer
        assert regularizer is not None
        self._adapt(regularizer.groups.norms() == 0)
        self.half_space_epoch = trainer.current_epoch % 2 == 1
        # What is attached reads it when it is made, and loading a state makes it anew.
        regularizer.half_space = HalfSpace(self.epsilon, 1) if self.half_space_epoch else None
        regularizer.load_state_dict(regularizer.state_dict())
        self._snapshot = None
        if not self.half_space_epoch:
            self._snapshot = copy.deepcopy(getattr(pl_module, self.network))
            self._full = self._full_gradient(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The snapshot's gradient on the batch that comes next."""
        if self._snapshot is not None:
            with torch.random.fork_rng():
                self._batch = self._gradient(batch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Reduce the gradient's variance."""
        if self._snapshot is None:
            return
        weights = [p for p in getattr(pl_module, self.network).parameters() if p.requires_grad]
        for parameter, batch, full in zip(weights, self._batch, self._full, strict=True):
            if parameter.grad is not None:
                parameter.grad.sub_(batch).add_(full)

    def _adapt(self, zero: Tensor) -> None:
        before, self._zero = self._zero, zero
        if before is None:
            return
        if self.half_space_epoch and (zero & ~before).sum() < 0.01 * len(zero):
            self.epsilon = min((1 + self.epsilon) / 2, self.highest)
        elif not self.half_space_epoch and bool((before & ~zero).any()):
            self.epsilon /= 2

    def _full_gradient(self, trainer: pl.Trainer) -> list[Tensor]:
        """Over the batches of the epoch that begins."""
        total: list[Tensor] = []
        count = 0
        with torch.random.fork_rng():
            for batch in copy.copy(trainer.train_dataloader):  # the original counts its epochs
                size = len(batch[0])
                count += size
                part = self._gradient(trainer.strategy.batch_to_device(batch))
                sums = [size * gradient for gradient in part]
                total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        return [gradient / count for gradient in total]

    def _gradient(self, batch: Any) -> list[Tensor]:
        assert self._snapshot is not None
        weights = [p for p in self._snapshot.parameters() if p.requires_grad]
        loss = self.loss(self._snapshot, batch)
        return list(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))


def _group_lasso(lam: float, groups: dict[str, Any]) -> dict[str, Any]:
    fixed = {"k": 1.0, "lam": lam, "penalty": GroupLasso(), "freeze": None}
    return {**fixed, "grouping": "filter", **groups}
