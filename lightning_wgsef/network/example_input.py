"""Example inputs, and forward passes on them that are observed, copied or perturbed."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.data import DataLoader, Dataset
from torch.utils.hooks import RemovableHandle

from lightning_wgsef.network.layers import canonical_name, computed_weight, unwrap

# Plain attributes of a module that are larger than this are data, which copies share.
_FEW, _MANY, _LARGE = 20, 1000, 1_000_000


def run_example(model: nn.Module, example_input: Any) -> Any:
    """What ``model`` makes of a tensor, a tuple of the arguments of ``forward``, or a dict of them.

    Tensors are moved to the model's device.

    Raises:
        ValueError: the forward pass fails; names the shapes that were given.

    >>> run_example(nn.Linear(2, 1), (nn.Linear(3, 2).weight,)) # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: example_input must be what Linear takes, a tensor, a tuple of its ...
    """
    inputs = on_device_of(model, example_input)
    try:
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    except Exception as error:
        given = mapped(
            lambda x: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__, inputs
        )
        raise ValueError(
            f"example_input must be what {type(model).__name__} takes, a tensor, a tuple of its "
            f"arguments or a dict of them, got {given}: {type(error).__name__}: {error}"
        ) from error


def reason_of(error: BaseException) -> str:
    """What went wrong: the words of the cause, or its kind where it has none.

    >>> reason_of(ValueError("too few")), reason_of(AssertionError())
    ('too few', 'AssertionError')
    """
    cause = error.__cause__ or error
    return str(cause).strip() or type(cause).__name__


def on_device_of(model: nn.Module, example_input: Any) -> tuple[Any, ...] | dict[str, Any]:
    """The arguments of ``forward``, tensors on the device of the model's first parameter.

    >>> on_device_of(nn.Linear(2, 1), torch.ones(1, 2))[0].device
    device(type='cpu')
    """
    device = next((parameter.device for parameter in model.parameters()), None)
    return mapped(lambda x: x.to(device) if isinstance(x, Tensor) else x, example_input)


def mapped(function: Callable[[Any], Any], example_input: Any) -> tuple[Any, ...] | dict[str, Any]:
    """The arguments of ``forward``, each replaced by what ``function`` makes of it.

    >>> mapped(len, ("a", "bc")), mapped(len, {"x": "abc"}), mapped(len, "ab")
    ((1, 2), {'x': 3}, (2,))
    """
    if isinstance(example_input, Mapping):
        return {name: function(value) for name, value in example_input.items()}
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    return tuple(function(value) for value in inputs)


def random_like(example_input: Any, seed: int = 0) -> Any:
    """Another example: numbers drawn with the same mean and spread, others in another order.

    >>> random_like((torch.tensor([[3, 4, 5]]), "mean"))[0].sort().values
    tensor([[3, 4, 5]])
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.numel():
            return value
        if not value.is_floating_point():
            order = torch.randperm(value.numel(), generator=generator).to(value.device)
            return value.flatten()[order].view(value.shape)
        noise = torch.randn(value.shape, generator=generator).to(value)
        spread = value.std() if value.numel() > 1 and bool(value.std() > 0) else 1.0
        return noise * spread + value.mean()

    return mapped(drawn, example_input)


def rolled(example_input: Any) -> Any:
    """Return the example with its samples, along the first axis, in another order.

    >>> rolled(torch.tensor([1, 2, 3]))[0]
    tensor([3, 1, 2])
    """
    return mapped(lambda x: x.roll(1, 0) if isinstance(x, Tensor) and x.dim() else x, example_input)


@torch.no_grad()
def accepted_variation(
    model: nn.Module, example_input: Any, *others: Any
) -> tuple[Any, ...] | dict[str, Any] | None:
    """Return an example unlike the given one that the network takes; None where it takes none.

    Some inputs have a meaning: sorted lengths, corners of boxes, indices within a range. What the
    network refuses of a variation stays as it was given.

    Args:
        model: any module; it is run as it is.
        example_input: an example that it takes.
        others: variations of it, in the order in which they are tried; none: random numbers, and
            other samples first.

    >>> steps = nn.Embedding(3, 2)
    >>> accepted_variation(steps, torch.tensor([0, 2]), torch.tensor([7, 2]), torch.tensor([1, 2]))
    (tensor([1, 2]),)
    """
    given = mapped(lambda x: x, example_input)
    for other in others or (random_like(example_input), rolled(example_input)):
        varied = mapped(lambda x: x, other)
        if _takes(model, varied) and not _alike(given, varied):
            return varied
        names = given if isinstance(given, dict) else range(len(given))
        best: Any = dict(given) if isinstance(given, dict) else list(given)
        for name in names:
            trial = copy.copy(best)
            trial[name] = varied[name]  # type: ignore[index]
            if _takes(model, trial if isinstance(trial, dict) else tuple(trial)):
                best = trial
        found = best if isinstance(best, dict) else tuple(best)
        if not _alike(given, found):
            return found
    return None


