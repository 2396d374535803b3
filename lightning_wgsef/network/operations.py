"""Operations of a forward pass: the modules they belong to, and whether they mix channels."""

from __future__ import annotations

import math
import re
from itertools import count
from typing import Any

import torch_pruning  # type: ignore[import-untyped]
from torch import Tensor, nn

from lightning_wgsef.network.example_input import tensors

OPTYPE = torch_pruning.ops.OPTYPE

HEAD = "grouping='head' groups attention"

# Modules that are one operation for torch-pruning, and several for autograd.
MODULE_OPERATIONS = (nn.MultiheadAttention, nn.RNNBase)

_MIXING = re.compile(
    "Mm|Bmm|Mv|Dot|(?<!Upsample)(Linear|Bilinear)|ScaledDot|Attention|Convolution|Pixel|Shuffle|"
    "CopySlices|Fft"
)

# They move or mix what lies along an axis, and leave the other axes as they are.
_ALONG_AXES = re.compile(
    "Flip|Roll|Cumsum|Cumprod|Softmax|LogSoftmax|Index|Gather|Sort|ConstantPad"
)


class Watch:
    """Which operations belong to which module: what `observed` announces of a forward pass.

    Attributes:
        inside: operations inside of the modules that torch-pruning knows.
        activations: the modules without parameters, by the operation they end in.
    """

    def __init__(self) -> None:
        self.inside: set[Any] = set()
        self.activations: dict[Any, nn.Module] = {}

    def note(self, _: str, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        """Note a call of a module."""
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
        elif next(module.parameters(), None) is None and all(
            returned.grad_fn is not x.grad_fn
            for x in tensors(given)  # Dropout and Identity hand on
        ):
            self.activations.setdefault(returned.grad_fn, module)


def mixes_channels(node: Any) -> bool:
    """Does an operation outside of modules make each channel of several, as a product does?"""
    return bool(_MIXING.search(type(node.grad_fn).__name__))


def normalised_together(module: object) -> int:
    """Return how many channels each group of a GroupNorm has; 0 for others, and where it has one.

    >>> normalised_together(nn.GroupNorm(2, 8)), normalised_together(nn.GroupNorm(1, 8))
    (4, 0)
    """
    if not isinstance(module, nn.GroupNorm) or module.num_groups == 1:
        return 0
    return module.num_channels // module.num_groups


def operation_obstacle(node: Any, width: int) -> str:
    """Why an operation outside of modules might mix ``width`` channels."""
    kind = type(node.grad_fn).__name__
    if mixes_channels(node):
        return f"its channels are mixed by {kind}: {HEAD}"
    shape = shape_after(node.grad_fn)
    if node.type == OPTYPE.RESHAPE and shape is not None:
        before = tuple(getattr(node.grad_fn, "_saved_self_sym_sizes", shape))
        if not _keeps_channels(before, shape, width):
            return f"a reshape from {before} to {shape} mixes its channels with heads: {HEAD}"
    if _ALONG_AXES.match(kind) and shape is not None:
        axes, before = _axes(node.grad_fn, shape)
        fitting = [axis for axis in (1, len(shape) - 1) if before[axis : axis + 1] == (width,)]
        if (fitting or [2 if len(shape) == 3 else 1])[0] in axes:
            return f"its channels may be moved or mixed by {kind}"
    unmapped = all(x.index_mapping == [None, None] for x in node.dependencies)
    if node.type in (OPTYPE.CONCAT, OPTYPE.SPLIT) and unmapped and shape is not None:
        axis = getattr(node.grad_fn, "_saved_dim", 1)
        axis = axis if axis < len(shape) else axis + len(shape) - 2**64
        if not any(shape[a] == width for a in (1, len(shape) - 1) if a != axis):
            return f"its place in the concatenation or split of shape {shape} is unknown"
    return ""


def flatten_obstacle(node: Any, positions: dict[int, int]) -> str:
    """Why a reshape to a matrix lays the channels elsewhere than at ``positions``, in runs."""
    before = tuple(getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
    after = shape_after(node.grad_fn) or ()
    if node.type != OPTYPE.RESHAPE or len(before) < 3 or len(after) != 2 or before[0] != after[0]:
        return ""
    first = min(positions)
    run = next(n for n in count(1) if positions.get(first + n) != positions[first])
    if run == math.prod(before[2:]):
        return ""
    return f"a reshape from {before} to {after}, in which its channels are not the second axis"


def _axes(operation: Any, shape: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
    """The axes that an operation works along, and the shape before padding."""
    if hasattr(operation, "_saved_indices"):
        indices = operation._saved_indices
        return [axis for axis, index in enumerate(indices) if index is not None], shape
    if hasattr(operation, "_saved_pad"):  # two numbers for each axis, from the last one on
        pads = operation._saved_pad
        added = [0] * (len(shape) - len(pads) // 2)
        added += [pads[i] + pads[i + 1] for i in reversed(range(0, len(pads), 2))]
        before = tuple(size - more for size, more in zip(shape, added, strict=True))
        return [axis for axis, more in enumerate(added) if more], before
    saved = getattr(operation, "_saved_dims", getattr(operation, "_saved_dim", ()))
    saved = saved if isinstance(saved, tuple) else (saved,)
    # Negative axes are saved as unsigned numbers.
    return [(x - 2**64 if x >= 2**63 else x) % len(shape) for x in saved], shape


def shape_after(operation: Any) -> tuple[int, ...] | None:
    """Shape of what an operation returns; None where it does not say."""
    metadata = getattr(operation, "_input_metadata", None)
    return tuple(int(size) for size in metadata[0].shape) if metadata else None


def _keeps_channels(before: tuple[int, ...], after: tuple[int, ...], width: int) -> bool:
    if len(before) < 2 or len(after) < 2:
        return False
    if before[-1] == width != before[1]:  # channels last
        return after[-1] == width
    flat = 2 in (len(before), len(after)) and before[0] == after[0]
    return flat or before[:2] == after[:2]
