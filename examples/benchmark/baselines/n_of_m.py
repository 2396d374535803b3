"""Patterns n:m by magnitude: cut once, and SR-STE."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from examples.benchmark.baselines.classical import Masking
from examples.benchmark.callbacks import strongest, total_steps
from lightning_wgsef import group_parameters
from lightning_wgsef.training.schedules import in_steps


class MagnitudeOnce(Masking):
    """Magnitude pruning to n:m in one cut, as torch.ao's `WeightNormSparsifier` does it.

    Args:
        freeze: share of training after which the largest n of every m are kept, and the mask fixed.
        groups: what `group_parameters` takes.
    """

    def __init__(self, freeze: float, **groups: Any) -> None:
        super().__init__()
        self.freeze, self.arguments = freeze, groups

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act after every step of the first optimizer."""
        groups = group_parameters(pl_module, **self.arguments)
        last = in_steps("freeze", self.freeze, total_steps(trainer))

        def after_step(*_: object) -> None:
            self.taken += 1
            if self.taken >= last and self.mask is None:
                self.mask = strongest(groups)
            if self.mask is not None:
                groups.scale_(self.mask)

        trainer.optimizers[0].register_step_post_hook(after_step)


class SRSTE(pl.Callback):
    r"""SR-STE (Zhou et al., "Learning N:M fine-grained structured sparse neural networks", 2021).

    Forward and backward see :math:`\tilde W = \mathcal E \odot W`, where the mask E keeps the
    largest n of every m and is computed anew at every step; the gradient passes straight through to
    the dense W, and what is masked decays (the paper's equation 9):

    .. math:: W \leftarrow W - \gamma\,(g(\tilde W) + \lambda_W\,(1 - \mathcal E) \odot W).

    Between steps the parameters hold W̃, so that everybody sees the network that is meant.

    Args:
        decay: :math:`\lambda_W`.
        groups: what `group_parameters` takes.
    """

    def __init__(self, decay: float, **groups: Any) -> None:
        self.decay, self.arguments = decay, groups
        self.dense: list[Tensor] = []
        self._weights: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """The dense weights."""
        return {"dense": self.dense}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.dense = state_dict["dense"]

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask after every step of the first optimizer."""
        groups = group_parameters(pl_module, **self.arguments)
        self._weights = [member.parameter for x in groups.layers for member in x.members]

        def after_step(*_: object) -> None:
            self.dense = [weight.detach().clone() for weight in self._weights]
            groups.scale_(strongest(groups))

        if not self.dense:
            after_step()
        trainer.optimizers[0].register_step_post_hook(after_step)

    @torch.no_grad()
    def on_before_optimizer_step(self, *_: object) -> None:
        """Let the masked weights decay, and the step be one of the dense weights."""
        for weight, dense in zip(self._weights, self.dense, strict=True):
            assert weight.grad is not None
            weight.grad.add_(torch.where(weight == 0, dense, 0), alpha=self.decay)
            weight.copy_(dense)
