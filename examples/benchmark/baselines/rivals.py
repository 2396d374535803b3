"""The installed rivals, fitted to the protocol: half of training to prune, half to tune."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch_pruning
from pytorch_lightning.callbacks import ModelPruning
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.prototype.pat.optim import PruneOptimizer

from examples.benchmark.callbacks import total_steps
from examples.benchmark.method_api import Alive, Count, Pruning, Situation
from examples.models.vit import SelfAttention
from lightning_wgsef import group_parameters, slim
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.training.schedules import in_steps


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


def _by_filter(situation: Situation) -> dict[str, Any]:
    return {"grouping": "filter", "k": situation.task.k, "exclude": situation.task.exclude}


def _filters(situation: Situation, network: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Every layer whose filters a method without tied groups can prune, and how many stay."""
    groups = group_parameters(network, **_by_filter(situation))
    modules = dict(network.named_modules())
    return {x.name: (modules[x.name], int(x.budget)) for x in groups.layers}


def _rows(situation: Situation) -> Count:
    """Counts rows of weights, whatever biases and norms make of them."""
    layers = _filters(situation, situation.network)

    def count(network: nn.Module) -> Alive:
        return {
            name: [int(layer.weight.flatten(1).any(1).sum()), len(layer.weight)]
            for name, (layer, _) in layers.items()
        }

    return count


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
        """Prune when half of the epochs are over."""
        assert trainer.max_epochs is not None
        if not self.pruned and trainer.current_epoch >= self.freeze * trainer.max_epochs:
            self.pruned = True
            if self.amount:
                self.apply_pruning(self.amount)


def magnitude_once(situation: Situation, lr: float, freeze: float) -> Pruning:
    """One `MagnitudeOnce` for every layer: they differ in how many filters stay."""
    layers = _filters(situation, situation.network)
    callbacks: list[pl.Callback] = [
        MagnitudeOnce(layer, kept, freeze) for layer, kept in layers.values()
    ]
    return Pruning(callbacks, lr=lr, groups=_by_filter(situation), count=_rows(situation))


class CutToBudget(pl.Callback):
    """Sets the weakest rows of weights to zero when half of the epochs are over."""

    def __init__(self, layers: dict[str, tuple[nn.Module, int]], freeze: float) -> None:
        self.layers, self.freeze = layers, freeze

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Cut after the last step of the first half."""
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


def pat_min_sparsity(situation: Situation, warm_up: float, freeze: float) -> Pruning:
    """PAT of torchao with a hard budget that falls along a cubic ramp.

    Args:
        situation: network, task and example.
        warm_up: share of training before it begins.
        freeze: share of training after which its "healing" begins.
    """

    def settings(layer: nn.Module, kept: int) -> dict[str, Any]:
        rows = layer.weight.shape[0]
        return {
            "prox_type": "MinSparsityConstraint",
            "min_sparsity": max((rows - kept) / rows - 1e-9, 0.0),  # it takes the ceiling
            "min_sparsity_schedule": True,
        }

    return _pat(situation, settings, 0.0, warm_up, freeze)


def pat_lasso(situation: Situation, lam: float, freeze: float) -> Pruning:
    """PAT of torchao with the group lasso, cut to the budget before its "healing"."""
    pruning = _pat(situation, lambda *_: {"prox_type": "ProxGroupLasso"}, lam, 0.0, freeze)
    pruning.callbacks = [CutToBudget(_filters(situation, situation.network), freeze)]
    return pruning


def _pat(situation: Situation, settings: Any, lam: float, warm_up: float, freeze: float) -> Pruning:
    def wrap(optimizer: Optimizer, network: nn.Module, steps: int) -> Optimizer:
        layers = _filters(situation, network)
        pruned = {id(layer.weight) for layer, _ in layers.values()}
        (own,) = optimizer.param_groups
        shared = {key: value for key, value in own.items() if key != "params"}
        rest = [parameter for parameter in own["params"] if id(parameter) not in pruned]
        groups = [{**shared, "params": rest}]
        for layer, kept in layers.values():
            group = {"group_type": "Dim0Grouper", **settings(layer, kept)}
            groups.append({**shared, **group, "params": [layer.weight]})
        base = type(optimizer)(groups)
        return AfterClosure(
            base,
            warmup_steps=int(warm_up * steps),
            healing_start_step=in_steps("freeze", freeze, steps),
            reg_lambda=lam,
        )

    return Pruning(wrap=wrap, groups=_by_filter(situation), count=_rows(situation))


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
        freeze: share of training after which channels are removed.
    """

    def __init__(self, situation: Situation, reg: float, freeze: float) -> None:
        self.situation, self.reg, self.freeze = situation, reg, freeze
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
        """Remove channels when half of the epochs are over; an optimizer for what is left."""
        assert trainer.max_epochs is not None
        if not self.history and trainer.current_epoch >= self.freeze * trainer.max_epochs:
            self._pruner.step()
            self.history = self._pruner.pruning_history()
            _count_heads(pl_module.network)
            pl_module.network.requires_grad_(True)
            trainer.strategy.setup_optimizers(trainer)
