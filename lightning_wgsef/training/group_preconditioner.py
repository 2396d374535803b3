r"""Preconditioner D of an optimizer, summed over groups, and the proximal step in its metric.

Everything walks over the weights in chunks: where nothing is compiled, such that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Chunk, chunks, joined, laid_along
from lightning_wgsef.training.preconditioners import Formula, Preconditioner
from lightning_wgsef.utils.fusion import CALL, SLAB, Kernel

# The largest debias * t in units of D, which it must not reach.
LARGEST = 1 - 1e-6

# Rows that a kernel sums at once, where slices run down columns: over so few it goes along memory.
_BLOCK = 8

# Compiled, a weight here saves so many times the time that one of n:m does.
_OPERATIONS = 4


class _Part(Mapping[str, Any]):
    """The state of a parameter, whose entries are cut to a chunk when they are asked for."""

    def __init__(self, state: Mapping[str, Any], chunk: Chunk) -> None:
        self._state, self._chunk = state, chunk

    def __getitem__(self, key: str) -> Any:
        value, member = self._state[key], self._chunk.member
        like = _is_like(value, member.parameter)
        return self._chunk.of(member.own(value)) if like else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0


class GroupPreconditioner:
    """The diagonal metric in which ``optimizer`` steps, for groups that it trains.

    A parameter that has not taken a step yet has D = 1. D is held for all weights of the groups,
    since its square roots are expensive; `refresh` reads it from the optimizer.
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
        self._diagonals: list[Tensor] = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Read D from the state of the optimizer as it is now."""
        if not self._diagonals:
            self._diagonals = [
                torch.empty_like(member.weights, dtype=self.groups.dtype)
                for member in self.groups.layout.members
            ]
        for number, diagonal in enumerate(self._diagonals):
            for chunk in self._of_state(number):
                self._read(_DIAGONALS, chunk, chunk.of(diagonal))

    def norms(self) -> Tensor:
        r"""Return the norm of every group, :math:`(\sum D_i \theta_i^2)^{1/2}`, shape (m,)."""
        return self._sums(_SQUARES)[0].sqrt_()

    def means(self) -> Tensor:
        """Return the mean of D over every group, shape (m,)."""
        nothing = torch.empty(0, dtype=self.groups.dtype)
        totals = []
        for number, member in enumerate(self.groups.layout.members):
            sums = [
                chunk.of_slices(self._read(_TOTALS, chunk, nothing, chunk.summed))
                for chunk in self._of_state(number)
            ]
            totals.append(joined(member, sums))
        total = self.groups.layout.gathered(totals)
        return total / self.groups.sizes.to(total)

    def sums(self, shares: Tensor, thresholds: Tensor, debias: float) -> tuple[Tensor, Tensor]:
        """Return what `metric_shares` asks for at these shares: two sums over every group, (m,)."""
        squares, slopes = self._sums(_TANGENTS, shares, thresholds, debias=debias)
        return squares.double(), slopes.double()

    def scale_(
        self, shares: Tensor, thresholds: Tensor, debias: float, allowed: Tensor | None
    ) -> None:
        r"""Apply the prox with these shares, in place: multiply by D u / ((D - γt) u + t)."""
        for chunk, metric, per_slice in self._walk(shares, thresholds):
            values = chunk.of(chunk.member.weights)
            self._apply(_SCALING, chunk, values, metric, *per_slice, debias, allowed)

    def _of_state(self, number: int) -> list[Chunk]:
        """Return the chunks of a member in which the state of its parameter can be read."""
        member = self.groups.layout.members[number]
        state = self.optimizer.state.get(member.parameter, {})
        alike = all(
            member.own(value).is_contiguous()
            for value in state.values()
            if _is_like(value, member.parameter)
        )
        return self._read_chunks[number] if alike else [Chunk(member, None)]

    def _read(self, kernel: Kernel, chunk: Chunk, *given: Any) -> Any:
        """Apply a function of D, as the state of the optimizer is now, to a chunk."""
        parameter = chunk.member.parameter
        state = self.optimizer.state.get(parameter)
        if not state:
            return kernel.function(*given, torch.ones_like, chunk.of(chunk.member.weights))
        part, settings = _Part(state, chunk), self._settings.get(id(parameter), {})
        if self._compiles and isinstance(self.preconditioner, Formula):
            tensors = self.preconditioner.tensors(part, settings)
            if chunk.rows is not None and tensors[0].numel() >= CALL:
                # In the precision of D: that is how operations take them one by one.
                numbers = [
                    torch.as_tensor(x, dtype=tensors[0].dtype, device=tensors[0].device)
                    for x in self.preconditioner.numbers(state, settings)
                ]
                return self._apply(
                    kernel, chunk, *given, self.preconditioner.of, *tensors, *numbers
                )
        return kernel.function(*given, self.preconditioner, part, settings)

    def _apply(self, kernel: Kernel, chunk: Chunk, *given: Any) -> Any:
        """Apply a function to a chunk: compiled where that pays, else operation by operation."""
        numbers = max(x.numel() for x in given if isinstance(x, Tensor))
        if self._compiles and chunk.rows is not None and numbers >= CALL:
            kind = str([(x.dim(), x.dtype) if isinstance(x, Tensor) else x for x in given])
            result = kernel(*given, kind=kind)
            if result is not None:
                return result
            self._cut(compiles=False)
        return kernel.function(*given)

    def _cut(self, compiles: bool) -> None:
        """Cut members into chunks: large ones for kernels, else such as the cache holds."""
        self._compiles = compiles
        size = {"numbers": SLAB} if compiles else {}
        self._chunks = [list(chunks(member, **size)) for member in self.groups.layout.members]
        # The others read D operation by operation.
        large = isinstance(self.preconditioner, Formula)
        self._read_chunks = (
            self._chunks if large else [list(chunks(x)) for x in self.groups.layout.members]
        )

    def _sums(self, kernel: Kernel, *per_group: Tensor, **settings: float) -> list[Tensor]:
        """Sum over every group the terms that a function has for values, D, per-group numbers."""
        totals: dict[int, list[list[Tensor]]] = {}
        for chunk, metric, per_slice in self._walk(*per_group):
            values, axes = chunk.of(chunk.member.weights), chunk.summed
            blocks = self._compiles and chunk.rows is not None and axes == (0,)
            if blocks := blocks and not len(values) % _BLOCK:
                values, metric = (x.view(-1, _BLOCK, x.shape[1]) for x in (values, metric))
                axes = (1,)
            sums = self._apply(kernel, chunk, values, metric, axes, *per_slice, *settings.values())
            if blocks:
                sums = [total.sum(0) for total in sums]
            parts = [chunk.of_slices(total) for total in sums]
            totals.setdefault(id(chunk.member), []).append(parts)
        per_member = [
            [joined(member, list(parts)) for parts in zip(*totals[id(member)], strict=True)]
            for member in self.groups.layout.members
        ]
        return [self.groups.layout.gathered(terms) for terms in zip(*per_member, strict=True)]

    def _walk(self, *per_group: Tensor) -> Iterator[tuple[Chunk, Tensor, tuple[Tensor, ...]]]:
        """Yield every chunk with its part of D and the per-group numbers laid along it.

        The numbers are shares and thresholds: 1 and 0 leave what is in no group as it is.
        """
        outside = (1.0, 0.0)
        per_member = [
            self.groups.layout.spread(vector.to(self.groups.dtype), rest)
            for vector, rest in zip(per_group, outside, strict=False)
        ]
        for number, member in enumerate(self.groups.layout.members):
            laid = [laid_along(member, vectors[number]) for vectors in per_member]
            for chunk in self._chunks[number]:
                yield chunk, chunk.of(self._diagonals[number]), tuple(map(chunk.part, laid))


def _squares(values: Tensor, metric: Tensor, axes: tuple[int, ...]) -> list[Tensor]:
    return [_summed(values.to(metric.dtype).square() * metric, axes)]


def _diagonals(out: Tensor, metric: Callable[..., Tensor], *given: Any) -> Tensor:
    return out.copy_(metric(*given))


def _totals(
    like: Tensor, axes: tuple[int, ...], metric: Callable[..., Tensor], *given: Any
) -> Tensor:
    return _summed(metric(*given).to(like.dtype), axes)


def _tangents(
    values: Tensor,
    metric: Tensor,
    axes: tuple[int, ...],
    share: Tensor,
    threshold: Tensor,
    debias: float,
) -> list[Tensor]:
    """Return the two sums of `Sums` over ``axes``; what is given broadcasts with the values."""
    limited = _limited(threshold, metric, debias)
    reduced = metric if debias == 0 else metric - debias * limited
    denominators = reduced * share + limited
    squares = (metric * values.to(metric.dtype) / denominators).square()
    if debias > 0:
        squares = squares * limited / threshold
    return [_summed(squares, axes), _summed(reduced / denominators * squares, axes)]


def _scaling(
    values: Tensor,
    metric: Tensor,
    share: Tensor,
    threshold: Tensor,
    debias: float,
    allowed: Tensor | None,
) -> Tensor:
    """Multiply values by the factors of `GroupPreconditioner.scale_`, in place."""
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
_DIAGONALS = Kernel(_diagonals, "reading a metric")
_TOTALS = Kernel(_totals, "means of a metric")
_TANGENTS = Kernel(_tangents, "a metric")
_SCALING = Kernel(_scaling, "scaling in a metric")
