"""Running statistics of norms that read the outputs of groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from lightning_wgsef.network.example_input import batch_size, evaluation, reason_of, run_example
from lightning_wgsef.network.sharding import is_sharded


@dataclass(frozen=True, eq=False)
class NormStatistics:
    r"""Running mean and variance of a norm whose inputs are what groups make and nothing else.

    When the group of channel c shrinks by f, so does the norm's input there: its mean becomes
    :math:`f \mu_c` and its variance :math:`f^2 \sigma_c^2`, exactly. The buffers are looked up
    when they are scaled: moving a model to a device replaces them.

    Attributes:
        name: canonical name of the norm.
        module: the norm.
        index: group of every channel, -1 for none; None: channel i belongs to group i.

    >>> norm = nn.BatchNorm1d(2)
    >>> NormStatistics("1", norm).scale_(torch.tensor([0.5, 1.0]))
    >>> norm.running_var.tolist()
    [0.25, 1.0]
    """

    name: str
    module: nn.Module
    index: Tensor | None = None

    @torch.no_grad()
    def scale_(self, factors: Tensor) -> None:
        """Follow the factor of every channel, shape (channels,), in place."""
        for name, scale in (("running_mean", factors), ("running_var", factors.square())):
            buffer = getattr(self.module, name)
            # Multiplied in full precision and rounded once, as weights are.
            buffer.mul_(scale.to(torch.promote_types(buffer.dtype, torch.float32)))


def has_statistics(module: object) -> bool:
    """Does the module keep running statistics, all of them on this process?

    >>> has_statistics(nn.BatchNorm1d(2)), has_statistics(nn.InstanceNorm1d(2))
    (True, False)
    """
    buffers = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
    return isinstance(module, _NormBase) and all(
        isinstance(x, Tensor) and not is_sharded(x) and not isinstance(x, nn.UninitializedBuffer)
        for x in buffers
    )


@contextmanager
def means_over_calls(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Estimate running statistics anew: the means over all calls while the block runs.

    The norms are in training mode then; their modes are the caller's to bring back.

    >>> norm, x = nn.BatchNorm1d(2), torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    >>> with means_over_calls([norm]):
    ...     _ = norm(x), norm(x + 1)
    >>> norm.running_mean.tolist(), norm.momentum
    ([2.5, 4.5], 0.1)
    """
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def estimate_statistics(network: nn.Module, inputs: Iterable[Any]) -> None:
    """Estimate the running statistics of BatchNorm anew, as means over batches.

    One sample has no variance: a last batch that has no more is left out where others have.

    Raises:
        ValueError: the network does not run in training mode on a batch.

    >>> network, x = nn.Sequential(nn.BatchNorm1d(2)), torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    >>> estimate_statistics(network, [x, x])
    >>> network[0].running_mean
    tensor([2., 4.])
    """
    norms = [x for x in network.modules() if isinstance(x, _BatchNorm) and has_statistics(x)]
    if not norms:
        return
    given = list(inputs)
    with evaluation(network), means_over_calls(norms):
        for batch in [x for x in given if batch_size(x) > 1] or given:
            try:
                run_example(network, batch)
            except ValueError as error:
                raise ValueError(
                    "batches must hold what the statistics of BatchNorm can be estimated on, such "
                    f"as more than one sample each, got {batch_size(batch)}: {reason_of(error)}"
                ) from error
