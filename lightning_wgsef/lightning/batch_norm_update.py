"""Estimation of BatchNorm's running statistics anew, from the last training batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from lightning_wgsef.groups.norm_statistics import has_statistics
from lightning_wgsef.network.example_input import device_of, evaluation

_STATISTICS = ("running_mean", "running_var")


class BatchNormUpdate:
    """Running statistics estimated from what a model was given in its last training batches.

    What a training step calls, be it the model or modules in it, is noted with its arguments; calls
    inside of these are not. `update` makes the same calls again with the weights as they are.

    Args:
        model: the module that is trained.
        batches: how many batches are remembered.

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
        self._hooks = [
            hook
            for module in model.modules()
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
        modes and random numbers. Outside of the norms the network is in evaluation mode.
        """
        self.pause()
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
            earlier = [[getattr(norm, x).clone() for x in _STATISTICS] for norm in self._trained]
            for norm in self._trained:
                undo.callback(setattr, norm, "momentum", norm.momentum)
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all calls
                norm.train()
            for module, args, named in calls:
                module(*args, **named)
            for norm, kept in zip(self._trained, earlier, strict=True):
                if norm.num_batches_tracked == 0:  # not called
                    for name, values in zip(_STATISTICS, kept, strict=True):
                        getattr(norm, name).copy_(values)

    def _is_estimated(self, buffer: Tensor) -> bool:
        return any(buffer is getattr(norm, x) for norm in self._trained for x in _STATISTICS)

    def _note(self, module: nn.Module, args: Any, named: Any) -> None:
        if not self._noting or _is_redirected(module):
            return
        if not self._inside:
            self._batches[-1].append((module, *tree_map(_kept, (args, named))))
        self._inside.append(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._noting and self._inside and self._inside[-1] is module:
            self._inside.pop()


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
