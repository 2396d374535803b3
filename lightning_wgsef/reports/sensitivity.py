"""Sensitivity of the loss to every layer: what it becomes when a layer's weakest groups are cut."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]  # it has no types

from lightning_wgsef.groupings.budget import DEFAULT_K, alike_budgets
from lightning_wgsef.groupings.group_parameters import group_parameters
from lightning_wgsef.groupings.patterns import by_pattern
from lightning_wgsef.groupings.weights import MEASURED
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.importance import measure_importance
from lightning_wgsef.groups.norm_statistics import estimate_statistics
from lightning_wgsef.groups.size import SlimSize
from lightning_wgsef.network.example_input import batch_size, evaluation, model_copy
from lightning_wgsef.network.labelled_batches import Loss, checked_pairs, loss_of
from lightning_wgsef.utils.files import write_json
from lightning_wgsef.utils.tables import format_table
from lightning_wgsef.utils.validation import check_model

Pairs = Sequence[tuple[Any, Any]]

LEVELS = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer, or set of layers whose channels are tied.

    Attributes:
        name: its name.
        grouping: what its groups are.
        groups: how many there are.
        kept: how many stay at every level.
        losses: of the network in which only these stay, and all other layers are whole.
        proposed: how many stay by the proposed k.
    """

    name: str
    grouping: str
    groups: int
    kept: tuple[int, ...]
    losses: tuple[float, ...]
    proposed: int


