"""Torch-Pruning's group-norm pruner: sparse learning, removal, fine-tuning."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch_pruning
from torch import nn
from torch.optim import Optimizer

from examples.benchmark.method_api import Pruning, Situation
from examples.models.vit import SelfAttention
from lightning_wgsef import group_parameters


def _count_heads(network: nn.Module) -> None:
    """Tell attention how many heads are left, as Torch-Pruning's own examples do."""
    for module in network.modules():
        if isinstance(module, SelfAttention):
            module.num_heads = module.q_proj.out_features // module.head_dim


class TorchPruning(pl.Callback):
    """Torch-Pruning's group-norm pruner: its sparse learning, then its removal, then fine-tuning.

    Args:
        situation: network, task and example.
        reg: weight of its regulariser.
    """

    def __init__(self, situation: Situation, reg: float) -> None:
        self.situation, self.reg = situation, reg
        self.history: list[Any] = []
        self._pruner: Any = None

    def pruning(self) -> Pruning:
        """What it does to a training."""
        return Pruning([self], restore=self.restore)

    def restore(self, network: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Remove again what had been removed when the checkpoint was written."""
        self.history = checkpoint["callbacks"][self.state_key]["history"]
        if self.history:
            graph = torch_pruning.DependencyGraph()
            graph.build_dependency(network, self.situation.example)
            graph.load_pruning_history(self.history)
            _count_heads(network)

    def state_dict(self) -> dict[str, Any]:
        """What was removed."""
        return {"history": self.history}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the network's graph."""
        network = pl_module.network
        groups = group_parameters(network, **self.situation.groups())
        modules = dict(network.named_modules())
        ratios, heads, grouped = {}, {}, set()
        for layer in groups.layers:
            for member in layer.members:
                name = member.name.rpartition(".")[0]
                if member.axes == (0,) and isinstance(modules[name], nn.Conv2d | nn.Linear):
                    # It keeps int(channels * (1 - ratio)), and removes ceil(heads * ratio).
                    ratios[modules[name]] = (layer.count - layer.budget - 0.5) / layer.count
                    grouped.add(name)
                    if isinstance(modules.get(layer.name), SelfAttention):
                        heads[modules[name]] = layer.count
        kinds = (nn.Conv2d, nn.Linear)
        ignored = [
            module
            for name, module in modules.items()
            if isinstance(module, kinds) and name not in grouped
        ]
        self._pruner = torch_pruning.pruner.GroupNormPruner(
            network,
            self.situation.example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            reg=self.reg,
            pruning_ratio=0.0,
            pruning_ratio_dict=ratios,
            ignored_layers=ignored,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio_dict={layer: ratios[layer] for layer in heads},
        )
        network.train()  # following the graph leaves it in evaluation mode

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the regulariser's gradient while nothing is removed."""
        if not self.history:
            self._pruner.regularize(pl_module.network)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove channels when it is time; an optimizer for what is left."""
        assert trainer.max_epochs is not None
        freeze = self.situation.task.freeze * trainer.max_epochs
        if not self.history and trainer.current_epoch >= freeze:
            self._pruner.step()
            self.history = self._pruner.pruning_history()
            _count_heads(pl_module.network)
            pl_module.network.requires_grad_(True)
            trainer.strategy.setup_optimizers(trainer)
