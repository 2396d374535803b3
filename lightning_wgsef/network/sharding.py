"""Parameters that are sharded over processes (DTensor): what is here, and the whole model again."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

_Value = TypeVar("_Value")

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def unsharded_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the CPU with all of every parameter; itself where none is sharded.

    Every process has to ask. Groups are found on the copy: a graph, an example's outputs and most
    rules need a module that acts like a module.

    >>> network = nn.Linear(2, 3)
    >>> unsharded_copy(network) is network
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


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Is the tensor a DTensor?

    >>> is_sharded(torch.ones(2))
    False
    """
    # Whoever has one has imported this; the others need not wait for it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of the tensor; every process has to ask for it.

    >>> whole(torch.ones(2))
    tensor([1., 1.])
    """
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return full.detach()


@torch.no_grad()
def spans(tensor: DTensor, name: str) -> tuple[range, ...]:
    """For every axis of a DTensor, the places on it that this process holds.

    Raises:
        ValueError: it is placed in a way that is no row of neighbours on every axis.
    """
    found = [range(size) for size in tensor.shape]
    mesh = tensor.device_mesh
    coordinates = mesh.get_coordinate() or [0] * mesh.ndim
    placed = list(zip(tensor.placements, coordinates, mesh.shape, strict=True))
    # What FSDP2 shards after tensor parallelism stands before it, with the name StridedShard.
    placed.sort(key=lambda entry: hasattr(entry[0], "split_factor"))
    for place, coordinate, size in placed:
        if isinstance(axis := getattr(place, "dim", None), int):
            chunk = -(-len(found[axis]) // size)
            found[axis] = found[axis][coordinate * chunk : (coordinate + 1) * chunk]
    if tuple(map(len, found)) != tuple(tensor.to_local().shape):
        raise ValueError(
            f"'{name}' of shape {tuple(tensor.shape)} is placed as {tensor.placements} on {mesh}, "
            "which is not supported: use fully_shard, after parallelize_module if at all"
        )
    return tuple(found)


def on_first_process(make: Callable[[], _Value]) -> _Value:
    """Return what ``make`` returns on the first process, on every one; each of them has to ask.

    Raises:
        ValueError: that of ``make``, on every process.

    >>> on_first_process(lambda: 3)
    3
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return make()
    found: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            found[0] = make()
        except Exception as error:  # the others wait
            found[1] = error if isinstance(error, ValueError) else ValueError(repr(error))
    distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    value: _Value = found[0]
    return value
