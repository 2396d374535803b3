"""Layout of groups in memory: the slices of every group, measured, weighed and scaled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.sharding import counted_here, local_member
from lightning_wgsef.network.sharding import is_sharded


class Layout:
    """Where the weights of groups lie, those of one layer after the other.

    Where parameters are sharded over processes, every process has to make it.

    Attributes:
        members: the members of all layers; of sharded parameters, what lies on this process.
        starts: the first group of every layer.

    Args:
        layers: the grouped layers.
        dtype: in which norms are measured.
        device: where vectors over all groups, shape (m,), are.
        normalised: are weights measured of the layers that ask for it?
    """

    def __init__(
        self,
        layers: Sequence[GroupedLayer],
        *,
        dtype: torch.dtype,
        device: torch.device,
        normalised: bool,
    ) -> None:
        self.members = [local_member(member) for layer in layers for member in layer.members]
        self._counts = [layer.count for layer in layers]
        self._total = sum(self._counts)
        counts = torch.tensor(self._counts, dtype=torch.long)
        self.starts = (counts.cumsum(0) - counts).to(device)
        self._repeats = counts.to(device)
        self._dtype = dtype
        self._device = device
        self._is_normalised = normalised and any(layer.layer_normalised for layer in layers)
        self._is_sharded = any(is_sharded(member.parameter) for member in self.members)
        self._slices = [member.slices for member in self.members]
        self._index = self._groups_of_slices(layers)
        self._counted = self._counted_slices()
        self._own_weights = joined_layers([x.weights for x in layers], self._counts, dtype, device)
        self._statistics = [
            (norm, self._places(norm.index, int(first), layer.count).to(device))
            for layer, first in zip(layers, counts.cumsum(0) - counts, strict=True)
            for norm in layer.statistics
        ]

    @cached_property
    def weights(self) -> Tensor | None:
        """Penalty weights w_j, shape (m,), as measured last; None: 1."""
        return self._normalised(self.norms()) if self._is_normalised else self._own_weights

    def weigh(self, norms: Tensor) -> None:
        """Measure the weights of layers that are ``layer_normalised`` anew.

        Args:
            norms: of the groups as they are, shape (m,).
        """
        if self._is_normalised:
            self.weights = self._normalised(norms)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Measure every group's norm, shape (m,), in float32 (float64 for float64 weights)."""
        slices = [member.norms(self._dtype) for member in self.members]
        if self._counted is None:
            return torch.cat(slices) if slices else torch.zeros(0, dtype=self._dtype)
        return self.gathered([norms.square_() for norms in slices]).sqrt_()

    @torch.no_grad()
    def alive(self) -> Tensor:
        """Tell which groups have a weight that is not exactly zero: booleans, shape (m,)."""
        return self.gathered([member.nonzeros() for member in self.members]) > 0

    @torch.no_grad()
    def scale_(self, factors: Tensor) -> None:
        """Multiply every group by its factor, shape (m,), in place; statistics of norms follow."""
        self.scale_statistics_(factors)
        for member, per_slice in zip(self.members, self.spread(factors, 1.0), strict=True):
            # Not rounded to the weights' precision where that is low: the product is, once.
            precise = torch.promote_types(member.parameter.dtype, torch.float32)
            member.scale_(per_slice.to(precise))

    @torch.no_grad()
    def scale_statistics_(self, factors: Tensor) -> None:
        """Let running statistics follow weights that were scaled by these factors, shape (m,)."""
        if self._statistics:
            padded = torch.cat([factors, factors.new_ones(1)])
            for norm, places in self._statistics:
                norm.scale_(padded[places])

    def spread(self, per_group: Tensor, outside: float) -> tuple[Tensor, ...]:
        """Give every slice of each member its group's number, ``outside`` if it has no group."""
        if self._index is not None:
            per_group = torch.cat([per_group, per_group.new_full((1,), outside)])[self._index]
        return torch.split_with_sizes(per_group, self._slices)

    def gathered(self, per_slice: Sequence[Tensor]) -> Tensor:
        """Sum a number of every slice of each member over the slices of each group, shape (m,).

        Where parameters are sharded over processes, every process has to ask, and gets the sum
        over all of them.
        """
        slices = torch.cat(list(per_slice)) if per_slice else torch.zeros(0)
        if self._counted is None:
            return slices
        # One place more, where what is in no group goes.
        totals = slices.new_zeros(self._total + 1).index_add_(0, self._counted, slices)[:-1]
        if self._is_sharded:
            totals = totals.contiguous()
            torch.distributed.all_reduce(totals)
        return totals

    def _groups_of_slices(self, layers: Sequence[GroupedLayer]) -> Tensor | None:
        """Return the group of every slice, m for none; None: slice i is group i."""
        alone = all(len(layer.members) == 1 for layer in layers)
        if alone and all(member.index is None for member in self.members):
            return None
        indices, first, left = [], 0, iter(self.members)
        for layer in layers:
            for member in islice(left, len(layer.members)):
                indices.append(self._places(member.index, first, layer.count))
            first += layer.count
        joined = torch.cat(indices)
        in_order = len(joined) == self._total and bool((joined == torch.arange(self._total)).all())
        # What lies here in order is summed with what lies on other processes all the same.
        return None if in_order and not self._is_sharded else joined.to(self._device)

    def _places(self, index: Tensor | None, first: int, count: int) -> Tensor:
        """Number the groups of a layer's slices among all groups, m for none."""
        own = torch.arange(count) if index is None else index.cpu()
        return torch.where(own < 0, self._total, own + first)

    def _counted_slices(self) -> Tensor | None:
        """Return `_index` with m for what another process counts, too."""
        if self._index is None or not self._is_sharded:
            return self._index
        parts = torch.split_with_sizes(self._index, self._slices)
        mine = zip(parts, counted_here(self.members), strict=True)
        return torch.cat([x if own else torch.full_like(x, self._total) for x, own in mine])

    def _normalised(self, norms: Tensor) -> Tensor:
        """Divide every layer's weights by the mean square of its groups' norms.

        Without it, the layer whose groups grow fastest wins a competition of all layers: groups of
        one layer are more alike than layers are.
        """
        squares = norms.double().square()
        means = torch.stack([x.mean() for x in torch.split_with_sizes(squares, self._counts)])
        means = torch.where(means > 0, means, 1)
        per_group = means.repeat_interleave(self._repeats, output_size=self._total)
        own = 1 if self._own_weights is None else self._own_weights
        return (own / per_group).to(self._dtype)


def joined_layers(
    values: Sequence[Tensor | None], counts: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Join vectors over the groups of every layer, 1 where there is none; None if all are None."""
    if all(value is None for value in values):
        return None
    ones = [torch.ones(n) if v is None else v for n, v in zip(counts, values, strict=True)]
    return torch.cat([value.to(device, dtype) for value in ones])