@dataclass(frozen=True)
class SensitivityReport:
    """What the loss becomes when the weakest groups of a layer are cut.

    Attributes:
        loss: of the whole network.
        samples: on how many samples losses were measured.
        levels: shares of a layer's groups that stay.
        layers: the layers, in the order of the network.
        unit: of sizes: "FLOPs" (of one sample), "parameters", "bytes"; "groups", or "cost".
        size: of the whole network.
        limit: the largest size that k allows.
        proposed_size: of the network that the proposed k leaves.
        proposed_loss: its loss.
        alike_size: of the network in which every layer keeps the same share of its groups.
        alike_loss: its loss.
    """

    loss: float
    samples: int
    levels: tuple[float, ...]
    layers: tuple[LayerSensitivity, ...]
    unit: str
    size: float
    limit: float
    proposed_size: float
    proposed_loss: float
    alike_size: float
    alike_loss: float

    @property
    def k(self) -> dict[str, int]:
        """The proposed budgets, for `WGSEFCallback` or `prune`: numbers by patterns of names."""
        return by_pattern({layer.name: layer.proposed for layer in self.layers})

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "k": self.k}

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `as_dict` to a file, which gets its name only when it is whole.

        Raises:
            ValueError: a path that cannot be written.
        """
        write_json(self.as_dict(), path)

    def __str__(self) -> str:
        header = ["layer", "groups", *(f"loss, {level:.0%} stay" for level in self.levels), "k"]
        rows = [
            [x.name, f"{x.groups}", *(f"{loss:.4g}" for loss in x.losses), f"{x.proposed}"]
            for x in self.layers
        ]
        return "\n".join(
            [
                format_table(header, rows),
                f"loss of the whole network: {self.loss:.4g}, on {self.samples:,} samples",
                f"with k: {self._said(self.proposed_size)}, loss {self.proposed_loss:.4g}",
                f"the same share of every layer: {self._said(self.alike_size)}, loss "
                f"{self.alike_loss:.4g}",
                f"k = {self.k}",
            ]
        )

    def _said(self, size: float) -> str:
        return f"{size:,.0f} of {self.size:,.0f} {self.unit} ({size / self.size:.1%})"


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    k: int | float | str = DEFAULT_K,
    *,
    levels: Sequence[float] = LEVELS,
    **options: Any,
) -> SensitivityReport:
    r"""Measure which layers can take what, and propose a k for every layer.

    Of one layer after another all but the strongest groups are cut, the running statistics of
    BatchNorm are estimated anew, and the loss is measured. With :math:`L_l(n)` the lowest convex
    function below the losses of layer l with n of its groups, the proposal is

    .. math:: \arg\min_n \sum_l L_l(n_l) \quad\text{s.t.}\quad S(n) \le K

    to within a group, found by taking out, one after another, the groups that cost the least loss
    for what they free of the size S, and of no layer more than the lowest level unless they have to
    go. It is compared with the same share of every layer, and gives way to it where that loses
    less. All losses are of statistics that were estimated on the same batches, and say nothing of
    what training brings back.

    Args:
        model: a trained network; it is copied, not touched.
        batches: pairs of inputs and targets, such as a DataLoader; the first 32 are used. Each
            layer takes two passes over them for every level, one without BatchNorm.
        loss: of outputs and targets, a tensor of one number; None: cross entropy.
        k: the size for which k is proposed: a share, of the FLOPs of the whole network; a size such
            as "4 MB"; or a number of groups.
        levels: shares of a layer's groups that stay, in (0, 1).
        options: other arguments of `group_parameters`. ``grouping`` is "structure", ``weights``
            "taylor" and, where k is a share, ``costs`` "flops" unless they are named;
            ``example_input`` is the first of the inputs.

    Returns:
        The losses, as text, as `plot_report` draws them and as JSON; its ``k`` is the proposal.

    Raises:
        ValueError: levels outside their range, batches that are no pairs or do not fit, a loss that
            is none, or what `group_parameters` refuses.

    >>> network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 3))
    >>> report = sensitivity(network, [(torch.randn(8, 4), torch.arange(8) % 3)])
    >>> [(layer.name, layer.groups, layer.kept) for layer in report.layers]
    [('0', 16, (12, 8, 4)), ('2', 8, (6, 4, 2))]
    >>> report.proposed_size <= report.limit
    True
    """
    check_model("model", model)
    levels = _checked_levels(levels)
    if "scope" in options:
        raise ValueError(
            "scope is no argument of sensitivity, whose k is the size of all layers together and "
            f"which proposes one for each, got {options['scope']!r}"
        )
    if isinstance(k, Mapping):
        raise ValueError(
            "k must be the size of all layers together, such as 0.5 or '4 MB': a number for every "
            f"layer is what sensitivity proposes, got {k!r}"
        )
    pairs = checked_pairs(model, batches, loss)
    network = model_copy(model)
    named = {
        "grouping": "structure",
        "weights": "taylor",
        "costs": "flops" if isinstance(k, float) else None,
        "example_input": pairs[0][0],
        **options,
        "scope": "global",
    }
    groups = group_parameters(network, k=k, **named)
    if named["weights"] in MEASURED:
        measure_importance(network, groups, named["weights"], pairs, loss)
    cuts = _Cuts(network, groups)
    kept = [cuts.numbers(place, levels) for place in range(len(groups.layers))]
    limit = float(groups.budgets[0])
    alike = [int(x.budget) for x in alike_budgets(cuts.size, groups.layers, limit)]
    tried = sum(len(set(row)) for row in kept) + 3
    with tqdm(total=tried, desc="sensitivity", unit="network", disable=None) as bar:

        def loss_with(counts: Sequence[int]) -> float:
            value = cuts.loss(counts, pairs, loss)
            bar.update()
            return value

        dense = groups.counts
        whole = loss_with(dense)
        if not math.isfinite(whole):
            raise ValueError(f"loss must be finite of the whole network, got {whole}")
        found = [{count: whole} for count in dense]
        for place, row in enumerate(kept):
            for number in dict.fromkeys(row):
                if number not in found[place]:
                    counts = [*dense[:place], number, *dense[place + 1 :]]
                    found[place][number] = loss_with(counts)
        proposed = cuts.proposal(found, limit)
        alike_loss, proposed_loss = loss_with(alike), loss_with(proposed)
    if not proposed_loss < alike_loss:
        proposed, proposed_loss = alike, alike_loss
    layers = zip(groups.layers, kept, found, proposed, strict=True)
    return SensitivityReport(
        loss=whole,
        samples=sum(batch_size(inputs) for inputs, _ in pairs),
        levels=levels,
        layers=tuple(
            LayerSensitivity(
                x.name, x.grouping, x.count, tuple(row), tuple(losses[n] for n in row), own
            )
            for x, row, losses, own in layers
        ),
        unit=cuts.size.unit or ("groups" if groups.costs is None else "cost"),
        size=float(cuts.size.total),
        limit=limit,
        proposed_size=cuts.size_of(proposed),
        proposed_loss=proposed_loss,
        alike_size=cuts.size_of(alike),
        alike_loss=alike_loss,
    )


class _Cuts:
    """Networks in which the strongest groups of every layer stay, so many of each.

    Attributes:
        size: of the network by the groups alive.
    """

    def __init__(self, network: nn.Module, groups: Groups) -> None:
        self.network, self.groups = network, groups
        size = SlimSize.of_costs(groups.layers) if groups.size is None else groups.size
        self.size = size.to(groups.device)
        self.bounds = [(*layer.bounds, layer.multiple) for layer in groups.layers]
        norms = groups.norms()
        groups.layout.weigh(norms)
        strengths = norms if groups.weights is None else norms * groups.weights.sqrt()
        self.places = groups.limits.ranks(strengths)
        state = [*network.parameters(), *network.buffers()]
        self.state = [(own, own.detach().clone()) for own in state]

    def alive(self, counts: Sequence[int]) -> Tensor:
        """Return which groups stay, booleans, shape (m,)."""
        return (
            self.places < torch.tensor(counts, device=self.places.device)[self.groups.limits.owner]
        )

    def size_of(self, counts: Sequence[int]) -> float:
        """Return the size of the network."""
        return float(self.size.of(self.alive(counts)))

    def numbers(self, place: int, levels: Sequence[float]) -> list[int]:
        """Return how many groups of a layer stay at every level, within its limits."""
        least, most, multiple = self.bounds[place]
        nearest = [level * self.groups.counts[place] / multiple for level in levels]
        return [max(least, min(most, math.floor(x + 0.5) * multiple)) for x in nearest]

    @torch.no_grad()
    def loss(self, counts: Sequence[int], pairs: Pairs, loss: Loss | None) -> float:
        """Return the mean loss, with BatchNorm's statistics as means over the batches."""
        self.groups.scale_(self.alive(counts).to(self.groups.dtype))
        estimate_statistics(self.network, [inputs for inputs, _ in pairs])
        total = samples = 0.0
        with evaluation(self.network):
            for number, pair in enumerate(pairs):
                size = batch_size(pair[0])
                total += size * float(loss_of(self.network, pair, number, loss))
                samples += size
        for own, before in self.state:
            own.copy_(before)
        return total / samples

    def proposal(self, found: Sequence[Mapping[int, float]], limit: float) -> list[int]:
        """Take out the groups whose loss is the least for what they free, until the rest fits.

        The last may have freed more than was needed: what still fits comes back, the dearest loss
        first.

        Args:
            found: of every layer losses by how many groups stay.
            limit: of the size.
        """
        curves = [_lowest_convex(losses) for losses in found]
        counts = [most for _, most, _ in self.bounds]

        def price(place: int, step: int) -> tuple[bool, float]:
            """Whether the loss is unknown; and what a step costs of it, for a unit of size."""
            fewer = min(counts[place], counts[place] + step)
            if fewer < curves[place][0][0]:
                return True, -fewer / self.groups.counts[place]
            lost = _at(curves[place], fewer) - _at(curves[place], fewer + abs(step))
            return False, lost / max(self._freed(counts, place, step), _SLACK)

        while self.size_of(counts) > limit * (1 + _SLACK):
            steps = [
                (price(place, -multiple), place, -multiple)
                for place, (least, _, multiple) in enumerate(self.bounds)
                if counts[place] - multiple >= least
            ]
            if not steps:
                break
            _, place, step = min(steps)
            counts[place] += step
        while True:
            steps = [
                (price(place, multiple), place, multiple)
                for place, (_, most, multiple) in enumerate(self.bounds)
                if counts[place] + multiple <= most
                and self.size_of(counts) + self._freed(counts, place, multiple) <= limit
            ]
            if not steps:
                return counts
            _, place, step = max(steps)
            counts[place] += step

    def _freed(self, counts: Sequence[int], place: int, step: int) -> float:
        """Return by how much the size changes with a step of one layer."""
        other = [*counts[:place], counts[place] + step, *counts[place + 1 :]]
        return abs(self.size_of(counts) - self.size_of(other))


