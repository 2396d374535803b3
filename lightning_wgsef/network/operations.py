"""Operations of a forward pass: the modules they belong to, and whether they mix channels."""

from __future__ import annotations

import math
import re
from itertools import takewhile
from typing import Any, Self

import torch
import torch.nn.functional as F
import torch_pruning  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_wgsef.network.example_input import tensors
from lightning_wgsef.network.layers import parameter_homes, weighted_layers

OPTYPE = torch_pruning.ops.OPTYPE

HEAD = "grouping='head' groups attention"

# Modules that are one operation for torch-pruning, and several for autograd.
MODULE_OPERATIONS = (nn.MultiheadAttention, nn.RNNBase)

_MIXING = re.compile(
    "Mm|Bmm|Mv|Dot|(?<!Upsample)(Linear|Bilinear)|ScaledDot|Attention|Convolution|Pixel|Shuffle|"
    "CopySlices|Fft"
)

# Those of them that attention is made of.
_ATTENTION = re.compile("Mm|ScaledDot|Attention")

# They move or mix what lies along an axis, and leave the other axes as they are.
_ALONG_AXES = re.compile(
    "Flip|Roll|Cumsum|Cumprod|Softmax|LogSoftmax|Index|Gather|Sort|ConstantPad"
)


# What multiplies by the weight of a convolution or dense layer.
_PRODUCTS = (
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    F.linear,
)


_SPLITS = (torch.split, Tensor.split, torch.split_with_sizes, Tensor.split_with_sizes)


class Held(int):
    """A number that a module holds, or a whole part of it, such as half, with its place.

    What else is computed from it is a plain number.

    Attributes:
        module: the module.
        attribute: its name there.
        index: of the entry, where the module holds several numbers; None for one.
        times: how many times the number is what the module holds.
        compared: those that are found equal to a plain number are put there, as a size is checked.
    """

    module: nn.Module
    attribute: str
    index: int | None
    times: int
    compared: list[Held]

    @classmethod
    def at(cls, number: int, *place: Any) -> Held:
        """Note where a module holds a number, with the values of all attributes."""
        held = cls(number)
        held.module, held.attribute, held.index, held.times, held.compared = place
        return held

    def __floordiv__(self, parts: Any) -> Any:
        """Divide; what is left without a rest still knows its place."""
        found = int(self) // parts
        if type(parts) is not int or found * parts != self:
            return found
        times = self.times * parts
        return Held.at(found, self.module, self.attribute, self.index, times, self.compared)

    def __eq__(self, other: object) -> bool:
        """Compare, and note it."""
        if type(other) is int and int(self) == other:
            self.compared.append(self)
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        """Compare, and note it."""
        return not self == other

    __hash__ = int.__hash__


