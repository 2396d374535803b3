r"""Importance of groups, measured from the gradients that training computes anyway.

What the loss would lose with a group is, to first order, :math:`\sum_{i \in j} g_i \theta_i`, and
with a diagonal Fisher information :math:`\tfrac12 \sum_{i \in j} g_i^2 \theta_i^2` (Molchanov et
al., "Importance estimation for neural network pruning", 2019, arXiv 1906.10771; LeCun, Denker and
Solla, "Optimal brain damage", 1990). The penalty weight of a group is the running mean of that over
its squared norm,

.. math:: w_j = \operatorname{mean}_t \frac{(\sum_{i \in j} g_i \theta_i)^2}{\|\theta_j\|^2}
          \quad\text{("taylor")}, \qquad
          w_j = \operatorname{mean}_t \frac{\sum_{i \in j} g_i^2 \theta_i^2}{\|\theta_j\|^2}
          \quad\text{("fisher")},

so that :math:`w_j \|\theta_j\|^2` estimates what dies with it, in one unit for all layers, and the
envelope is that loss under a budget, made convex.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Member
from lightning_wgsef.network.example_input import evaluation
from lightning_wgsef.network.labelled_batches import Loss, check_finite, loss_of

# Decay of the running mean: over about a hundred steps.
_DECAY = 0.99


class Importance:
    """Running means of what groups are worth, as the penalty weights of ``groups``.

    A checkpoint has them as those. Groups that are zero, or were left without a gradient, keep what
    they had; the first that is measured is taken as it is.

    Args:
        groups: whose weights are measured.
        kind: "taylor" or "fisher".

    >>> from lightning_wgsef.groups.grouped_layer import GroupedLayer
    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    >>> weight.grad = torch.tensor([[1.0, 1.0], [5.0, 0.5]])
    >>> rows = GroupedLayer("fc", "filter", 2, (Member("fc.weight", weight, axes=(0,)),))
    >>> groups = Groups([rows])
    >>> Importance(groups, "taylor").measure(taken=0, allowed=None)
    >>> groups.weights  # 7^2 / 5^2 and 1^2 / 2^2
    tensor([1.9600, 0.2500])
    """

    def __init__(self, groups: Groups, kind: str) -> None:
        self.groups, self.kind = groups, kind
        self._before: list[Tensor] | None = None
        # Next to nothing, and less than anything measured, whose place the first one takes.
        self._unknown = torch.finfo(groups.dtype).tiny
        groups.weights = torch.full(
            (len(groups),), self._unknown, dtype=groups.dtype, device=groups.device
        )

    def remember(self) -> None:
        """Keep the weights as they are, at which the next step's gradients are computed."""
        self._before = [member.weights.clone() for member in self.groups.layout.members]

    @torch.no_grad()
    def measure(self, taken: int, allowed: Tensor | None) -> None:
        """Take the gradients of a step into the running means.

        Where parameters are sharded every process has to measure.

        Args:
            taken: number of proximal steps so far.
            allowed: a boolean, shape (): nothing changes where it is false; None: true.
        """
        layout = self.groups.layout
        before, self._before = self._before, None
        values = [member.weights for member in layout.members] if before is None else before
        pairs = [
            _sums(member, value, self.kind, self.groups.dtype)
            for member, value in zip(layout.members, values, strict=True)
        ]
        saved = layout.gathered([part for part, _ in pairs])
        squares = layout.gathered([part for _, part in pairs])
        saved = saved.square() if self.kind == "taylor" else saved
        own = self.groups.weights
        assert own is not None
        share = (1 - _DECAY) / (1 - _DECAY ** (taken + 1))
        ratio = saved / torch.where(squares > 0, squares, 1)
        shares = torch.full_like(own, share).masked_fill_(own <= self._unknown, 1.0)
        mean = torch.lerp(own, ratio.to(own.dtype), shares).clamp(min=2 * self._unknown)
        known = (squares > 0) & ratio.isfinite() & self._have_gradients()
        self.groups.weights = torch.where(known if allowed is None else known & allowed, mean, own)

    def _have_gradients(self) -> Tensor | bool:
        """Return which groups have a gradient of any member, booleans (m,); True: all of them."""
        members = iter(self.groups.layout.members)
        own = [list(islice(members, len(layer.members))) for layer in self.groups.layers]
        found = [any(member.parameter.grad is not None for member in part) for part in own]
        if all(found):
            return True
        counts = torch.tensor(self.groups.counts)
        return torch.tensor(found).repeat_interleave(counts).to(self.groups.device)


def measure_importance(
    network: nn.Module,
    groups: Groups,
    kind: str,
    pairs: Iterable[tuple[Any, Any]],
    loss: Loss | None,
) -> None:
    """Measure the weights of groups on batches, in evaluation mode; gradients are left at None.

    Raises:
        ValueError: inputs, targets or a loss that do not go together, or a loss that is not finite
            or has no gradient.
    """
    importance = Importance(groups, kind)
    with evaluation(network), torch.enable_grad():
        for number, pair in enumerate(pairs):
            network.zero_grad()
            value = loss_of(network, pair, number, loss)
            check_finite(value, number)
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]  # torch gives none
            if all(member.parameter.grad is None for member in groups.layout.members):
                raise ValueError(
                    f"weights={kind!r} is measured from gradients, of which the loss of batches"
                    f"[{number}] has none by the grouped weights: return one that can be "
                    "differentiated (no argmax, nothing detached), or take weights='layer_norm'"
                )
            importance.measure(number, None)
    network.zero_grad()


def _sums(member: Member, value: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sum what is saved, and the squares, over every slice of a member."""
    weights = member.seen(value).to(dtype)
    summed = [axis for axis in range(weights.dim()) if axis not in member.axes]

    def over_slices(values: Tensor) -> Tensor:
        return (values.sum(summed) if summed else values).flatten()

    squares = over_slices(weights.square())
    gradient = member.parameter.grad
    if gradient is None:
        return torch.zeros_like(squares), squares
    products = weights * member.seen(member.own(gradient)).to(dtype)
    return over_slices(products if kind == "taylor" else products.square()), squares
