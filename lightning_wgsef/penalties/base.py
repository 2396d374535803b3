"""What every penalty offers: its value, and the factors of its proximal step."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lightning_wgsef.penalties.segments import Segments


class Penalty(Protocol):
    """A penalty whose proximal step scales every group by one number.

    The arguments are those of `prox_multipliers` and `envelope_value`.
    """

    def value(
        self,
        norms: Tensor,
        k: float | Tensor,
        *,
        weights: Tensor | None = None,
        costs: Tensor | None = None,
        segments: Tensor | int | Segments | None = None,
    ) -> Tensor:
        """The penalty in every segment, shape (S,)."""

    def multipliers(
        self,
        norms: Tensor,
        step: float | Tensor,
        k: float | Tensor,
        *,
        weights: Tensor | None = None,
        costs: Tensor | None = None,
        segments: Tensor | int | Segments | None = None,
        debias: float = 0.0,
    ) -> Tensor:
        """The factor of every group, shape (m,)."""
