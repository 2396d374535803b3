"""What a method is told, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from examples.benchmark.suite import Task
from lightning_wgsef import Groups, group_parameters


@dataclass(frozen=True)
class Situation:
    """What a method is made for.

    Attributes:
        task: its settings.
        network: the dense network.
        example: a batch of two images.
        batches: of images and labels to train on.
    """

    task: Task
    network: nn.Module
    example: Tensor
    batches: Iterable[Any] = ()

    def groups(self, grouping: Any = None, **more: Any) -> dict[str, Any]:
        """Arguments of `group_parameters`, tied channels where no other grouping is named."""
        return {
            "k": self.task.k,
            "grouping": self.task.structure if grouping is None else grouping,
            "exclude": self.task.exclude,
            "example_input": self.example,
            **more,
        }


Alive = dict[str, list[int]]
"""For every layer how many of its groups have a weight that is not zero, and of how many."""
Count = Callable[[nn.Module], Alive]


@dataclass
class Pruning:
    """What a method does to a training.

    Attributes:
        callbacks: for the Trainer.
        network: what is trained instead of the dense network.
        lr: factor of the learning rate.
        wrap: the optimizer that takes the steps, from that of the task, the network, and the number
            of steps of training.
        groups: arguments of `group_parameters` for the groups that the budget is about; None: tied
            channels.
        count: counts those that are alive, where it is not enough to look for zeros.
        restore: what a network needs before the weights of a checkpoint fit it.
    """

    callbacks: list[pl.Callback] = field(default_factory=list)
    network: nn.Module | None = None
    lr: float = 1.0
    wrap: Callable[[Optimizer, nn.Module, int], Optimizer] = lambda optimizer, network, steps: (
        optimizer
    )
    groups: dict[str, Any] | None = None
    count: Count | None = None
    restore: Callable[[nn.Module, dict[str, Any]], None] = lambda network, checkpoint: None


def counted(dense: Groups, arguments: dict[str, Any]) -> Count:
    """Counts groups of a network that may have been cut.

    Args:
        dense: the groups that there were.
        arguments: those of `group_parameters`.
    """
    known: dict[tuple[int, ...], Groups] = {}

    def count(network: nn.Module) -> Alive:
        key = tuple(map(id, network.parameters()))
        if key not in known:  # a network that was cut has other parameters
            known.clear()
            known[key] = group_parameters(network, **arguments)
        groups = known[key]
        # One channel alone competes with nothing, and is no group: it was not found, but is there.
        alive = {layer.name: 1 for layer in dense.layers}
        alive |= {name: int(part.sum()) for name, part in groups.split(groups.alive()).items()}
        return {layer.name: [alive[layer.name], layer.count] for layer in dense.layers}

    return count


def by_filter(situation: Situation, **more: Any) -> dict[str, Any]:
    """Arguments of `group_parameters` for a method that ties nothing."""
    task = situation.task
    return {"grouping": "filter", "k": task.k, "exclude": task.exclude, **more}


def filters(situation: Situation, network: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Every layer whose filters a method without tied groups can prune, and how many stay."""
    groups = group_parameters(network, **by_filter(situation))
    modules = dict(network.named_modules())
    return {x.name: (modules[x.name], int(x.budget)) for x in groups.layers}


def count_rows(situation: Situation) -> Count:
    """Counts rows of weights, whatever biases and norms make of them."""
    layers = filters(situation, situation.network)

    def count(network: nn.Module) -> Alive:
        return {
            name: [int(layer.weight.flatten(1).any(1).sum()), len(layer.weight)]
            for name, (layer, _) in layers.items()
        }

    return count
