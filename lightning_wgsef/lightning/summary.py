"""Summary of a run, besides logged scalars: tables and lines in the terminal, and TensorBoard."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_wgsef.lightning.private import logged_step
from lightning_wgsef.lightning.tensorboard import Dashboard, tensorboard_loggers
from lightning_wgsef.network.latency import pass_times
from lightning_wgsef.network.sharding import unsharded_copy
from lightning_wgsef.reports.sparsity import sparsity_report
from lightning_wgsef.slimming.slim import own_multiples, slim
from lightning_wgsef.training.freezing import forecast, warn_of_late_freeze
from lightning_wgsef.training.regularizer import WGSEF
from lightning_wgsef.training.schedules import warn_of_short_way

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


# Share of a run after which it is said how it will go on.
_SEEN_ENOUGH = 0.1


class PruningSummary:
    """Summary of one regularizer's run; silent where Lightning's model summary is.

    Args:
        trainer: of the run.
        regularizer: what is shown.
        prefix: of its scalars.
        dashboard: show more than scalars in TensorBoard.
    """

    def __init__(self, trainer: Trainer, regularizer: WGSEF, prefix: str, dashboard: bool) -> None:
        self.regularizer = regularizer
        self.prefix = prefix
        self._has_summary = _has_summary(trainer)
        self.talks = trainer.is_global_zero and self._has_summary
        self.announced = regularizer.frozen
        self.foretold = regularizer.frozen or not regularizer.pruners
        self.dashboards = [
            Dashboard(logger.experiment, prefix, regularizer.groups, regularizer.total_steps)
            for logger in (tensorboard_loggers(trainer) if dashboard else [])
        ]
        self._shows_more = dashboard
        writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        if dashboard and writes and not self.dashboards:
            warnings.warn(
                "dashboard=True shows nothing: no logger of the Trainer is a TensorBoardLogger",
                stacklevel=2,
            )
        if writes and not regularizer.frozen:
            warn_of_short_way(regularizer.schedule, regularizer.total_steps)
            for pruner in regularizer.pruners[:1]:
                warn_of_late_freeze(pruner.freeze_rule, regularizer.total_steps)
        if self.talks:
            trainer.print(f"{prefix}:\n{regularizer.groups}")

    def foretell(self, trainer: Trainer) -> None:
        """Say once, after a tenth of the run, whether the budget will be reached, and when.

        Every process has to call it where weights are sharded.
        """
        pruner = max(self.regularizer.pruners, key=lambda x: x.freeze_rule.step or 0)
        run = pruner.total_steps or pruner.freeze_rule.step
        if self.foretold or run is None or pruner.taken < max(1, _SEEN_ENOUGH * run):
            return
        self.foretold = True
        parts = [part.progress() for part in self.regularizer.pruners if not part.frozen]
        dead, over = (sum(column) for column in zip(*parts, strict=True))
        epoch = _steps_of_an_epoch(trainer)
        if self.talks:
            words = forecast(pruner.freeze_rule, pruner.taken, dead, over, epoch)
            trainer.print(f"{self.prefix}: after {pruner.taken} steps: {words}")

    def freeze(self, trainer: Trainer) -> None:
        """Say that the mask is fixed, unless it was before."""
        if self.announced:
            return
        self.announced = True
        if self.talks:
            masks = list(self.regularizer.masks.values())
            alive, total = sum(int(x.sum()) for x in masks), sum(map(len, masks))
            trainer.print(
                f"{self.prefix}: mask fixed after step {trainer.global_step}: {alive} of {total} "
                f"groups alive{self._kept(torch.cat(masks))}"
            )

    def log(self, trainer: Trainer) -> None:
        """Write norms to TensorBoard; every process has to call it where weights are sharded."""
        if self._shows_more:
            norms = self.regularizer.groups.norms()
            for dashboard in self.dashboards:
                dashboard.log(norms, self._budget(), logged_step(trainer))

    def end(self, trainer: Trainer, model: nn.Module, example_input: Any, *, slims: bool) -> None:
        """Show the report, with operations where there is an example input that runs.

        With ``slims``, the network without its zeros is counted beside, where anything can go.

        Every process has to call it where weights are sharded.
        """
        if not self._has_summary and not self._shows_more:
            return
        groups = self.regularizer.groups
        whole, norms = unsharded_copy(model), groups.norms()
        if not self.talks and not self.dashboards:
            return
        small = None
        if slims and example_input is not None and any(x.removable for x in groups.layers):
            try:
                multiples = own_multiples(whole, self.regularizer.multiple_of)
                small = slim(whole, example_input, multiple_of=multiples)
            except Exception:  # the table is worth having without it; slim_to says what is wrong
                small = None
        try:
            report = sparsity_report(whole, groups, example_input, slim=small)
        except ValueError:  # training needed no example, and is over
            report = sparsity_report(whole, groups)
        if self.talks:
            trainer.print(f"{self.prefix}:\n{report}")
            if small is not None and groups.latency is not None:
                trainer.print(f"{self.prefix}: {self._measured_again(whole, small, example_input)}")
        share = 1 - report.parameters_alive / max(report.parameters, 1)
        for dashboard in self.dashboards:
            dashboard.draw(norms, logged_step(trainer))
            dashboard.finish(str(report), share, logged_step(trainer))

    def _kept(self, alive: Tensor) -> str:
        """Say what of the budget is used, as a size of the slim network where that is named."""
        groups = self.regularizer.groups
        if groups.size is None or not groups.size.unit or groups.limit is None:
            return f", within a budget of {self._budget():g}"
        left, dense = float(groups.size.of(alive.to(groups.device))), float(groups.size.total)
        return (
            f"; the slim network has {groups.size.shown(left)} {groups.size.unit}, "
            f"{left / dense:.1%} of the dense one's (asked for: at most "
            f"{groups.size.shown(groups.limit)}, {groups.limit / dense:.1%})"
        )

    def _measured_again(self, model: nn.Module, small: nn.Module, example_input: Any) -> str:
        """Say what the slim network takes, beside what was asked for and foretold."""
        groups = self.regularizer.groups
        assert groups.size is not None
        total, alive = float(groups.size.total), torch.cat(list(self.regularizer.masks.values()))
        foretold = float(groups.size.of(alive.to(groups.device)))
        asked = "" if groups.limit is None else f"asked for at most {_share(groups.limit, total)}, "
        dense, found = (1000 * x.whole for x in pass_times([model, small], example_input))
        return (
            f"latency of the slim network: {asked}foretold {_share(foretold, total)}, "
            f"measured {_share(found, dense)}"
        )

    def _budget(self) -> float:
        """Return the budget of all groups; of n:m as many as stay in all rows of m."""
        groups = self.regularizer.groups
        if groups.is_global:
            return float(groups.budgets[0])
        return sum(x.budget * (x.count // x.m if x.m else 1) for x in groups.layers)


def _share(value: float, total: float) -> str:
    """Write a latency of that of the dense network, in milliseconds."""
    return f"{value:.3g} of {total:.3g} ms ({value / total:.1%})"


def _has_summary(trainer: Trainer) -> bool:
    names = {type(callback).__name__ for callback in trainer.callbacks}  # type: ignore[attr-defined]  # set by a connector
    return bool(names & {"ModelSummary", "RichModelSummary"})


def _steps_of_an_epoch(trainer: Trainer) -> int | None:
    """Return the number of optimizer steps of an epoch; None for data of unknown length."""
    batches = trainer.num_training_batches
    return None if math.isinf(batches) else -(-int(batches) // trainer.accumulate_grad_batches)
