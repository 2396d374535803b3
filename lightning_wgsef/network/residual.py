"""Residual blocks: modules that hand their input on when all their weights are zero."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.network.attention import dense_layers
from lightning_wgsef.network.equivalence import TOLERANCE, relative_difference
from lightning_wgsef.network.example_input import observed, perturbed, run_example
from lightning_wgsef.network.layers import canonical_name, weighted_layers


def residual_blocks(model: nn.Module, example_input: Any) -> list[str]:
    """Names of the modules that hand their input on when all their parameters are zero.

    Found by trying, on a copy in evaluation mode. A block that changes the shape, or ends in a
    norm, is none; of blocks inside of blocks the innermost count.

    Raises:
        ValueError: the forward pass fails.
    """
    twin = perturbed(model)
    weighted = layer_names(twin)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    modules = {canonical_name(name): module for name, module in twin.named_modules() if name}

    def record(name: str, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if name in calls:
            return
        try:  # a cache of keys and values is written to by the call, and longer in the next
            calls[name] = copy.deepcopy((inputs, named))
        except Exception:  # arguments may be anything
            calls[name] = inputs, named

    around = {
        name: module
        for name, module in modules.items()
        if any(layer.startswith(f"{name}.") for layer in weighted)
    }
    with torch.no_grad():
        with observed(around, record):
            run_example(twin, example_input)
        found: list[str] = []
        for name in sorted(calls, key=lambda name: -name.count(".")):
            holds_one = any(other.startswith(f"{name}.") for other in found)
            if holds_one or not _alone(twin, modules[name]):
                continue
            if _is_identity(modules[name], *calls[name]):
                found.append(name)
    return [name for name in modules if name in found]


def layer_names(model: nn.Module) -> list[str]:
    """All convolutions and dense layers, those of transformers' own kind included."""
    names = [layer.name for layer in weighted_layers(model)]
    return list(dict.fromkeys(names + [layer.name for layer in dense_layers(model).values()]))


def _alone(model: nn.Module, block: nn.Module) -> bool:
    """Does nobody outside of the block use its parameters?"""
    inside, own = set(block.modules()), {id(parameter) for parameter in block.parameters()}
    others = (module for module in model.modules() if module not in inside)
    return not any(id(p) in own for module in others for p in module.parameters(recurse=False))


def _is_identity(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Is the output of the block with zero parameters its first input?"""
    given = next((x for x in (*inputs, *named.values()) if isinstance(x, Tensor)), None)
    if given is not None and _is_constant(given):
        # The zeros behind channels that are silent are what any layer without weights makes, too.
        noise = torch.rand(given.shape, generator=torch.Generator().manual_seed(0)).to(given)
        varied = noise * torch.where(given == 0, 1, given)
        inputs = tuple(varied if x is given else x for x in inputs)
        named = {name: varied if x is given else x for name, x in named.items()}
        given = varied
    before = [parameter.clone() for parameter in block.parameters()]
    for parameter in block.parameters():
        parameter.zero_()
    try:
        output = block(*inputs, **named)
    except Exception:  # a block of the user's that cannot run twice is none that can be left out
        return False
    finally:
        for parameter, value in zip(block.parameters(), before, strict=True):
            parameter.copy_(value)
    output = output[0] if isinstance(output, tuple) and output else output
    if given is None or not isinstance(output, Tensor):
        return False
    return relative_difference([output], [given]) <= TOLERANCE


def _is_constant(tensor: Tensor) -> bool:
    values = tensor.flatten()
    return tensor.is_floating_point() and len(values) > 1 and bool((values == values[0]).all())
