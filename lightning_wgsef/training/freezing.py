"""When the mask is fixed: at a step, at a share of training, or once it has converged."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from lightning_wgsef.training.schedules import check_length


def check_freeze(freeze: object) -> None:
    """Raise `ValueError` unless ``freeze`` is "converged", steps, a share of training, or None."""
    if isinstance(freeze, Real) and not isinstance(freeze, bool):
        check_length("freeze", freeze)
    elif freeze is not None and freeze != "converged":
        raise ValueError(
            "freeze must be 'converged', a number of steps (int), a share of training (float in "
            f"(0, 1]) or None, got {freeze!r}"
        )


@dataclass
class Convergence:
    """Has the set of live groups settled within the budget?

    Converged: the sparsity gap is at most ``tolerance`` of the value in every layer and the set of
    live groups has been the same for ``patience`` looks in a row.
    """

    tolerance: float = 1e-6
    patience: int = 4
    unchanged: int = 0
    alive: Tensor | None = None

    def update(self, alive: Tensor, gap: Tensor, value: Tensor) -> bool:
        """Record a look at the live groups, shape (m,), gap and value, shape (S,); converged?

        >>> convergence, within = Convergence(patience=2), torch.tensor([0.0])
        >>> alive = torch.tensor([True, False])
        >>> [convergence.update(alive, within, torch.tensor([1.0])) for _ in range(3)]
        [False, False, True]
        """
        settled = bool((gap <= self.tolerance * value).all())
        same = self.alive is not None and torch.equal(alive, self.alive)
        self.unchanged = self.unchanged + 1 if settled and same else 0
        self.alive = alive
        return self.unchanged >= self.patience
