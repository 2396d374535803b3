"""FLOPs of layers, of whole networks, and of operations by their shapes, as torch counts them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_wgsef.network.example_input import device_of, evaluation, observed, run_example
from lightning_wgsef.network.layers import modules_by_name, weighted_layers


def layer_flops(model: nn.Module, example_input: Any) -> tuple[dict[str, int], int]:
    """FLOPs of every weighted layer that one forward pass calls, and of the whole pass.

    They are torch's own count, two a multiply-add, over all calls of a layer. The whole includes
    operations outside of layers, as in attention. Raises `ValueError` if the forward pass fails.

    >>> shared = nn.Linear(4, 4)
    >>> layer_flops(nn.Sequential(nn.Linear(3, 4), shared, shared), torch.ones(1, 3))
    ({'0': 24, '1': 64}, 88)
    """
    counter = FlopCounterMode(display=False)
    flops: dict[str, int] = {}

    def before(name: str, *_: object) -> None:
        flops[name] = flops.get(name, 0) - counter.get_total_flops()

    def after(name: str, *_: object) -> None:
        flops[name] += counter.get_total_flops()

    layers = {layer.name: layer.module for layer in weighted_layers(model)}
    with _counting(model), observed(layers, before, after), counter:
        run_example(model, example_input)
    return flops, counter.get_total_flops()


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation of a forward pass that counts, such as a product of matrices.

    Attributes:
        name: of torch's operator.
        within: those of the modules asked for that it ran in, the outermost first.
        arguments: as they were given, tensors as their shapes; the last is what it returned.
        named: arguments by name.
    """

    name: str
    within: tuple[str, ...]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    formula: Callable[..., int]

    @property
    def sizes(self) -> list[int]:
        """The sizes of all axes of all arguments, in order."""
        return [size for shape in self.arguments if _is_shape(shape) for size in shape]

    def flops(self, sizes: Sequence[int]) -> int:
        """Count what it would cost with these sizes of its axes."""
        left = iter(sizes)
        *given, returned = [
            torch.Size([next(left) for _ in x]) if _is_shape(x) else x for x in self.arguments
        ]
        return int(self.formula(*given, **self.named, out_val=returned))


def operations(
    model: nn.Module, example_input: Any, blocks: Collection[str] = ()
) -> list[Operation]:
    """List the operations of one forward pass that count, in order.

    Args:
        model: it is run in evaluation mode.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        blocks: names of modules of which it is noted what ran in them.

    >>> found = operations(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.ones(5, 4))
    >>> [(x.name, x.flops(x.sizes)) for x in found]
    [('addmm', 120), ('addmm', 60)]
    """
    found: list[Operation] = []
    inside: list[str] = []

    def noting(name: str, formula: Callable[..., int]) -> Callable[..., int]:
        def note(*given: Any, out_val: Any = None, **named: Any) -> int:
            shaped = tuple(x.shape if isinstance(x, Tensor) else x for x in (*given, out_val))
            named = {key: x.shape if isinstance(x, Tensor) else x for key, x in named.items()}
            found.append(Operation(name, tuple(inside), shaped, named, formula))
            return int(formula(*given, out_val=out_val, **named))

        note._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
        return note

    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            packet: noting(str(packet).rpartition(".")[2], formula)
            for packet, formula in flop_registry.items()
        },
    )
    modules = {name: x for name, x in modules_by_name(model).items() if name in blocks}

    def enter(name: str, *_: object) -> None:
        inside.append(name)

    def leave(name: str, *_: object) -> None:
        inside.remove(name)

    with _counting(model), observed(modules, enter, leave), counter:
        run_example(model, example_input)
    return found


@contextmanager
def _counting(model: nn.Module) -> Iterator[None]:
    # torch counts the fused attention of GPUs, but not that of CPUs.
    gpu = device_of(model).type == "cuda"
    attention = nullcontext() if gpu else sdpa_kernel(SDPBackend.MATH)
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with evaluation(model), torch.no_grad(), attention, _unfused() if recurrent else nullcontext():
        yield


@contextmanager
def _unfused() -> Iterator[None]:
    """Run recurrent layers as products of matrices: torch counts none of their fused kernels."""
    backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    before = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


def _is_shape(value: object) -> bool:
    return isinstance(value, torch.Size)
