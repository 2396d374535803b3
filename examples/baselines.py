"""Rivals in a few lines, on the same groups as the package's own method."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from lightning_wgsef import group_parameters, prox_multipliers


class GradualMagnitude(pl.Callback):
    """Gradual magnitude pruning (Zhu and Gupta, 2017, equation 1), on groups.

    After every step only the k(t) strongest groups of each layer stay, where the number that died,
    ``groups - k(t) = (groups - k) * (1 - (1 - t)^3)``, grows over the first ``length`` of training;
    then the mask is fixed. Groups that were cut may come back until then.

    Args:
        length: share of training after which the mask is fixed.
        groups: what `group_parameters` takes.
    """

    def __init__(self, length: float = 0.5, **groups: Any) -> None:
        self.length = length
        self.arguments = groups

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act after every step of the first optimizer."""
        groups = group_parameters(pl_module, **self.arguments)
        counts = torch.tensor(groups.counts, dtype=torch.float64)
        last = max(1, round(self.length * trainer.estimated_stepping_batches))
        taken, mask = 0, torch.ones(0)

        def after_step(*_: object) -> None:
            nonlocal taken, mask
            taken += 1
            if taken <= last:
                left = (1 - taken / last) ** 3
                budgets = groups.budgets + (counts - groups.budgets) * left
                budgets = budgets.ceil() if taken < last else groups.budgets
                mask = prox_multipliers(
                    groups.norms(), 1.0, budgets, segments=groups.segments, debias=1.0
                )
            groups.scale_(mask)

        trainer.optimizers[0].register_step_post_hook(after_step)
