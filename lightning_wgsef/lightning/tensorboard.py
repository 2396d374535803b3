"""TensorBoard: charts, histograms, pictures and hparams on top of scalars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.training.options import DEFAULTS

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

# Size of a picture: entries in time, groups.
COLUMNS = 256
ROWS = 256

# Its colours.
_ALIVE = (31, 119, 180)
_DEAD = (225, 225, 225)


class GroupHistory:
    """Record of live groups at equal distances in time; every second entry goes when it is full.

    Args:
        counts: number of groups of every layer, by its name.

    >>> history = GroupHistory({"fc": 3})
    >>> for step in range(3):
    ...     history.update(torch.tensor([True, step < 1, step < 2]))
    >>> history.alive("fc").int().tolist()
    [[1, 1, 1], [1, 0, 1], [1, 0, 0]]
    """

    def __init__(self, counts: dict[str, int]) -> None:
        self.counts = counts
        self._kept: list[Tensor] = []
        self._stride = 1
        self._asked = 0

    def update(self, alive: Tensor) -> None:
        """Append the live groups, shape (m,), layer after layer; waits for no accelerator."""
        if self._asked % self._stride == 0:
            self._kept.append(alive.clone())
            if len(self._kept) > COLUMNS:
                self._kept = self._kept[::2]
                self._stride *= 2
        self._asked += 1

    def alive(self, layer: str) -> Tensor:
        """Return the live groups of a layer over time, booleans of shape (entries, groups)."""
        names = list(self.counts)
        together = torch.stack(self._kept).cpu()
        parts = torch.split_with_sizes(together, list(self.counts.values()), dim=1)
        return parts[names.index(layer)]

    def picture(self, layer: str) -> Tensor:
        """Return an image, bytes of shape (3, height, width): blue is alive, grey is dead.

        Time runs to the right, groups that live longest are at the top. Of more than ``ROWS``
        groups as many are shown, at equal distances in that order.
        """
        recorded = self.alive(layer)
        order = _last_alive(recorded).argsort(descending=True, stable=True)
        if len(order) > ROWS:
            order = order[torch.linspace(0, len(order) - 1, ROWS).round().long()]
        alive = recorded[:, order].T
        for axis, most in ((0, ROWS), (1, COLUMNS)):
            alive = alive.repeat_interleave(max(1, most // alive.shape[axis]), axis)
        colours = torch.tensor([_DEAD, _ALIVE], dtype=torch.uint8)
        return colours[alive.long()].permute(2, 0, 1).contiguous()


def _last_alive(recorded: Tensor) -> Tensor:
    """Return the last entry at which a group was alive, -1 for none; shape (groups,)."""
    numbers = torch.arange(len(recorded)).unsqueeze(1)
    return torch.where(recorded, numbers, -1).max(0).values


# How many times in a run histograms and pictures are written: event files stay small.
TIMES = 4

# Of a histogram.
BUCKETS = 32


class Dashboard:
    """Dashboard of the groups of one regularizer.

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
        self.history = GroupHistory({layer.name: layer.count for layer in groups.layers})
        self._distance = max(1, (total_steps or 8_000) // TIMES)
        self._next = 0

    def log(self, norms: Tensor, budget: float, step: int) -> None:
        """Write how many groups live, of norms of shape (m,); at times histograms and pictures."""
        alive = norms > 0
        self.history.update(alive)
        self.writer.add_scalar(f"{self.prefix}/groups_alive", int(alive.sum()), step)
        self.writer.add_scalar(f"{self.prefix}/groups_budget", budget, step)
        if step >= self._next:
            self._next = step + self._distance
            self.draw(norms, step)

    def draw(self, norms: Tensor, step: int) -> None:
        """Write histograms of the norms and the history of the groups, layer by layer."""
        for name, part in self.groups.split(norms).items():
            tag = f"{self.prefix}/{name}/norms"
            self.writer.add_histogram(tag, part.float().cpu(), step, bins=BUCKETS)
            image = self.history.picture(name)
            self.writer.add_image(f"{self.prefix}/{name}/life_of_the_groups", image, step)

    def finish(self, report: str, sparsity: float, step: int) -> None:
        """Write the final report, a table, and the share of the grouped weights that are zero."""
        self.writer.add_text(f"{self.prefix}/report", f"```\n{report}\n```", step)
        self.writer.add_scalar(f"{self.prefix}/final_sparsity", sparsity, step)


def layout(prefix: str, layers: Sequence[str]) -> dict[str, list[Any]]:
    r"""Return charts of several curves each, as ``SummaryWriter.add_custom_scalars`` takes them.

    TensorBoard reads patterns; of several callbacks each draws its own layers. The step of
    "frozen" from 0 to 1 marks the freeze beside shares.

    >>> charts = layout("wgsef", ["conv", "fc.1"])
    >>> sorted(charts)
    ['accuracy', 'budget and groups alive', 'gap', 'group sparsity of layers']
    >>> charts["group sparsity of layers"][1]
    ['wgsef/conv/group_sparsity', 'wgsef/fc\\.1/group_sparsity', 'wgsef/frozen']
    """
    frozen = re.escape(f"{prefix}/frozen")
    curves = [re.escape(f"{prefix}/{name}/group_sparsity") for name in layers]
    return {
        "group sparsity of layers": ["Multiline", [*curves, frozen]],
        "accuracy": ["Multiline", ["(?!wgsef/).*[aA]cc.*", frozen]],
        "gap": ["Multiline", [re.escape(f"{prefix}/gap")]],
        "budget and groups alive": [
            "Multiline",
            [re.escape(f"{prefix}/groups_{name}") for name in ("alive", "budget")],
        ],
    }


def write_layout(trainer: Trainer, callback: Any) -> None:
    """Write the charts of all callbacks: TensorBoard knows one layout for a run.

    Args:
        trainer: at the start of training.
        callback: one with a dashboard; the last of them writes for all.
    """
    shown = with_dashboard(trainer, callback)
    if not shown or shown[-1] is not callback:
        return
    charts = {
        x.prefix: layout(x.prefix, [layer.name for layer in x.regularizer.groups.layers])
        for x in shown
    }
    for logger in tensorboard_loggers(trainer):
        logger.experiment.add_custom_scalars(charts)


def with_dashboard(trainer: Trainer, callback: Any) -> list[Any]:
    """Return the callbacks of the same kind that have a dashboard, in the Trainer's order."""
    kind = type(callback)
    return [x for x in trainer.callbacks if isinstance(x, kind) and x.dashboard]  # type: ignore[attr-defined]  # set by a connector


def write_hparams(trainer: Trainer, callback: Any) -> None:
    """Write the arguments of the callbacks as hparams, with the names of the results.

    Args:
        trainer: at the end of training.
        callback: one with a dashboard; the last of them writes for all.
    """
    shown = with_dashboard(trainer, callback)
    if not shown or shown[-1] is not callback:
        return
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]
    from torch.utils.tensorboard.summary import hparams

    first = {f"{x.prefix}/{name}" for x in shown for name in ("k", "lam", "grouping")}
    results = [f"{x.prefix}/final_sparsity" for x in shown]
    results += [name for name in trainer.callback_metrics if not name.startswith("wgsef")]
    for logger in tensorboard_loggers(trainer):
        values = {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in {**dict(logger.hparams), **_settings(shown)}.items()
        }
        # `add_hparams` would make a run of its own. Of the results this takes the names; their
        # values are those of the scalars.
        for summary in hparams(values, dict.fromkeys(results, 0.0)):  # type: ignore[no-untyped-call]
            # TensorBoard shows five settings at first: those that are said to differ from run to
            # run, where it has that mark, and others in the order of the alphabet.
            plugin = summary.value[0].metadata.plugin_data
            content = HParamsPluginData.FromString(plugin.content)
            for setting in content.experiment.hparam_infos:
                if hasattr(setting, "differs"):
                    setting.differs = setting.name in first
            plugin.content = content.SerializeToString()
            logger.experiment.file_writer.add_summary(summary)


def _settings(callbacks: list[Any]) -> dict[str, Any]:
    """Return k, lam, grouping and all other settings that differ from their defaults."""
    settings: dict[str, Any] = {}
    for callback in callbacks:
        own = {
            name: value
            for name, value in callback.arguments.items()
            if name not in DEFAULTS or (name != "example_input" and value != DEFAULTS[name])  # type: ignore[literal-required]
        }
        for name, default in (
            ("lam", callback.regularizer.schedule),
            ("grouping", callback.regularizer.grouping),
        ):
            if own[name] is None:
                own[name] = default  # what it stands for
        settings |= {f"{callback.prefix}/{name}": value for name, value in own.items()}
    return settings


def tensorboard_loggers(trainer: Trainer) -> list[Any]:
    """Return the loggers that write.

    Other processes and ``fast_dev_run`` have dummies, whose experiment is no ``SummaryWriter``.
    """
    from torch.utils.tensorboard import SummaryWriter

    return [
        logger
        for logger in trainer.loggers
        if isinstance(getattr(logger, "experiment", None), SummaryWriter)
    ]