def _takes(model: nn.Module, example_input: Any) -> bool:
    try:
        run_example(model, example_input)
    except ValueError:
        return False
    return True


def _alike(one: Any, other: Any) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(a.to(b.device), b) for a, b in pairs)


def doubled(example_input: Any, other: Any | None = None) -> Any:
    """Join the example and another along the first axis: norms train on two samples at least.

    >>> doubled(torch.ones(1, 3))[0].shape
    torch.Size([2, 3])
    """
    other = mapped(lambda x: x, random_like(example_input) if other is None else other)
    pairs = iter(other.values() if isinstance(other, dict) else other)

    def joined(value: Any) -> Any:
        second = next(pairs)
        if not isinstance(value, Tensor) or not value.dim():
            return value
        return torch.cat([value, second.to(value.device)])

    return mapped(joined, example_input)


def model_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model (inside a compiled one); Lightning leaves the trainer out of it.

    Raises:
        ValueError: it cannot be copied.
    """
    model = unwrap(model)
    try:
        copied = copy.deepcopy(model, {id(data): data for data in _data(model)})
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied, which its graph needs: "
            f"{_what_cannot_be_copied(model)}{type(error).__name__}: {error}; make "
            "copy.deepcopy(model) work"
        ) from error
    for parameter, other in zip(model.parameters(), copied.parameters(), strict=True):
        if not other.is_leaf:  # TorchScript's copies are results of a function, and not trained
            other.detach_().requires_grad_(parameter.requires_grad)
    for module in copied.modules():
        # Lightning compiles methods in place: their copies would run the model itself.
        own = [
            x for x, value in vars(module).items() if hasattr(value, "_torchdynamo_orig_callable")
        ]
        for name in own if not hasattr(module, "_orig_mod") else ():
            delattr(module, name)
    return copied


def _data(model: nn.Module) -> Iterator[Any]:
    """Yield what modules hold of data, which a copy may share: data sets, loaders, arrays."""
    numpy = sys.modules.get("numpy")
    kinds: tuple[Any, ...] = (Dataset, DataLoader, *([numpy.ndarray] if numpy else []))
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            values = value if isinstance(value, list | tuple) and len(value) < _FEW else [value]
            for x in values:
                large = isinstance(x, Tensor) and x.numel() > _LARGE and x.grad_fn is None
                many = isinstance(x, list | tuple | dict) and len(x) > _MANY
                if isinstance(x, kinds) or large or many:
                    yield x


def _what_cannot_be_copied(model: nn.Module) -> str:
    """Name the attribute that stands against a copy, and how it is helped."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules", "_trainer"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                where = f"{canonical_name(path)}.{name}".lstrip(".")
                if isinstance(value, Tensor):
                    return f"'{where}': {computed_weight(module, name)}: "
                return f"'{where}' ({type(value).__name__}): "
    return ""


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


def batch_size(example_input: Any) -> int:
    """Return the number of samples of an example: the length of its first tensor; 1 without one.

    >>> batch_size((torch.ones(5, 3), "x")), batch_size({"mode": "sum"})
    (5, 1)
    """
    inputs = mapped(lambda value: value, example_input)
    given = inputs.values() if isinstance(inputs, dict) else inputs
    first = next((value for value in given if isinstance(value, Tensor)), None)
    return max(1, len(first)) if first is not None and first.dim() else 1


def with_batch_size(example_input: Any, size: int) -> tuple[Any, ...] | dict[str, Any]:
    """The arguments of ``forward`` with the batch repeated and cut to ``size`` samples.

    The first axis of the first tensor is the batch, and of every tensor that is as long there.

    Raises:
        ValueError: there is no batch.

    >>> with_batch_size((torch.tensor([1, 2]), torch.ones(3), "x"), 5)
    (tensor([1, 2, 1, 2, 1]), tensor([1., 1., 1.]), 'x')
    """
    inputs = mapped(lambda value: value, example_input)
    given = inputs.values() if isinstance(inputs, dict) else inputs
    first = next((value for value in given if isinstance(value, Tensor)), None)
    if first is None or not first.dim() or not len(first):
        found = "no tensor" if first is None else f"shape {tuple(first.shape)}"
        raise ValueError(f"example_input must begin with a tensor of samples, got {found}")
    batch = len(first)

    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != batch:
            return value
        return value[torch.arange(size, device=value.device) % batch]

    return mapped(resized, example_input)


