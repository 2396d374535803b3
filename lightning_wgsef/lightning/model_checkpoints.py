"""Checkpoints that Lightning keeps by a metric: of the pruned network, not of a dense one.

Lightning's ``ModelCheckpoint`` knows nothing of a freeze: what it calls best or last may be a dense
network that did better than every pruned one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_wgsef.training.masks import unmasked_in
from lightning_wgsef.training.regularizer import WGSEF
from lightning_wgsef.utils.files import read_checkpoint

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def offer_pruned_metrics(trainer: Trainer, prefix: str, *, frozen: bool) -> None:
    """Offer metrics from the freeze on, where a checkpoint monitors "<prefix>/pruned/<metric>".

    Until then it is NaN, which Lightning takes for the worst there can be. Checkpoint callbacks
    come after all others and find it.
    """
    start = f"{prefix}/pruned/"
    for monitor in {str(getattr(x, "monitor", "")) for x in trainer.checkpoint_callbacks}:
        if monitor.startswith(start):
            metrics = trainer.callback_metrics
            value = metrics.get(monitor.removeprefix(start))
            if not frozen:
                metrics[monitor] = torch.tensor(math.nan)
            elif value is not None:
                metrics[monitor] = value


def dense_checkpoints(
    trainer: Trainer, prefix: str, key: str, regularizer: WGSEF, fixed_at: float | None
) -> Iterator[str]:
    """Say of every checkpoint callback which of its files hold the network before the freeze.

    Args:
        trainer: after a fit that froze the mask.
        prefix: of the callback's metrics.
        key: of the callback's state in a checkpoint.
        regularizer: what it did.
        fixed_at: when the mask was fixed, as files are dated; None: in an earlier run.
    """
    for callback in trainer.checkpoint_callbacks:
        paths: dict[str, list[str]] = {}
        for kind in ("best", "last"):
            path = str(getattr(callback, f"{kind}_model_path", "") or "")
            if Path(path).is_file():
                paths.setdefault(path, []).append(kind)
        dense = [
            f"its {' and '.join(kinds)}, {path},"
            for path, kinds in paths.items()
            if _is_dense(path, key, regularizer, fixed_at)
        ]
        if dense:
            kind, monitor = type(callback).__name__, getattr(callback, "monitor", None)
            yield (
                f"{kind}(monitor={monitor!r}): {' and '.join(dense)} was saved before the mask was "
                f"fixed and holds the dense network; {_advice(prefix, monitor)}"
            )


def _advice(prefix: str, monitor: str | None) -> str:
    last = (
        "for the network at the end take a ModelCheckpoint without monitor, or "
        "trainer.save_checkpoint(..) after fit"
    )
    if monitor is None:
        return last
    if monitor.startswith(f"{prefix}/pruned/"):
        return f"no validation that logs this metric followed the freeze; {last}"
    return f"monitor='{prefix}/pruned/{monitor}' is that metric from the freeze on; {last}"


def _is_dense(path: str, key: str, regularizer: WGSEF, fixed_at: float | None) -> bool:
    """Tell it by the callback's state in the file, else by its weights, else by its date."""
    try:
        content = read_checkpoint(path, in_place=True)
    except ValueError:  # such as settings that only code could read
        return fixed_at is not None and Path(path).stat().st_mtime < fixed_at
    state = content.get("callbacks", {}).get(key)
    if state is not None:
        parts = state.get("attachments", [])
        return not parts or any(part.get("masks") is None for part in parts)
    try:
        weights = content.get("state_dict", {})
        return bool(unmasked_in(regularizer.groups, regularizer.masks, weights))
    except ValueError:
        return False  # another module's
