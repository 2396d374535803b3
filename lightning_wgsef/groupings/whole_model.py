"""A model whose parameters are sharded over processes, as a plain one that can be looked at."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.groupings.layers import canonical_name
from lightning_wgsef.sharding import is_sharded, whole

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def whole_model(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the CPU with all of every parameter; itself where none is sharded.

    Every process has to ask. Groups are found on the copy: a graph, an example's outputs and most
    rules need a module that acts like a module.

    >>> network = nn.Linear(2, 3)
    >>> whole_model(network) is network
    True
    """
    for module in model.modules():
        if _is_sharding(module):  # parameters may be gathered still, from a validation, say
            module.reshard()
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return model
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        values = whole(parameter).to("cpu", copy=True)  # some are whole here, and no copy yet
        known[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
    for buffer in model.buffers():
        known[id(buffer)] = whole(buffer).to("cpu", copy=True)
    for module in model.modules():
        for name, value in vars(module).items():
            if name.startswith("__composable_api"):  # what sharding remembers
                known[id(value)] = {}
    with _without_sharding(model):
        return copy.deepcopy(model, known)


def on_model(layers: Sequence[GroupedLayer], model: nn.Module) -> list[GroupedLayer]:
    """Layers that were found on the copy, with the parameters of the model itself."""
    own = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    return [
        replace(x, members=tuple(replace(m, parameter=own[m.name]) for m in x.members))
        for x in layers
    ]


def _is_sharding(module: nn.Module) -> TypeGuard[FSDPModule]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


@contextmanager
def _without_sharding(model: nn.Module) -> Iterator[None]:
    """Modules of the classes that they had, without the hooks, while they are copied."""
    kept: list[tuple[nn.Module, type, dict[str, Any]]] = []
    try:
        for module in model.modules():
            kept.append((module, type(module), {name: getattr(module, name) for name in _HOOKS}))
            if _is_sharding(module):
                module.__class__ = type(module).__mro__[2]  # Sharding Linear, FSDPModule, Linear
            for name in _HOOKS:
                vars(module)[name] = type(getattr(module, name))(
                    (number, hook)
                    for number, hook in getattr(module, name).items()
                    if not str(getattr(hook, "__module__", "")).startswith("torch.distributed")
                )
        yield
    finally:
        for module, kind, hooks in kept:
            module.__class__ = kind
            vars(module).update(hooks)