class Watch(TorchFunctionMode):
    """Which operations belong to which module: what `observed` announces of a forward pass.

    A convolution or dense layer may do more than multiply by its weight, such as normalise what
    comes out by a norm that it holds: as a context, the watch sees which operation is the product.
    It also sees which parts of a tensor are as large as a number that a module of one's own holds.

    Args:
        model: the network that runs.

    Attributes:
        inside: operations inside of the modules that torch-pruning knows.
        activations: the modules without parameters, by the operation they end in.
        owners: the module that an operation belongs to, where it is not the last module that ended
            in it; None for no module.
        parts: the sizes of the parts that a split makes, or of a slice from the beginning, by the
            operation, with the number that a module holds of it; None for no such number.
        compared: numbers that modules hold and compare with sizes, which are equal.
        given: operations and modules whose results a module is given, by name, of those called.
        results: the same of all that its forward has at hand: what it is given, and what the
            modules that it calls take or return.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        homes = parameter_homes(model)
        self.inside: set[Any] = set()
        self.activations: dict[Any, nn.Module] = {}
        self.owners: dict[Any, nn.Module | None] = {}
        self.parts: dict[Any, list[tuple[int, Held | None]]] = {}
        self.compared: list[Held] = []
        self.given: dict[str, set[Any]] = {}
        self.results: dict[str, set[Any]] = {}
        self._calls: list[str] = []
        self._model, self._before = model, list[tuple[nn.Module, str, Any, Any]]()
        self._readers = {
            id(layer.weight): layer.module
            for layer in weighted_layers(model)
            if not layer.problem and len(homes[id(layer.weight)]) == 1
        }
        self._products: dict[nn.Module, Any] = {}
        self._ended: dict[Any, nn.Module] = {}

    def __enter__(self) -> Self:
        """Let the numbers that modules hold know where they are."""
        for module in self._model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # its class has no forward to look at
            if str(getattr(type(module).forward, "__module__", "")).startswith("torch.nn."):
                continue
            for name, value in list(vars(module).items()):
                held: Any = None
                if type(value) is int:
                    held = Held.at(value, module, name, None, 1, self.compared)
                elif type(value) in (list, tuple) and all(type(x) is int for x in value):
                    held = type(value)(
                        Held.at(x, module, name, n, 1, self.compared) for n, x in enumerate(value)
                    )
                if held is not None:
                    self._before.append((module, name, value, held))
                    vars(module)[name] = held
        super().__enter__()  # type: ignore[no-untyped-call]  # torch gives none
        return self

    def __exit__(self, *error: object) -> None:
        """Put the plain numbers back."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch gives none
        for module, name, value, held in self._before:
            if vars(module).get(name) is held:
                vars(module)[name] = value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation; note it if it is a layer's product.

        Batch norms whose statistics have a gradient are written out: autograd's own has none there.
        So are products of a matrix and a batch, which torch joins with the columns, `einsum`'s too.
        """
        named = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **named)
        if func in (torch.matmul, Tensor.matmul) and len(args) == 2:
            return _matmul(*args)
        if func is torch.einsum and (factors := _factors(*args)):
            return _matmul(*factors)
        result = func(*args, **named)
        if func in _SPLITS:
            self._note_split(result, args, named)
        elif func is Tensor.__getitem__:
            self._note_slice(result, args[1])
        if func in _PRODUCTS:
            weight = args[1] if len(args) > 1 else named.get("weight")
            reader = self._readers.get(id(weight))
            if reader is not None:
                self._products[reader] = result.grad_fn
        return result

    def _note_split(
        self, parts: tuple[Tensor, ...], args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        given = args[1] if len(args) > 1 else next(named[x] for x in named if "split_size" in x)
        dim = args[2] if len(args) > 2 else named.get("dim", 0)
        sizes = given if isinstance(given, list | tuple) else [given] * len(parts)
        self.parts[parts[0].grad_fn if parts else None] = [
            (part.shape[dim], x if isinstance(x, Held) else None)
            for part, x in zip(parts, sizes, strict=True)
        ]

    def _note_slice(self, part: Tensor, index: Any) -> None:
        along = [x for x in (index if isinstance(index, tuple) else [index]) if type(x) is slice]
        ends = [x.stop for x in along if isinstance(x.stop, Held) and not x.start and not x.step]
        if len(ends) == 1:
            self.parts[part.grad_fn] = [(int(ends[0]), ends[0])]

    def enter(self, name: str, _: nn.Module, given: tuple[Any, ...], named: Any) -> None:
        """Note what a module is given."""
        operations = {x.grad_fn for value in (given, named) for x in tensors(value)}
        self.given.setdefault(name, set()).update(self._with_modules(operations))
        self._add_results(operations)
        self._calls.append(name)
        self._add_results(operations)

    def _with_modules(self, operations: set[Any]) -> set[Any]:
        return operations | {self._ended[x] for x in operations if x in self._ended}

    def _add_results(self, operations: set[Any]) -> None:
        if self._calls:
            own = self.results.setdefault(self._calls[-1], set())
            own.update(self._with_modules(operations))

    def leave(self, _: str, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        """Note a call of a module and what it returned."""
        self._calls.pop()
        self._note(module, given, returned)
        self._add_results({x.grad_fn for x in tensors(returned)})

    def _note(self, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        if not isinstance(returned, Tensor):
            return
        end = returned.grad_fn
        own = self._products.pop(module, end)
        known = torch_pruning.ops.module2type(module) != OPTYPE.ELEMENTWISE
        if known and own is not end:
            self.owners[own], self.owners[end] = module, self._ended.get(end)
        elif known:
            self._ended[end] = module
        if own is end and any(True for _ in module.children()):
            return
        if known and not isinstance(module, MODULE_OPERATIONS):
            before = {None, *(x.grad_fn for x in tensors(given))}
            waiting: list[Any] = [own]
            while waiting:
                operation: Any = waiting.pop()
                if operation not in before and operation not in self.inside:
                    self.inside.add(operation)
                    waiting += [following for following, _ in operation.next_functions]
        elif next(module.parameters(), None) is None and all(
            end is not x.grad_fn
            for x in tensors(given)  # Dropout and Identity hand on
        ):
            self.activations.setdefault(end, module)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    x, mean, var = input, running_mean, running_var
    if training or mean is None or var is None or not mean.requires_grad:
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)

    def laid(vector: Tensor) -> Tensor:
        return vector.view(1, -1, *[1] * (x.dim() - 2))

    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    return x * laid(scale) + laid(shift)


def _matmul(one: Tensor, other: Tensor) -> Tensor:
    if one.dim() == 2 < other.dim():
        one = one.expand(*other.shape[:-2], *one.shape)
    elif other.dim() == 2 < one.dim():
        other = other.expand(*one.shape[:-2], *other.shape)
    if one.dim() == other.dim() == 3 and len(one) == len(other):
        return torch.bmm(one, other)  # `@` would reshape both before and after
    return one @ other


def _factors(equation: Any, *operands: Any) -> tuple[Tensor, Tensor] | None:
    """Return the factors of the product of matrices that an `einsum` is; None for another one.

    >>> x, y = torch.ones(7, 7), torch.ones(2, 7, 3)
    >>> [tuple(factor.shape) for factor in _factors("bjc, ij -> bic", y, x)]
    [(7, 7), (2, 7, 3)]
    """
    labels = re.fullmatch(r"(\w+),(\w+)->(\w+)", str(equation).replace(" ", ""))
    if labels is None or len(operands) != 2:
        return None
    one, other, result = labels.groups()
    for first, second, factors in ((one, other, operands), (other, one, operands[::-1])):
        batch = max(first[:-2], second[:-2], key=len)
        if (
            len(set(batch + first[-2:] + second[-1:])) == len(result) + 1
            and first[-1:] == second[-2:-1]
            and {first[:-2], second[:-2]} <= {batch, ""}
            and result == batch + first[-2:-1] + second[-1:]
        ):
            return factors[0], factors[1]
    return None


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
        advice = f": {HEAD}" if _ATTENTION.search(kind) else ""
        return f"its channels are mixed by {kind}{advice}"
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
    size, width = math.prod(before[2:]), before[-1]
    starts = {place // size * size for place in positions}
    if all(positions.get(x) == positions.get(x + n) for x in starts for n in range(size)):
        return ""
    if max(positions) >= width and all(
        positions.get(place % width) == root for place, root in positions.items()
    ):
        return ""  # channels last
    return f"a reshape from {before} to {after}, in which its channels are not the second axis"


def _axes(operation: Any, shape: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
    """The axes that an operation works along, and the shape before padding."""
    if hasattr(operation, "_saved_indices"):
        indices = operation._saved_indices
        return [axis for axis, index in enumerate(indices) if index is not None], shape
    if hasattr(operation, "_saved_pad"):  # two numbers for each axis, from the last one on
        pads = [x - 2**64 if x >= 2**63 else x for x in operation._saved_pad]
        pads = [0] * (2 * len(shape) - len(pads)) + [
            x for i in reversed(range(0, len(pads), 2)) for x in pads[i : i + 2]
        ]
        pairs = list(zip(pads[::2], pads[1::2], strict=True))
        before = tuple(size - sum(pair) for size, pair in zip(shape, pairs, strict=True))
        return [axis for axis, pair in enumerate(pairs) if any(pair)], before
    saved = getattr(operation, "_saved_dims", getattr(operation, "_saved_dim", ()))
    saved = saved if isinstance(saved, tuple) else (saved,)
    # Negative axes are saved as unsigned numbers.
    return [(x - 2**64 if x >= 2**63 else x) % len(shape) for x in saved], shape


def shape_after(operation: Any) -> tuple[int, ...] | None:
    """Shape of what an operation returns; None where it does not say."""
    metadata = getattr(operation, "_input_metadata", None)
    return tuple(int(size) for size in metadata[0].shape) if metadata else None


def adds_axes(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Does a view of a vector, such as a norm's scale, only add axes of size 1?

    >>> adds_axes((8,), (1, 8, 1, 1)), adds_axes((8,), (2, 4))
    (True, False)
    """
    return len(before) == 1 and [size for size in after if size != 1] == list(before)


def _keeps_channels(before: tuple[int, ...], after: tuple[int, ...], width: int) -> bool:
    if adds_axes(before, after):
        return True
    if len(before) < 2 or len(after) < 2:
        return False
    if before[-1] == width != before[1]:  # channels last
        return after[-1] == width
    # Axes that go on as they are, behind samples and steps that are joined or taken apart.
    sizes = zip(reversed(before), reversed(after), strict=False)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], sizes)))
    first, split = before[: len(before) - same], after[: len(after) - same]
    # An axis of size 1 beside channels of an image is for what works along them, as in LRN.
    for_channels = len(before) > 2 and len(first) > 0 and split == (*first, 1)
    if width in before[1:] and before.index(width, 1) >= len(first) and not for_channels:
        return True
    flat = 2 in (len(before), len(after)) and before[0] == after[0]
    return flat or before[:2] == after[:2]
