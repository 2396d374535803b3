"""Lightning's ModelPruning, once, in the middle of training."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelPruning
from torch import nn

from examples.benchmark.method_api import Pruning, Situation, by_filter, count_rows, filters


class MagnitudeOnce(ModelPruning):
    """Lightning's ModelPruning, once: the filters of one layer with the smallest norms.

    Its masks are not in checkpoints, but its zeros are: a resumed run takes the same filters again.
    """

    def __init__(self, layer: nn.Module, kept: int, freeze: float) -> None:
        amount = layer.weight.shape[0] - kept
        super().__init__(
            "ln_structured",
            [(layer, "weight")],
            use_global_unstructured=False,
            amount=amount,
            apply_pruning=False,
            use_lottery_ticket_hypothesis=False,
            pruning_dim=0,
            pruning_norm=2,
        )
        self.freeze = freeze
        self.pruned = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune when it is time."""
        assert trainer.max_epochs is not None
        if not self.pruned and trainer.current_epoch >= self.freeze * trainer.max_epochs:
            self.pruned = True
            if self.amount:
                self.apply_pruning(self.amount)


def magnitude_once(situation: Situation, lr: float) -> Pruning:
    """One `MagnitudeOnce` for every layer: they differ in how many filters stay."""
    layers = filters(situation, situation.network)
    callbacks: list[pl.Callback] = [
        MagnitudeOnce(layer, kept, situation.task.freeze) for layer, kept in layers.values()
    ]
    return Pruning(callbacks, lr=lr, groups=by_filter(situation), count=count_rows(situation))