Corners = Sequence[tuple[int, float]]


def _lowest_convex(losses: Mapping[int, float]) -> Corners:
    """Return the corners of the lowest convex function below losses, by how many groups stay.

    >>> _lowest_convex({8: 1.0, 6: 2.0, 4: 2.0, 2: 7.0})
    [(2, 7.0), (4, 2.0), (8, 1.0)]
    """
    corners: list[tuple[int, float]] = []
    for n, value in sorted(losses.items()):
        while len(corners) > 1:
            (n0, first), (n1, second) = corners[-2:]
            if (second - first) * (n - n0) < (value - first) * (n1 - n0):
                break
            corners.pop()
        corners.append((n, value))
    return corners


def _at(corners: Corners, n: int) -> float:
    """Return a function that is linear between its corners.

    >>> _at([(2, 7.0), (4, 2.0), (8, 1.0)], 3)
    4.5
    """
    for (n0, first), (n1, second) in pairwise(corners):
        if n <= n1:
            return first + (second - first) * (n - n0) / (n1 - n0)
    return corners[-1][1]


def _checked_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Return levels in falling order; raise `ValueError` unless they are shares in (0, 1)."""
    given = list(levels) if isinstance(levels, Iterable) else [levels]
    if not given or not all(isinstance(x, float) and 0 < x < 1 for x in given):
        raise ValueError(f"levels must be shares of a layer's groups in (0, 1), got {levels!r}")
    return tuple(sorted(set(given), reverse=True))


# Sums are rounded.
_SLACK = 1e-12
