r"""Preconditioner D of an optimizer, summed over groups, and the proximal step in its metric.

Everything walks over the weights in chunks: where nothing is compiled, such that stay in the cache.
D is computed anew in every pass, from what the optimizer keeps: a pass takes as long as reading
memory does, and D of its own would be as much again to write and read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Chunk, Member, chunks, joined, laid_along
from lightning_wgsef.training.preconditioners import Formula, Preconditioner
from lightning_wgsef.utils.fusion import CALL, Kernel

# The largest debias * t in units of D, which it must not reach.
LARGEST = 1 - 1e-6

# Rows that a kernel sums at once, where slices run down columns: over so few it goes along memory.
_BLOCK = 8

# A function, its tensors, shaped like weights, and its numbers that give D of them.
_Metric = tuple[Callable[..., Tensor], Sequence[Tensor], Sequence[float | Tensor]]

# Compiled, a weight here saves so many times the time that one of n:m does.
_OPERATIONS = 4


class GroupPreconditioner:
    """The diagonal metric in which ``optimizer`` steps, for groups that it trains.

    A parameter that has not taken a step yet, or takes none any more, has D = 1. `refresh` finds
    where D is to be read.
    """

    def __init__(self, groups: Groups, optimizer: Optimizer, preconditioner: Preconditioner):
        self.groups = groups
        self.optimizer = optimizer
        self.preconditioner = preconditioner
        self._settings = {
            id(parameter): param_group
            for param_group in optimizer.param_groups
            for parameter in param_group["params"]
        }
        work = _OPERATIONS * sum(member.weights.numel() for member in groups.layout.members)
        self._cut(all(kernel.pays(work) for kernel in (_SQUARES, _TANGENTS, _SCALING)))
        self._metrics: list[_Metric] = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Look up what gives D in the state of the optimizer as it is now."""
        self._metrics = [self._metric_of(member) for member in self.groups.layout.members]

    def norms(self) -> Tensor:
        r"""Return the norm of every group, :math:`(\sum D_i \theta_i^2)^{1/2}`, shape (m,)."""
        return self._sums(_SQUARES, self.groups.dtype)[0].sqrt_()

    def means(self) -> Tensor:
        """Return the mean of D over every group, shape (m,)."""
        (total,) = self._sums(_TOTALS, self.groups.dtype)
        return total / self.groups.sizes.to(total)

    def sums(self, shares: Tensor, thresholds: Tensor, debias: float) -> tuple[Tensor, Tensor]:
        """Return what `metric_shares` asks for at these shares: two sums over every group, (m,)."""
        squares, slopes = self._sums(_TANGENTS, debias, shares, thresholds)
        return squares.double(), slopes.double()

    def scale_(
        self, shares: Tensor, thresholds: Tensor, debias: float, allowed: Tensor | None
    ) -> None:
        r"""Apply the prox with these shares, in place: multiply by D u / ((D - γt) u + t)."""
        for chunk, values, metric, per_slice in self._walk(shares, thresholds):
            self._apply(_SCALING, chunk, metric, values, debias, allowed, *per_slice)

    def _metric_of(self, member: Member) -> _Metric:
        """Return what gives D of a member's weights; its tensors lie in memory as these do."""
        weights, parameter = member.weights, member.parameter
        state, settings = self.optimizer.state.get(parameter), self._settings.get(id(parameter))
        if not state or settings is None:
            return _as_it_is, [torch.ones_like(weights, dtype=self.groups.dtype)], ()
        own = {
            key: member.own(value) if _is_like(value, parameter) else value
            for key, value in state.items()
        }
        of = self.preconditioner
        if isinstance(of, Formula):
            metric, tensors, numbers = of.of, of.tensors(own, settings), of.numbers(own, settings)
        else:
            metric, tensors, numbers = _as_it_is, [of(own, settings)], ()
        alike = [
            x
            if x.stride() == weights.stride()
            else torch.empty_like(weights, dtype=x.dtype).copy_(x)
            for x in tensors
        ]
        return metric, alike, numbers

    def _apply(self, kernel: Kernel, chunk: Chunk, metric: _Metric, *given: Any) -> Any:
        """Apply a function to a chunk: compiled where that pays, else operation by operation."""
        of, tensors, numbers = metric
        if self._compiles and chunk.rows is not None and tensors[0].numel() >= CALL:
            # In the precision of D: that is how operations take them one by one.
            precise = torch.promote_types(tensors[0].dtype, torch.float32)
            device = tensors[0].device
            exact = [torch.as_tensor(x, dtype=precise, device=device) for x in numbers]
            compiled = [*given, of, *tensors, *exact]
            kind = str([(x.dim(), x.dtype) if isinstance(x, Tensor) else x for x in compiled])
            result = kernel(*compiled, kind=kind)
            if result is not None:
                return result
            self._cut(compiles=False)
        return kernel.function(*given, of, *tensors, *numbers)

    def _cut(self, compiles: bool) -> None:
        """Cut members into chunks: whole ones for kernels, else such as the cache holds."""
        self._compiles = compiles
        self._chunks = [
            list(chunks(member, member.weights.numel()) if compiles else chunks(member))
            for member in self.groups.layout.members
        ]

    def _sums(self, kernel: Kernel, setting: Any, *per_group: Tensor) -> list[Tensor]:
        """Sum over every group the terms that a function has for values, D, per-group numbers."""
        totals: dict[int, list[list[Tensor]]] = {}
        for chunk, values, metric, per_slice in self._walk(*per_group):
            axes, blocks = chunk.summed, 0
            if self._compiles and chunk.rows is not None and axes == (0,):
                blocks = 0 if len(values) % _BLOCK else len(values) // _BLOCK
            if blocks:
                values, axes = values.view(blocks, _BLOCK, -1), (1,)
                metric = metric[0], [x.view(blocks, _BLOCK, -1) for x in metric[1]], metric[2]
            sums = self._apply(kernel, chunk, metric, values, axes, setting, *per_slice)
            if blocks:
                sums = [total.sum(0) for total in sums]
            parts = [chunk.of_slices(total) for total in sums]
            totals.setdefault(id(chunk.member), []).append(parts)
        per_member = [
            [joined(member, list(parts)) for parts in zip(*totals[id(member)], strict=True)]
            for member in self.groups.layout.members
        ]
        return [self.groups.layout.gathered(terms) for terms in zip(*per_member, strict=True)]

    def _walk(
        self, *per_group: Tensor
    ) -> Iterator[tuple[Chunk, Tensor, _Metric, tuple[Tensor, ...]]]:
        """Yield every chunk with its values, its part of D and the numbers of groups along it.

        The numbers are shares and thresholds: 1 and 0 leave what is in no group as it is.
        """
        outside = (1.0, 0.0)
        per_member = [
            self.groups.layout.spread(vector.to(self.groups.dtype), rest)
            for vector, rest in zip(per_group, outside, strict=False)
        ]
        for number, member in enumerate(self.groups.layout.members):
            laid = [laid_along(member, vectors[number]) for vectors in per_member]
            metric, tensors, numbers = self._metrics[number]
            for chunk in self._chunks[number]:
                own = metric, [chunk.of(tensor) for tensor in tensors], numbers
                yield chunk, chunk.of(member.weights), own, tuple(map(chunk.part, laid))


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0


