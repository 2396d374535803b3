"""Random problems for the envelope's pure functions, and how far an answer is from the oracle's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tests.helpers.oracles import envelope as oracle

TOLERANCE = 1e-6  # the promise: worst relative error against the oracle
# Multipliers and gaps below this are compared in absolute terms. A multiplier is u / (u + ...), and
# u is the difference of two numbers of its own order of rounding, so that a relative error means
# nothing near zero.
FLOOR = 1e-6


def relative_error(got: ArrayLike, want: ArrayLike, floor: float = 0.0) -> float:
    """Worst |got - want| / max(|want|, floor); infinite where `got` is not a number."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    difference = np.abs(got - want)
    error = np.where(difference == 0, 0, difference / np.maximum(np.abs(want), max(floor, 1e-300)))
    return float(np.where(np.isnan(error), np.inf, error).max(initial=0.0))


def tensor(values: ArrayLike, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=dtype)


def loguniform(
    rng: np.random.Generator, low: float, high: float, size: int | tuple[int, ...]
) -> np.ndarray:
    return np.exp(rng.uniform(math.log(low), math.log(high), size))


@dataclasses.dataclass
class Problems:
    """Many problems: rows of arrays, padded with norm zero, and their flat form.

    In the flat form the groups of all problems are mixed at random; within a problem their order is
    kept.
    """

    norms: np.ndarray
    weights: np.ndarray
    costs: np.ndarray
    k: np.ndarray
    sizes: np.ndarray
    rng: np.random.Generator

    def __post_init__(self) -> None:
        labels = self.rng.permutation(np.repeat(np.arange(len(self.sizes)), self.sizes))
        self._positions = np.argsort(labels, kind="stable")
        self._mask = np.arange(self.norms.shape[1]) < self.sizes[:, None]
        self.segments = torch.as_tensor(labels)

    def flat(self, rows: np.ndarray) -> Tensor:
        """Rows (problems, most groups) to a flat tensor."""
        values = np.empty(len(self._positions))
        values[self._positions] = rows[self._mask]
        return tensor(values)

    def rows(self, flat: Tensor) -> np.ndarray:
        """A flat tensor to rows, zero in the padding."""
        rows = np.zeros(self.norms.shape)
        rows[self._mask] = flat.double().numpy()[self._positions]
        return rows

    def groups(self, *, costs: bool = True) -> dict[str, Tensor]:
        """Keyword arguments for the module under test."""
        arguments = {"weights": self.flat(self.weights), "segments": self.segments}
        return arguments | ({"costs": self.flat(self.costs)} if costs else {})

    def multipliers(self, env: ModuleType, step: Any, **options: Any) -> np.ndarray:
        """Rows of the module's multipliers."""
        norms, k = self.flat(self.norms), tensor(self.k)
        return self.rows(env.prox_multipliers(norms, step, k, **self.groups(), **options))

    def exact_multipliers(self, step: Any, debias: float) -> np.ndarray:
        """Rows of the oracle's multipliers."""
        return oracle.prox_multipliers(self.norms, step, self.k, self.weights, self.costs, debias)

    def __iter__(self) -> Iterator[tuple[np.ndarray, float, np.ndarray, np.ndarray, int]]:
        """Each problem without its padding: norms, k, weights, costs, and its row."""
        for row, size in enumerate(self.sizes):
            one = slice(size)
            yield (
                self.norms[row, one],
                self.k[row],
                self.weights[row, one],
                self.costs[row, one],
                row,
            )


def random_problems(
    rng: np.random.Generator,
    count: int,
    groups: int = 6,
    *,
    unit_costs: bool = False,
    unit_weights: bool = False,
) -> Problems:
    """Problems that differ in size, scale, spread, zeros, ties, weights, costs and budget."""
    shape = (count, groups)
    column = (count, 1)
    sizes = rng.integers(1, groups + 1, count)
    inside = np.arange(groups) < sizes[:, None]
    norms = loguniform(rng, 1e-3, 1e3, column) * np.exp(
        rng.normal(size=shape) * rng.uniform(0.05, 2.5, column)
    )
    some_dead = rng.random(column) < 0.25
    norms[(some_dead & (rng.random(shape) < 0.4)) | ~inside] = 0
    weights = np.where(rng.random(column) < 0.4, 1.0, np.exp(rng.normal(size=shape)))
    kind = rng.integers(0, 3, column)
    costs = np.select(
        [kind == 0, kind == 1],
        [np.ones(shape), rng.integers(1, 5, shape).astype(float)],
        np.exp(0.7 * rng.normal(size=shape)),
    )
    tied = rng.random(count) < 0.2
    norms[tied] = rng.integers(1, 3, (tied.sum(), groups)) * inside[tied]
    weights[tied] = costs[tied] = kind[tied] = 1
    if unit_weights:
        weights = np.ones(shape)
    if unit_costs:
        costs, kind = np.ones(shape), np.zeros(column)
    total = (costs * inside).sum(axis=1)
    k = rng.uniform(0.05, 1, count) * total
    whole = (kind[:, 0] < 2) & (rng.random(count) < 0.6)
    k = np.where(whole, np.maximum(1, np.round(k)), k)
    k = np.where(rng.random(count) < 0.1, rng.uniform(1, 2, count) * total, k)
    return Problems(norms, weights, costs, k, sizes, rng)


def random_steps(rng: np.random.Generator, weights: np.ndarray, debias: float) -> np.ndarray:
    """Steps from 1e-6 to 10, or with a debias to just below 1 / (debias * weight)."""
    count = len(weights)
    if debias == 0:
        return loguniform(rng, 1e-6, 10, count)
    part = np.where(
        rng.random(count) < 0.5,
        loguniform(rng, 1e-6, 1, count),
        1 - loguniform(rng, 1e-7, 1, count),
    )
    return np.minimum(part / (debias * weights.max(axis=1)), 10)
