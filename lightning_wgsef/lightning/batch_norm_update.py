"""Estimation of BatchNorm's running statistics anew, from the last training batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from lightning_wgsef.groups.norm_statistics import has_statistics, means_over_calls
from lightning_wgsef.network.example_input import device_of, evaluation

_STATISTICS = ("running_mean", "running_var")

# Of the batches that are remembered, all but one: what inputs may take of an accelerator's memory.
MOST_BYTES = 2**28


class BatchNormUpdate:
    """Running statistics estimated from what a model was given in its last training batches.

    What a training step calls, be it the model or modules in it, is noted with its arguments; calls
    inside of these are not. `update` makes the same calls again with the weights as they are;
    `restore` takes that back.

    Args:
        model: the module that is trained.
        batches: how many batches are remembered, or as many as fit into 256 MiB.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> estimate, inputs = BatchNormUpdate(network, batches=1), torch.randn(64, 2)
    >>> estimate.start()
    >>> _ = network(inputs)
    >>> estimate.update()
    >>> torch.allclose(network[1].running_mean, network[0](inputs).mean(0), atol=1e-6)
    True
    """

    def __init__(self, model: nn.Module, batches: int) -> None:
        self.model = model
        self._norms = [
            x for x in model.modules() if isinstance(x, _BatchNorm) and has_statistics(x)
        ]
        self._batches: deque[list[tuple[nn.Module, Any, Any]]] = deque(maxlen=batches)
        self._trained: list[_BatchNorm] = []
        self._noting = False
        self._inside: list[nn.Module] = []
        self._as_trained: dict[_BatchNorm, list[Tensor]] = {}
        self._hooks = [
            hook
            for module in (_called(model) if self._norms else ())
            for hook in (
                module.register_forward_pre_hook(self._note, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            )
        ]

    def __deepcopy__(self, _: object) -> BatchNormUpdate:
        """Return itself: a copy of the model has no training batches, nor another copy of these."""
        return self

    def start(self) -> None:
        """Begin with a batch: calls are noted from here on."""
        while len(self._batches) > 1 and _bytes(self._batches) > MOST_BYTES:
            self._batches.popleft()
        self._batches.append([])
        self._trained = [norm for norm in self._norms if norm.training]
        self.resume()

    def pause(self) -> None:
        """Note no calls: a backward pass may repeat some."""
        self._noting = False

    def resume(self) -> None:
        """Note calls of the same batch again."""
        self._noting = True
        self._inside.clear()

    def remove(self) -> None:
        """Forget all batches, and note none any more."""
        for hook in self._hooks:
            hook.remove()
        self._batches.clear()

    def update(self) -> None:
        """Replace the running statistics by those of the remembered batches.

        Norms that the user keeps in evaluation mode stay as they are, as do all other buffers,
        modes and random numbers. Outside of the norms the network is in evaluation mode. If a call
        fails nothing has changed.
        """
        self.pause()
        self.restore()
        calls = [call for batch in self._batches for call in batch]
        if not calls or not self._trained:
            return
        device = device_of(self.model)
        with ExitStack() as undo:
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.no_grad())
            undo.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            undo.enter_context(evaluation(self.model))
            for buffer in self.model.buffers():
                if not self._is_estimated(buffer):
                    undo.callback(buffer.copy_, buffer.clone())
            self._as_trained = {
                norm: [getattr(norm, x).clone() for x in _STATISTICS] for norm in self._trained
            }
            failed = undo.enter_context(ExitStack())
            failed.callback(self.restore)
            undo.enter_context(means_over_calls(self._trained))
            for module, args, named in calls:
                # What is compiled would be compiled once more, for other modes.
                getattr(module, "_orig_mod", module)(*args, **named)
            failed.pop_all()
            self._restore([norm for norm in self._trained if not norm.num_batches_tracked])

    def restore(self) -> None:
        """Bring back the running statistics as they were trained."""
        self._restore(list(self._as_trained))

    def _restore(self, norms: list[_BatchNorm]) -> None:
        for norm in norms:
            for name, values in zip(_STATISTICS, self._as_trained.pop(norm), strict=True):
                getattr(norm, name).copy_(values)

    def _is_estimated(self, buffer: Tensor) -> bool:
        return any(buffer is getattr(norm, x) for norm in self._trained for x in _STATISTICS)

    def _note(self, module: nn.Module, args: Any, named: Any) -> None:
        if not self._noting or torch.compiler.is_compiling() or _is_redirected(module):
            return
        if not self._inside:
            self._batches[-1].append((module, *tree_map(_kept, (args, named))))
        self._inside.append(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._noting and self._inside and self._inside[-1] is module:
            self._inside.pop()


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module and those in it, but for what is compiled: a hook is compiled with it."""
    scripted = isinstance(module, torch.jit.ScriptModule)  # which takes no hooks, nor has norms
    if scripted or getattr(module, "_compiled_call_impl", None) is not None:
        return
    yield module
    if not hasattr(module, "_orig_mod"):
        for child in module.children():
            yield from _called(child)


def _bytes(batches: Iterable[Any]) -> int:
    return sum(x.nbytes for x in tree_leaves(list(batches)) if isinstance(x, Tensor))


def _is_redirected(module: nn.Module) -> bool:
    """Does Lightning run the training step by calling the module, as it does under DDP?"""
    return "_ForwardRedirection" in getattr(module.forward, "__qualname__", "")


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def silent(module: Any) -> Iterator[None]:
    """Log nothing of what the module's forward logs while the block runs."""
    names = ("log", "log_dict")
    for name in names:
        module.__dict__[name] = lambda *args, **named: None
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]


def check_batches(update_bn: object) -> None:
    """Raise `ValueError` unless it is a number of batches."""
    if not isinstance(update_bn, int) or isinstance(update_bn, bool) or update_bn < 0:
        raise ValueError(f"update_bn must be a number of batches >= 0 (int), got {update_bn!r}")
