"""Which groups were alive when, as a picture: time across, groups down."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 256
ROWS = 256
_ALIVE = (31, 119, 180)
_DEAD = (225, 225, 225)


class GroupLife:
    """Looks at who is alive, at equal distances in time; every second one is forgotten when full.

    Args:
        counts: number of groups of every layer, by its name.
        columns: the most looks that are kept.

    >>> life = GroupLife({"fc": 3}, columns=4)
    >>> for step in range(6):
    ...     life.look(torch.tensor([True, step < 2, step < 4]))
    >>> life.looks("fc").int().tolist()
    [[1, 1, 1], [1, 0, 1], [1, 0, 0]]
    """

    def __init__(self, counts: dict[str, int], columns: int = COLUMNS) -> None:
        self.counts = counts
        self.columns = columns
        self._kept: list[Tensor] = []
        self._stride = 1
        self._asked = 0

    def look(self, alive: Tensor) -> None:
        """Remember who is alive, shape (m,), layer after layer; no accelerator is waited for."""
        if self._asked % self._stride == 0:
            self._kept.append(alive.clone())
            if len(self._kept) > self.columns:
                self._kept = self._kept[::2]
                self._stride *= 2
        self._asked += 1

    def looks(self, layer: str) -> Tensor:
        """What was seen of a layer, booleans of shape (looks, groups)."""
        names = list(self.counts)
        together = torch.stack(self._kept).cpu()
        parts = torch.split_with_sizes(together, list(self.counts.values()), dim=1)
        return parts[names.index(layer)]

    def picture(self, layer: str) -> Tensor:
        """An image, bytes of shape (3, height, width): blue is alive, grey is dead.

        Time runs to the right, groups that live longest are at the top. Of more than ``ROWS``
        groups as many are shown, at equal distances in that order.
        """
        looks = self.looks(layer)
        order = _last_alive(looks).argsort(descending=True, stable=True)
        if len(order) > ROWS:
            order = order[torch.linspace(0, len(order) - 1, ROWS).round().long()]
        alive = looks[:, order].T
        for axis, most in ((0, ROWS), (1, COLUMNS)):
            alive = alive.repeat_interleave(max(1, most // alive.shape[axis]), axis)
        colours = torch.tensor([_DEAD, _ALIVE], dtype=torch.uint8)
        return colours[alive.long()].permute(2, 0, 1).contiguous()


def _last_alive(looks: Tensor) -> Tensor:
    """The last look at which a group was alive, -1 for none; shape (groups,)."""
    numbers = torch.arange(len(looks)).unsqueeze(1)
    return torch.where(looks, numbers, -1).max(0).values
