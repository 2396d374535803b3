"""What TensorBoard shows on top of scalars: a layout, histograms, pictures, the report."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_wgsef.group_life import GroupLife
from lightning_wgsef.groups import Groups

TIMES = 4
"""How many times in a run histograms and pictures are written: event files stay small."""
BUCKETS = 32
"""Of a histogram."""


class Dashboard:
    """Writes for the groups of one regularizer.

    Args:
        writer: a ``SummaryWriter``.
        prefix: of the names of its scalars, such as "wgsef".
        groups: what is shown.
        total_steps: how long training lasts; None where that is not known.
    """

    def __init__(self, writer: Any, prefix: str, groups: Groups, total_steps: int | None) -> None:
        self.writer = writer
        self.prefix = prefix
        self.groups = groups
        self.life = GroupLife({layer.name: layer.count for layer in groups.layers})
        self._distance = max(1, (total_steps or 8_000) // TIMES)
        self._next = 0
        writer.add_custom_scalars({prefix: layout(prefix)})

    def look(self, norms: Tensor, budget: float, step: int) -> None:
        """Norms of all groups, shape (m,), at a step; pictures where they are due."""
        alive = norms > 0
        self.life.look(alive)
        self.writer.add_scalar(f"{self.prefix}/groups_alive", int(alive.sum()), step)
        self.writer.add_scalar(f"{self.prefix}/groups_budget", budget, step)
        if step >= self._next:
            self._next = step + self._distance
            self.draw(norms, step)

    def draw(self, norms: Tensor, step: int) -> None:
        """Histograms of the norms and the life of the groups, layer by layer."""
        for name, part in self.groups.split(norms).items():
            tag = f"{self.prefix}/{name}/norms"
            self.writer.add_histogram(tag, part.float().cpu(), step, bins=BUCKETS)
            image = self.life.picture(name)
            self.writer.add_image(f"{self.prefix}/{name}/life_of_the_groups", image, step)

    def finish(self, report: str, sparsity: float, step: int) -> None:
        """The final report, a table, and the share of the grouped weights that are zero."""
        self.writer.add_text(f"{self.prefix}/report", f"```\n{report}\n```", step)
        self.writer.add_scalar(f"{self.prefix}/final_sparsity", sparsity, step)


def layout(prefix: str) -> dict[str, list[Any]]:
    """Charts of several curves each, as ``SummaryWriter.add_custom_scalars`` takes them.

    >>> sorted(layout("wgsef"))
    ['budget and groups alive', 'gap', 'group sparsity of layers']
    """
    return {
        "group sparsity of layers": ["Multiline", [f"{prefix}/.*/group_sparsity"]],
        "gap": ["Multiline", [f"{prefix}/gap"]],
        "budget and groups alive": ["Multiline", [f"{prefix}/groups_(alive|budget)"]],
    }
