"""What is written down while a network trains: curves, the freeze, times; and checkpoints."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from examples.benchmark.method_api import Count
from examples.data.batches import Batches
from examples.training import accuracy
from lightning_wgsef import Groups, group_parameters, prox_multipliers
from lightning_wgsef.training.schedules import in_steps

NO_TIME = 75
"""Exit status of a run, and of a suite, that goes on the next time."""


def total_steps(trainer: pl.Trainer) -> int:
    """How many steps training lasts."""
    return int(trainer.estimated_stepping_batches)


class CosineRate(pl.Callback):
    """The learning rate falls along half a cosine, whatever optimizer a method makes on the way."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Set the rate of the step that follows."""
        done = trainer.global_step / trainer.estimated_stepping_batches
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Clock(pl.Callback):
    """The time of every training step, with all that is hooked to it.

    Args:
        plain: measures a plain step. It is asked after every epoch, so that whatever else slows the
            machine down slows both.
    """

    def __init__(self, plain: Callable[[], float] | None = None) -> None:
        self.plain = plain
        self.seconds: list[float] = []
        self.ratios: list[float] = []
        self._started = 0.0
        self._counted = 0

    def state_dict(self) -> dict[str, Any]:
        """The times so far."""
        return {"seconds": self.seconds, "ratios": self.ratios}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with those of before."""
        self.seconds, self.ratios = state_dict["seconds"], state_dict["ratios"]
        self._counted = len(self.seconds)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Start."""
        _wait(trainer)
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop."""
        _wait(trainer)
        self.seconds.append(time.perf_counter() - self._started)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Compare the steps of this epoch with plain ones."""
        if self.plain is not None:
            self.ratios.append(statistics.median(self.seconds[self._counted :]) / self.plain())
            self._counted = len(self.seconds)


def strongest(groups: Groups) -> torch.Tensor:
    """1 for the groups that the budgets keep, the n largest weights of every m, say; else 0."""
    return prox_multipliers(
        groups.norms(), 1.0, groups.budgets, segments=groups.segments, debias=1.0
    )


def _wait(trainer: pl.Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()


class Watch(pl.Callback):
    """Curves over epochs, and accuracies around the freeze.

    Args:
        batches: of the validation split.
        count: for every layer how many of its groups are alive, and of how many.
        freeze: share of training after which masks are fixed.
    """

    def __init__(self, batches: Batches, count: Count, freeze: float) -> None:
        self.batches, self.count, self.freeze = batches, count, freeze
        self.seen: dict[str, Any] = {
            "loss": [],
            "validation": [],
            "alive": [],
            "before_freeze": None,
            "after_freeze": None,
        }
        self._losses: list[torch.Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return dict(self.seen)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was seen before."""
        self.seen = dict(state_dict)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Look at the network right after the freeze."""
        if self.seen["after_freeze"] is None and trainer.global_step >= self._half(trainer):
            self.seen["after_freeze"] = accuracy(pl_module.network, self.batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any
    ) -> None:
        """Look at the network right before the freeze."""
        self._losses.append(outputs["loss"].detach())
        if trainer.global_step == self._half(trainer) - 1:
            self.seen["before_freeze"] = accuracy(pl_module.network, self.batches)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Note the epoch."""
        self.seen["loss"].append(float(torch.stack(self._losses).mean()))
        self._losses.clear()
        self.seen["validation"].append(accuracy(pl_module.network, self.batches))
        self.seen["alive"].append(self.count(pl_module.network))

    def _half(self, trainer: pl.Trainer) -> int:
        return in_steps("freeze", self.freeze, total_steps(trainer))


class Sides(pl.Callback):
    """On which side weights are, where m compete for n: one of the n largest, or not.

    Args:
        arguments: those of `group_parameters`.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.seen: list[torch.Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was seen before."""
        self.seen = state_dict["seen"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Note the sides."""
        groups = group_parameters(pl_module.network, **self.arguments)
        self.seen.append(strongest(groups) > 0)

    def record(self) -> dict[str, list[float]]:
        """For every epoch the share of weights that end on the other side than they were then."""
        return {"moved": [float((x != self.seen[-1]).double().mean()) for x in self.seen]}


class Checkpoint(pl.Callback):
    """Writes the whole state of training after every epoch, and stops when nobody waits for it.

    Args:
        path: of the checkpoint.
        until: the moment, in seconds since the epoch, after which no further epoch is begun.
    """

    def __init__(self, path: Path, until: float = math.inf) -> None:
        self.path, self.until = path, until

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The old checkpoint is replaced when the new one is whole."""
        part = self.path.with_suffix(".part")
        trainer.save_checkpoint(part)
        os.replace(part, self.path)
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            raise SystemExit("the suite that started this run is gone")
        if time.time() > self.until and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            raise SystemExit(NO_TIME)
