"""Sharding of members over processes (DTensor, as FSDP2 makes them): what of them lies here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_wgsef.groups.members import Member
from lightning_wgsef.network.sharding import is_sharded, spans


@dataclass(frozen=True, eq=False)
class LocalMember(Member):
    """Shard of a member: what of its parameter lies on this process.

    Slices are those of the shard; ``index`` is the group of each.

    Attributes:
        spans: the places on every axis of the parameter that are here.
    """

    spans: tuple[range, ...] = ()

    @property
    def extent(self) -> Sequence[int]:
        """The shape of the shard."""
        return tuple(map(len, self.spans))

    @property
    def weights(self) -> Tensor:
        """The values that are here."""
        return self.own(self.parameter)

    @torch.no_grad()
    def own(self, tensor: Tensor) -> Tensor:
        """View of a tensor that is shaped like the parameter what is here."""
        if is_sharded(tensor):
            return tensor.to_local().detach()
        return tensor.detach()[tuple(slice(span.start, span.stop) for span in self.spans)]


def local_member(member: Member) -> Member:
    """Return ``member`` with the slices that lie on this process; itself if it is not sharded.

    A slice of which only some weights are here is one of the shard, of the same group.

    Raises:
        ValueError: see `spans`.
    """
    if not is_sharded(member.parameter):
        return member
    held = spans(member.parameter, member.name)
    index = torch.arange(member.slices) if member.index is None else member.index.cpu()
    axes = member.axes
    if member.at is not None:  # a shard may hold another expert: in no group, as all others are
        every = torch.full((member.parameter.shape[0], member.slices), -1)
        every[member.at] = index
        axes, index = (0, *(axis + 1 for axis in axes)), every.flatten()
    if member.shape is not None:  # a shard may begin inside a tile: every weight for itself
        along = [n if axis in axes else 1 for axis, n in enumerate(member.shape)]
        index = index.view(along).expand(member.shape).reshape(member.parameter.shape)
        axes = tuple(range(member.parameter.dim()))
    index = index.view([member.parameter.shape[axis] for axis in axes])
    here = index[tuple(slice(held[axis].start, held[axis].stop) for axis in axes)]
    return LocalMember(
        member.name, member.parameter, axes, here.flatten(), shape=None, at=None, spans=held
    )


def counted_here(members: Sequence[Member]) -> list[bool]:
    """Tell which members this process counts: of what several hold, the first one does.

    Every process has to ask.
    """
    held = [
        tuple((span.start, span.stop) for span in x.spans) if isinstance(x, LocalMember) else None
        for x in members
    ]
    everybody: list[list[object]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everybody, held)
    rank = torch.distributed.get_rank()
    return [
        all(other[number] != mine for other in everybody[:rank]) for number, mine in enumerate(held)
    ]
