"""Hooks on the step of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.optim import Optimizer

from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups

Action = Callable[[Optimizer], None]


def inner(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that takes the steps, inside what Fabric or Accelerate put around it.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    >>> inner(optimizer) is optimizer
    True
    """
    held = getattr(optimizer, "optimizer", None)
    return inner(held) if isinstance(held, Optimizer) else optimizer


class StepHooks:
    """Hooks before and after every step of ``optimizer``, until they are removed.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    >>> hooks = StepHooks(optimizer, after=lambda _: print("after"))
    >>> optimizer.step()
    after
    >>> hooks.grown()
    False
    >>> optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    >>> hooks.grown(), hooks.grown()
    (True, False)
    >>> hooks.remove()
    >>> optimizer.step()
    """

    def __init__(self, optimizer: Optimizer, after: Action, before: Action | None = None) -> None:
        self.optimizer = optimizer
        self._size = self._trained_count()
        # Hooks must stay out of a compiled optimizer step. torch leaves `disable` untyped.
        outside = torch.compiler.disable(lambda *_: after(optimizer))  # type: ignore[no-untyped-call]
        self._handles = [optimizer.register_step_post_hook(outside)]
        if before is not None:
            outside = torch.compiler.disable(lambda *_: before(optimizer))  # type: ignore[no-untyped-call]
            self._handles.append(optimizer.register_step_pre_hook(outside))

    def grown(self) -> bool:
        """Return whether the optimizer trains other parameters than at the last call."""
        before, self._size = self._size, self._trained_count()
        return before != self._size

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _trained_count(self) -> int:
        groups = self.optimizer.param_groups
        return sum(p.requires_grad for param_group in groups for p in param_group["params"])


def trained_by(groups: Groups, optimizer: Optimizer) -> Iterator[str]:
    """Yield the names of the layers whose members ``optimizer`` trains.

    Members without a gradient (a frozen norm's scale) may be in no optimizer.

    Raises:
        ValueError: some members of a group are in this optimizer and some trainable ones are not.
    """
    inside = {id(p) for param_group in optimizer.param_groups for p in param_group["params"]}
    for layer in groups.layers:
        trainable = [member for member in layer.members if member.parameter.requires_grad]
        mine = [member.name for member in trainable if id(member.parameter) in inside]
        others = [member.name for member in trainable if id(member.parameter) not in inside]
        if mine and others:
            raise ValueError(
                f"the groups of layer '{layer.name}' are spread over optimizers: "
                f"{', '.join(mine)} are in one, {', '.join(others)} are not in it; put them "
                "into one optimizer (any of its param_groups), or leave the layer out"
            )
        if mine:
            yield layer.name


def holds(optimizer: Optimizer, layer: GroupedLayer) -> bool:
    """Return whether the optimizer holds parameters of the layer, trainable or not."""
    own = {id(member.parameter) for member in layer.members}
    return any(id(p) in own for group in optimizer.param_groups for p in group["params"])
