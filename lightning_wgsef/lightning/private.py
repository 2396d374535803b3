"""Private names of Lightning: all that the package uses, and why nothing public does.

`tests/lightning/test_private.py` fails where Lightning changes one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def logs_are_due(trainer: Trainer) -> bool:
    """Return whether Lightning writes what is logged at this batch.

    It counts the batches after which an optimizer stepped, whatever the loop; the public
    ``log_every_n_steps`` says how often, and nothing public says since when.
    """
    return bool(trainer._logger_connector.should_update_logs)


def logged_step(trainer: Trainer) -> int:
    """Return the step under which Lightning writes scalars.

    The public ``global_step`` counts steps of all optimizers, of which there may be several a
    batch.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def steps_left(trainer: Trainer) -> int | None:
    """Return how many optimizer steps a fit that starts or goes on has before it; None: unknown.

    ``estimated_stepping_batches`` counts those of all epochs by their length now, whatever was
    trained at another batch size. The loops' progress says how far into an epoch the run was.
    """
    left = math.inf
    if trainer.max_epochs not in (None, -1) and not math.isinf(trainer.num_training_batches):
        accumulated = trainer.accumulate_grad_batches
        epoch: Any = trainer.fit_loop.epoch_progress.current
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        inside = batches.ready if epoch.started > epoch.processed else 0  # else of the one before
        epochs = int(trainer.max_epochs) - trainer.current_epoch
        left = epochs * -(-int(trainer.num_training_batches) // accumulated) - inside // accumulated
    if trainer.max_steps != -1:
        left = min(left, trainer.max_steps - trainer.global_step)
    return None if math.isinf(left) else int(left)


def average_models(trainer: Trainer) -> Iterator[nn.Module]:
    """Yield the averages of the weights that callbacks of the Trainer hold (EMA, SWA).

    They are seen from outside in checkpoints alone, as copies.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average


def hold_back_hparams(trainer: Trainer) -> list[Any]:
    """Keep TensorBoard loggers from writing hparams at the start; return those that would have.

    TensorBoard shows the first hparams of a run alone, and the names of the results that belong to
    them are known at its end. ``default_hp_metric`` can be given to a logger when it is made, not
    later.
    """
    loggers: list[Any] = trainer.loggers
    held = [logger for logger in loggers if getattr(logger, "_default_hp_metric", False)]
    for logger in held:
        logger._default_hp_metric = False
    return held


def release_hparams(held: list[Any]) -> None:
    """Undo `hold_back_hparams`; the list is emptied."""
    while held:
        held.pop()._default_hp_metric = True
