"""Runs of the benchmark that stop on the way."""

from __future__ import annotations

from typing import Any

from examples.benchmark.callbacks import Checkpoint

WRITE = Checkpoint.on_train_epoch_end


def stopping(at: int) -> Any:
    """Instead of the hook that writes checkpoints: one that fails after it wrote that epoch's."""

    def on_train_epoch_end(self: Checkpoint, trainer: Any, pl_module: Any) -> None:
        WRITE(self, trainer, pl_module)
        if trainer.current_epoch == at:
            raise RuntimeError("stop")

    return on_train_epoch_end
