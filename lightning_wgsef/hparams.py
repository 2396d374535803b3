"""Settings beside results in TensorBoard, the module's and those of all callbacks together.

TensorBoard shows the first hparams of a run alone. Lightning writes the module's as a fit starts,
when there is no result yet; they are held back here and written when training ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

_SETTINGS = ("k", "lam", "grouping", "scope", "weights", "costs", "metric", "freeze")


def hold_back(trainer: Trainer) -> list[Any]:
    """Keep Lightning's TensorBoard loggers from writing hparams; those that would have.

    There is no public switch after a logger is made.
    """
    loggers: list[Any] = trainer.loggers
    held = [logger for logger in loggers if getattr(logger, "_default_hp_metric", False)]
    for logger in held:
        logger._default_hp_metric = False
    return held


def release(held: list[Any]) -> None:
    """As before `hold_back`; the list is emptied."""
    while held:
        held.pop()._default_hp_metric = True


def write_hparams(trainer: Trainer, callback: Any) -> None:
    """Write what was asked for, with the names of the scalars that came of it.

    Args:
        trainer: at the end of training.
        callback: one with a dashboard; the last of them writes for all.
    """
    kind = type(callback)
    shown = [x for x in trainer.callbacks if isinstance(x, kind) and x.dashboard]  # type: ignore[attr-defined]  # set by a connector
    if not shown or shown[-1] is not callback:
        return
    from torch.utils.tensorboard.summary import hparams

    results = [f"{x.prefix}/final_sparsity" for x in shown]
    results += [name for name in trainer.callback_metrics if not name.startswith("wgsef")]
    for logger in tensorboard_loggers(trainer):
        values = {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in {**dict(logger.hparams), **_settings(shown)}.items()
        }
        writer = logger.experiment._get_file_writer()  # add_hparams would make a run of its own
        # Of the results it takes the names; values come from the scalars.
        for summary in hparams(values, dict.fromkeys(results, 0.0)):  # type: ignore[no-untyped-call]
            writer.add_summary(summary)


def _settings(callbacks: list[Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for callback in callbacks:
        own = {name: callback.arguments[name] for name in _SETTINGS}
        if own["lam"] is None:
            own["lam"] = callback.regularizer.schedule  # what the default stands for
        settings |= {f"{callback.prefix}/{name}": value for name, value in own.items()}
    return settings


def tensorboard_loggers(trainer: Trainer) -> list[Any]:
    """Those that write: other processes and ``fast_dev_run`` have dummies that answer anything."""
    from torch.utils.tensorboard import SummaryWriter

    return [
        logger
        for logger in trainer.loggers
        if isinstance(getattr(logger, "experiment", None), SummaryWriter)
    ]