def _as_it_is(metric: Tensor) -> Tensor:
    return metric


# Of what follows, ``of`` and ``given`` are the parts of a `_Metric`.


def _squares(
    values: Tensor,
    axes: tuple[int, ...],
    dtype: torch.dtype,
    of: Callable[..., Tensor],
    *given: Any,
) -> list[Tensor]:
    return [_summed(values.to(dtype).square() * of(*given).to(dtype), axes)]


def _totals(
    values: Tensor,
    axes: tuple[int, ...],
    dtype: torch.dtype,
    of: Callable[..., Tensor],
    *given: Any,
) -> list[Tensor]:
    return [_summed(of(*given).to(dtype), axes)]


def _tangents(
    values: Tensor,
    axes: tuple[int, ...],
    debias: float,
    share: Tensor,
    threshold: Tensor,
    of: Callable[..., Tensor],
    *given: Any,
) -> list[Tensor]:
    """Return the two sums of `Sums` over ``axes``; what is given broadcasts with the values."""
    metric = of(*given).to(share.dtype)
    limited = _limited(threshold, metric, debias)
    reduced = metric if debias == 0 else metric - debias * limited
    denominators = reduced * share + limited
    ratios = metric / denominators
    squares = (ratios * values.to(metric.dtype)).square()
    if debias > 0:
        squares, ratios = squares * limited / threshold, reduced / denominators
    return [_summed(squares, axes), _summed(ratios * squares, axes)]


def _scaling(
    values: Tensor,
    debias: float,
    allowed: Tensor | None,
    share: Tensor,
    threshold: Tensor,
    of: Callable[..., Tensor],
    *given: Any,
) -> Tensor:
    """Multiply values by the factors of `GroupPreconditioner.scale_`, in place."""
    metric = of(*given).to(share.dtype)
    limited = _limited(threshold, metric, debias)
    kept = metric * share
    # Like this, the factor of a share of 1 is exactly 1 where debias is.
    factors = kept / (kept + (limited if debias == 0 else limited * (1 - debias * share)))
    if allowed is not None:
        factors = torch.where(allowed, factors, 1)
    return values.mul_(factors.to(values.dtype))


def _limited(thresholds: Tensor, metric: Tensor, debias: float) -> Tensor:
    """Return t where D > debias t, which the debiased form needs, else the largest such t."""
    return thresholds if debias == 0 else torch.minimum(thresholds, LARGEST / debias * metric)


def _summed(terms: Tensor, axes: tuple[int, ...]) -> Tensor:
    return terms.sum(axes) if axes else terms


_SQUARES = Kernel(_squares, "norms in a metric")
_TOTALS = Kernel(_totals, "means of a metric")
_TANGENTS = Kernel(_tangents, "a metric")
_SCALING = Kernel(_scaling, "scaling in a metric")