@contextmanager
def seeded(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Random numbers of torch, Python and numpy as from a seed; what they were is restored.

    >>> with seeded(nn.Identity()):
    ...     first = torch.rand(1)
    >>> with seeded(nn.Identity()):
    ...     bool(torch.rand(1) == first)
    True
    """
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            if device.type == "cpu":  # the other notes the call stack for all other kinds of device
                torch.default_generator.manual_seed(seed)
            else:
                torch.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(arrays)


@contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, with the mode of every module restored."""
    with ExitStack() as undo:
        for model in models:
            for module in model.modules():
                undo.callback(setattr, module, "training", module.training)
            model.eval()
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where its first parameter is; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


Call = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any]

Return = Callable[[str, nn.Module, tuple[Any, ...], Any], None]


def _without_checkpoint(function: Callable[..., Any], _: bool, *inputs: Any) -> Any:
    return function(*inputs)


@contextmanager
def observed(
    modules: Mapping[str, nn.Module], before: Call | None = None, after: Return | None = None
) -> Iterator[None]:
    """Announce every call of some modules while the block runs.

    Args:
        modules: by name.
        before: called with the name, the module, and the arguments of its forward; may return
            others, as a tuple and a dict, in their place.
        after: called with the name, the module, its arguments by position, and what it returned.

    >>> layer = nn.Linear(2, 3)
    >>> shapes = []
    >>> with observed({"fc": layer}, after=lambda name, *call: shapes.append(call[-1].shape)):
    ...     _ = layer(torch.ones(1, 2))
    >>> shapes
    [torch.Size([1, 3])]
    """
    with ExitStack() as undo:
        # The fast path of torch's attention passes by the layers inside.
        undo.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        compiled = "torch._dynamo" in sys.modules
        if compiled and hasattr(torch.compiler, "set_stance"):  # it ignores hooks set after it
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        if "torch.utils.checkpoint" in sys.modules:  # the reentrant kind hides what lies inside
            reentrant = torch.utils.checkpoint.CheckpointFunction
            undo.enter_context(patch.object(reentrant, "apply", _without_checkpoint))
        # Of several operations of a compiled module it makes one, after some passes.
        undo.enter_context(torch.jit.optimized_execution(False))  # type: ignore[attr-defined]  # torch names it in no __all__
        for name, module in modules.items():
            if before is not None:
                undo.callback(add_call_hook(module, partial(before, name)).remove)
            if after is not None:

                def leave(own: Any, args: Any, _: Any, output: Any, name: str = name) -> None:
                    after(name, own, args, output)

                undo.callback(add_return_hook(module, leave).remove)
        yield


def add_call_hook(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """Call ``hook(module, args, named)`` before every call of a module.

    Modules that TorchScript has compiled take no hooks, and are told from all that are called.

    >>> layer, seen = nn.ReLU(), []
    >>> handle = add_call_hook(layer, lambda module, args, named: seen.append(len(args)))
    >>> _ = nn.Sequential(layer, nn.Tanh())(torch.ones(2))
    >>> seen
    [1]
    """
    if not isinstance(module, torch.jit.ScriptModule):
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def call(called: nn.Module, args: Any) -> None:
        if called is module:
            hook(called, args, {})

    return register_module_forward_pre_hook(call)


def add_return_hook(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """Call ``hook(module, args, named, output)`` after every call of a module, as `add_call_hook`.

    >>> layer, seen = nn.ReLU(), []
    >>> handle = add_return_hook(layer, lambda module, args, named, output: seen.append(output))
    >>> _ = layer(torch.ones(2))
    >>> seen
    [tensor([1., 1.])]
    """
    if not isinstance(module, torch.jit.ScriptModule):
        return module.register_forward_hook(hook, with_kwargs=True)

    def call(called: nn.Module, args: Any, output: Any) -> None:
        if called is module:
            hook(called, args, {}, output)

    # Of one with keyword arguments torch keeps a trace, which keeps torch.compile from its work.
    return register_module_forward_hook(call)


@torch.no_grad()
def perturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy in evaluation mode with random biases, scales and statistics.

    Tensors that are all zero, as pruned or fresh networks have them, become random, too: they would
    hide what does not vanish. Signs are such that what is left of a zero channel behind a norm is
    positive: a ReLU would hide the rest.

    >>> bool((perturbed(nn.BatchNorm1d(3)).running_mean < 0).all())
    True
    """
    copied = model_copy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
        if tensor.is_floating_point() and (tensor.dim() == 1 or not tensor.any()):
            noise = torch.randn(tensor.shape, generator=generator).abs().add_(0.1)
            if name.endswith("running_mean"):
                noise.neg_()
            tensor.copy_(noise if tensor.dim() == 1 else noise / 10)
    return copied
