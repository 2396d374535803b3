"""Look-alikes: modules of one's own that compute what a dense layer or a convolution computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

_CONVOLUTIONS: dict[int, tuple[type[nn.Module], Any]] = {
    3: (nn.Conv1d, functional.conv1d),
    4: (nn.Conv2d, functional.conv2d),
    5: (nn.Conv3d, functional.conv3d),
}

_known: WeakKeyDictionary[nn.Module, type[nn.Module] | None] = WeakKeyDictionary()


def acts_like(module: nn.Module) -> type[nn.Module] | None:
    """The layer of torch whose numbers a module of one's own returns when tried; None for none.

    >>> class Dense(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.ones(2, 3))
    ...
    ...     def forward(self, x):
    ...         return x @ self.weight.T
    >>> acts_like(Dense()).__name__, acts_like(nn.Embedding(2, 3))
    ('Linear', None)
    """
    if module not in _known:
        _known[module] = None if _is_other(module) else _tried(module)
    return _known[module]


def _is_other(module: nn.Module) -> bool:
    """Is there no need to try it: torch's own, without a weight, or with more than that?"""
    if isinstance(module, torch.jit.ScriptModule):  # its parameters are another kind of dict
        return True
    weight = module._parameters.get("weight")
    lazy = isinstance(weight, nn.parameter.UninitializedParameter)
    return (
        str(getattr(type(module).forward, "__module__", "")).startswith("torch.nn.")
        or weight is None
        or lazy
        or weight.dim() not in (2, *_CONVOLUTIONS)
        or not weight.is_floating_point()
        or any(True for _ in module.children())
        or not set(module._parameters) <= {"weight", "bias"}
    )


@torch.no_grad()
def _tried(module: nn.Module) -> type[nn.Module] | None:
    """Try a copy in evaluation mode: the forward may draw numbers and write into buffers."""
    weight: Any = module._parameters["weight"]
    sizes = [size + 3 for size in weight.shape[2:]]
    inputs = weight.shape[1] * _groups(module)
    given = torch.randn(3, inputs, *sizes, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.random.fork_rng([given.device] if given.is_cuda else []):
            found = copy.deepcopy(module).eval().forward(given)
        kind = nn.Linear if weight.dim() == 2 else _CONVOLUTIONS[weight.dim()][0]
        return kind if any(_equal(found, x) for x in _expected(module, weight, given)) else None
    except Exception:  # the forward is anybody's, and takes what it takes
        return None


def _expected(module: nn.Module, weight: Tensor, given: Tensor) -> Iterator[Tensor]:
    """Yield what layers with this weight return: where strides are not told, the usual ones."""
    bias = module._parameters.get("bias")
    if weight.dim() == 2:
        yield functional.linear(given, weight, bias)
        return
    _, convolution = _CONVOLUTIONS[weight.dim()]
    usual = {"stride": (1, 2), "padding": (0, tuple(n // 2 for n in weight.shape[2:]))}
    told = [getattr(module, name, None) for name in usual]
    choices = [
        values if own is None else (own,) for own, values in zip(told, usual.values(), strict=True)
    ]
    dilation = getattr(module, "dilation", 1)
    for stride, padding in product(*choices):
        yield convolution(given, weight, bias, stride, padding, dilation, _groups(module))


def _equal(found: Any, expected: Tensor) -> bool:
    same = isinstance(found, Tensor) and found.shape == expected.shape
    return same and bool(torch.allclose(found, expected, rtol=1e-4, atol=1e-5))


def _groups(module: nn.Module) -> int:
    groups = getattr(module, "groups", 1)
    return groups if type(groups) is int else 1


def follow_look_alikes(model: nn.Module) -> None:
    """Let the modules of a copy that act like a layer of torch be of its class, too.

    A graph knows layers by their class; they compute what they did.
    """
    for module in model.modules():
        kind = acts_like(module)
        if kind is None:
            continue
        weight: Any = module._parameters["weight"]
        made, read = weight.shape[0], weight.shape[1] * _groups(module)
        values: dict[str, Any] = {"in_features": read, "out_features": made}
        if kind is not nn.Linear:
            values = {"in_channels": read, "out_channels": made, "transposed": False, "groups": 1}
        if "bias" not in module._parameters:
            values["bias"] = None
        own = {name: x for name, x in values.items() if not hasattr(module, name)}
        module.__class__ = type(type(module).__name__, (type(module), kind), own)
