r"""Preconditioner D of an optimizer, summed over groups, and the proximal step in its metric.

Everything walks over the weights in chunks that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Chunk, chunks, joined, laid_along
from lightning_wgsef.training.preconditioners import Preconditioner

# The largest debias * t in units of D, which it must not reach.
LARGEST = 1 - 1e-6


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
        self._chunks = [list(chunks(member)) for member in groups.layout.members]
        self._diagonals: list[Tensor] = []
        self._scratch: dict[tuple[int, torch.Size], Tensor] = {}

    @torch.no_grad()
    def refresh(self) -> None:
        """Read D from the state of the optimizer as it is now."""
        if not self._diagonals:
            self._diagonals = [
                torch.empty_like(member.weights, dtype=self.groups.dtype)
                for member in self.groups.layout.members
            ]
        for member, diagonal in zip(self.groups.layout.members, self._diagonals, strict=True):
            parameter = member.parameter
            state = self.optimizer.state.get(parameter)
            if not state:
                diagonal.fill_(1)
                continue
            settings = self._settings.get(id(parameter), {})
            shaped = {
                key: member.own(value)
                for key, value in state.items()
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim()
            }
            alike = all(value.is_contiguous() for value in shaped.values())
            for chunk in chunks(member) if alike else [Chunk(member, None)]:
                parts = {**state, **{key: chunk.of(value) for key, value in shaped.items()}}
                chunk.of(diagonal).copy_(self.preconditioner(parts, settings))

    def norms(self) -> Tensor:
        r"""Return the norm of every group, :math:`(\sum D_i \theta_i^2)^{1/2}`, shape (m,)."""

        def weighed(values: Tensor, metric: Tensor, _: tuple[Tensor, ...]) -> tuple[Tensor]:
            buffer = self._buffer(0, metric)
            return (torch.mul(values, values, out=buffer).mul_(metric),)

        return self._sums(weighed)[0].sqrt_()

    def means(self) -> Tensor:
        """Return the mean of D over every group, shape (m,)."""
        (total,) = self._sums(lambda _, metric, __: (metric,))
        return total / self.groups.sizes.to(total)

    def sums(self, shares: Tensor, thresholds: Tensor, debias: float) -> tuple[Tensor, Tensor]:
        """Return what `metric_shares` asks for at these shares: two sums over every group, (m,)."""

        def terms(
            values: Tensor, metric: Tensor, per_slice: tuple[Tensor, ...]
        ) -> tuple[Tensor, Tensor]:
            share, threshold = per_slice
            squares, denominators = self._buffer(0, metric), self._buffer(1, metric)
            limited = _limited(threshold, metric, debias)
            reduced = metric if debias == 0 else metric - debias * limited
            torch.mul(reduced, share, out=denominators).add_(limited)
            torch.mul(metric, values, out=squares).div_(denominators).square_()
            if debias > 0:
                squares.mul_(limited).div_(threshold)
            return squares, torch.div(reduced, denominators, out=denominators).mul_(squares)

        squares, slopes = self._sums(terms, shares, thresholds)
        return squares.double(), slopes.double()

    def scale_(
        self, shares: Tensor, thresholds: Tensor, debias: float, allowed: Tensor | None
    ) -> None:
        r"""Apply the prox with these shares, in place: multiply by D u / ((D - γt) u + t)."""
        for chunk, metric, (share, threshold) in self._walk(shares, thresholds):
            factors, denominators = self._buffer(0, metric), self._buffer(1, metric)
            limited = _limited(threshold, metric, debias)
            torch.mul(metric, share, out=factors)
            if debias == 0:
                torch.add(factors, limited, out=denominators)
            else:
                # Like this, the factor of a share of 1 is exactly 1 where debias is.
                torch.mul(limited, 1 - debias * share, out=denominators).add_(factors)
            factors.div_(denominators)
            if allowed is not None:
                factors = torch.where(allowed, factors, 1)
            values = chunk.of(chunk.member.weights)
            values.mul_(factors.to(values.dtype))

    def _buffer(self, slot: int, like: Tensor) -> Tensor:
        """Return memory for what is computed of a chunk, the same for every chunk of a shape."""
        key = slot, like.shape
        if key not in self._scratch:
            self._scratch[key] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return self._scratch[key]

    def _sums(
        self,
        of: Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
        *per_group: Tensor,
    ) -> list[Tensor]:
        """Sum over every group the terms that ``of`` makes of values, D and per-group numbers."""
        totals: dict[int, list[list[Tensor]]] = {}
        for chunk, metric, per_slice in self._walk(*per_group):
            values = chunk.of(chunk.member.weights).to(metric.dtype)
            parts = [chunk.sum(term) for term in of(values, metric, per_slice)]
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


def _limited(thresholds: Tensor, metric: Tensor, debias: float) -> Tensor:
    """Return t where D > debias t, which the debiased form needs, else the largest such t."""
    return thresholds if debias == 0 else torch.minimum(thresholds, LARGEST / debias * metric)
