"""Which operations of a forward pass belong to which module, and which of them mix channels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch_pruning  # type: ignore[import-untyped]
from torch import Tensor, nn

OPTYPE = torch_pruning.ops.OPTYPE
HEAD = "grouping='head' groups attention"
MODULE_OPERATIONS = (nn.MultiheadAttention, nn.RNNBase)
"""Modules that are one operation for torch-pruning, and several for autograd."""

_MIXING = re.compile(
    "Mm|Bmm|Mv|Dot|Linear|Bilinear|ScaledDot|Attention|Convolution|Pixel|Shuffle|CopySlices|Fft"
)

_REDUCING = re.compile("Mean|Max|Min|Amax|Amin|Median|Prod|Var|Std")


def tensors(value: Any) -> list[Tensor]:
    """All tensors in what a model returns.

    >>> import torch
    >>> len(tensors({"a": torch.ones(1), "b": [torch.ones(2), None]}))
    2
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if hasattr(value, "__dataclass_fields__"):
        value = list(vars(value).values())
    return [x for part in value for x in tensors(part)] if isinstance(value, (list, tuple)) else []


class Watch:
    """Notes which operations belong to which module while the network runs."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.names, self.handles = names, list[Any]()
        self.inside: set[Any] = set()
        self.activations: dict[Any, nn.Module] = {}

    def __enter__(self) -> None:
        for module in self.names:
            self.handles.append(module.register_forward_hook(self._note))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, module: nn.Module, given: Any, returned: Any) -> None:
        if not isinstance(returned, Tensor) or any(True for _ in module.children()):
            return
        known = torch_pruning.ops.module2type(module) != OPTYPE.ELEMENTWISE
        if known and not isinstance(module, MODULE_OPERATIONS):
            before = {None, *(x.grad_fn for x in tensors(given))}
            waiting: list[Any] = [returned.grad_fn]
            while waiting:
                operation: Any = waiting.pop()
                if operation not in before and operation not in self.inside:
                    self.inside.add(operation)
                    waiting += [following for following, _ in operation.next_functions]
        elif not any(True for _ in module.parameters()):
            self.activations.setdefault(returned.grad_fn, module)


def operation_obstacle(node: Any, width: int) -> str:
    """Why an operation outside of modules might mix ``width`` channels."""
    kind = type(node.grad_fn).__name__
    if _MIXING.search(kind):
        return f"its channels are mixed by {kind}: {HEAD}"
    shape = _shape(node.grad_fn)
    if node.type == OPTYPE.RESHAPE and shape is not None:
        before = tuple(getattr(node.grad_fn, "_saved_self_sym_sizes", shape))
        if not _keeps_channels(before, shape, width):
            return f"a reshape from {before} to {shape} mixes its channels with heads: {HEAD}"
    unmapped = all(x.index_mapping == [None, None] for x in node.dependencies)
    if node.type in (OPTYPE.CONCAT, OPTYPE.SPLIT) and unmapped and shape is not None:
        axis = getattr(node.grad_fn, "_saved_dim", 1)
        axis = axis if axis < len(shape) else axis + len(shape) - 2**64
        if not any(shape[a] == width for a in (1, len(shape) - 1) if a != axis):
            return f"its place in the concatenation or split of shape {shape} is unknown"
    return ""


def removal_obstacle(node: Any, width: int) -> str:
    """Why ``width`` channels cannot get fewer where they pass an operation, even if zero."""
    operation = node.grad_fn
    kind = type(operation).__name__
    mappings = [mapping for x in node.dependencies for mapping in x.index_mapping]
    if node.type in (OPTYPE.SPLIT, OPTYPE.SLICE) and any(x is not None for x in mappings):
        return f"{kind} takes channels by their number"
    if _REDUCING.match(kind) and hasattr(operation, "_saved_dim"):
        before = getattr(operation, "_saved_self_sym_sizes", None)
        before = operation._saved_self.shape if before is None else before
        saved = operation._saved_dim
        axes = [
            x - 2**64 if x >= 2**63 else x for x in (saved if isinstance(saved, tuple) else [saved])
        ]
        channels = 1 if len(before) > 1 and before[1] == width else len(before) - 1
        if before[channels] == width and channels in [axis % len(before) for axis in axes]:
            return f"{kind} is taken over all channels"
    return ""


def _shape(operation: Any) -> tuple[int, ...] | None:
    metadata = getattr(operation, "_input_metadata", None)
    return tuple(int(size) for size in metadata[0].shape) if metadata else None


def _keeps_channels(before: tuple[int, ...], after: tuple[int, ...], width: int) -> bool:
    if len(before) < 2 or len(after) < 2:
        return False
    if before[-1] == width != before[1]:  # channels last
        return after[-1] == width
    flat = 2 in (len(before), len(after)) and before[0] == after[0]
    return flat or before[:2] == after[:2]
