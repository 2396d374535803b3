"""Steps of optimizers, followed by hooks: each as a whole, whatever steps it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

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


def nested(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizer and those among its attributes, the outermost first."""
    held = [x for x in vars(optimizer).values() if isinstance(x, Optimizer)]
    return [optimizer, *(part for one in held for part in nested(one))]


class WholeSteps:
    """Steps that are not part of another optimizer's step.

    A step may consist of steps: SAM's of two of its base optimizer, Lookahead's of one and of what
    it writes afterwards. What follows a step follows the outermost one.

    Args:
        before: called before a whole step, with its optimizer.
        after: called after a whole step in which an optimizer stepped.
    """

    def __init__(self, before: Action, after: Action) -> None:
        # Hooks must stay out of a compiled optimizer step. torch leaves `disable` untyped.
        self.before: Action = torch.compiler.disable(before)  # type: ignore[no-untyped-call]
        self.after: Action = torch.compiler.disable(after)  # type: ignore[no-untyped-call]
        self._running: list[Optimizer] = []
        self._stepped = False

    def enter(self, optimizer: Optimizer) -> None:
        """Note that a step begins; one that an exception ended is forgotten."""
        inside = [place for place, one in enumerate(self._running) if one is optimizer]
        if len(inside) >= max(1, _hooked_steps(optimizer)):
            del self._running[inside[0] :]
        if not self._running:
            self._stepped = False
            self.before(optimizer)
        self._running.append(optimizer)

    def leave(self, optimizer: Optimizer, stepped: bool) -> None:
        """Note that a step ends; ``stepped``: it was one, not only what is around one."""
        self._stepped |= stepped
        if optimizer in self._running:
            while self._running.pop() is not optimizer:
                pass
        if not self._running and self._stepped:
            self.after(optimizer)


class StepHooks:
    """Hooks around every step of ``optimizer``, until they are removed.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    >>> steps = WholeSteps(before=lambda _: print("before"), after=lambda _: print("after"))
    >>> hooks = StepHooks(optimizer, steps)
    >>> optimizer.step()
    before
    after
    >>> hooks.grown()
    False
    >>> optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    >>> hooks.grown(), hooks.grown()
    (True, False)
    >>> hooks.remove()
    >>> optimizer.step()
    """

    def __init__(self, optimizer: Optimizer, steps: WholeSteps) -> None:
        self.optimizer = optimizer
        self._sizes = self._trained_counts()
        self._undo: list[Callable[[], None]] = []
        if _hooked_steps(optimizer):
            handles = (
                optimizer.register_step_pre_hook(lambda *_: steps.enter(optimizer)),
                optimizer.register_step_post_hook(lambda *_: steps.leave(optimizer, True)),
            )
            self._undo += [handle.remove for handle in handles]
        else:
            self._wrap(steps)

    def grown(self) -> bool:
        """Return whether the optimizer trains other parameters than at the last call."""
        before, self._sizes = self._sizes, self._trained_counts()
        return before != self._sizes

    def remove(self) -> None:
        """Remove the hooks."""
        while self._undo:
            self._undo.pop()()

    def _wrap(self, steps: WholeSteps) -> None:
        """Put `step` of this object, whose class did not let torch add hooks, into another."""
        optimizer, step = self.optimizer, self.optimizer.step
        alone = len(nested(optimizer)) == 1

        def followed(_: Optimizer, *args: Any, **more: Any) -> Any:
            steps.enter(optimizer)
            result = step(*args, **more)
            steps.leave(optimizer, alone)
            return result

        # What others have marked their step with, as schedulers do, holds for this one.
        vars(followed).update(vars(getattr(step, "__func__", step)))
        earlier = vars(optimizer).get("step")
        wrapped = MethodType(followed, optimizer)  # a scheduler asks for its __func__
        optimizer.step = wrapped  # type: ignore[method-assign]

        def undo() -> None:
            if vars(optimizer).get("step") is not wrapped:
                return  # somebody wrapped it in turn: what is inside must stay
            del optimizer.step
            if earlier is not None:
                optimizer.step = earlier  # type: ignore[method-assign]

        self._undo.append(undo)

    def _trained_counts(self) -> list[int]:
        groups = self.optimizer.param_groups
        return [sum(p.requires_grad for p in param_group["params"]) for param_group in groups]


def trained_by(
    groups: Groups, optimizer: Optimizer, others: Sequence[Optimizer] = ()
) -> Iterator[str]:
    """Yield the names of the layers whose members ``optimizer`` trains.

    Members without a gradient (a frozen norm's scale) may be in no optimizer.

    Raises:
        ValueError: some members of a group are in this optimizer and some trainable ones are not,
            and none of the ``others`` has all of them.
    """
    inside = _parameters(optimizer)
    for layer in groups.layers:
        trainable = [member for member in layer.members if member.parameter.requires_grad]
        mine = [member.name for member in trainable if id(member.parameter) in inside]
        rest = [member.name for member in trainable if id(member.parameter) not in inside]
        if mine and rest:
            if any(trains(other, layer) for other in others):
                continue
            raise ValueError(
                f"the groups of layer '{layer.name}' are spread over optimizers: "
                f"{', '.join(mine)} are in one, {', '.join(rest)} are not in it; put them "
                "into one optimizer (any of its param_groups), or leave the layer out"
            )
        if mine:
            yield layer.name


def trains(optimizer: Optimizer, layer: GroupedLayer) -> bool:
    """Return whether the optimizer holds all parameters of the layer that have a gradient."""
    own = {id(member.parameter) for member in layer.members if member.parameter.requires_grad}
    return bool(own) and own <= _parameters(optimizer)


def holds(optimizer: Optimizer, layer: GroupedLayer) -> bool:
    """Return whether the optimizer holds parameters of the layer, trainable or not."""
    return not _parameters(optimizer).isdisjoint(id(member.parameter) for member in layer.members)


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for param_group in optimizer.param_groups for p in param_group["params"]}


def _hooked_steps(optimizer: Optimizer) -> int:
    """Return how many steps of the optimizer's classes call hooks; 0: the one it has calls none."""
    if not getattr(type(optimizer).step, "hooked", False):
        return 0
    steps = [vars(base).get("step") for base in type(optimizer).__mro__]
    return sum(getattr(step, "hooked", False) for step in steps)
