"""A script with strategy="ddp": Lightning starts the other process by running it again.

python tests/scripts/ddp.py FOLDER

Three trainings, one after another, whose names are in ``TRAININGS``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from tests.scripts.fsdp2_lightning import Module, Shares, make_callback, make_trainer

RESUMED_FROM = 15
"""A step after the freeze."""
# Name of the outcome: optimizer, weights of the penalty, and the checkpoint where it goes on;
# None is what the callback has without them.
TRAININGS = {
    "adam": ("adam", None, None),
    "zero": ("zero", "taylor", None),
    "zero resumed": ("zero", "taylor", f"zero.step={RESUMED_FROM}.ckpt"),
}


class WithOptimizer(Module):
    def __init__(self, optimizer: str) -> None:
        super().__init__(sharded=False)
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return super().configure_optimizers()
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.Adam, lr=1e-2)


def train(folder: str, end: str) -> None:
    optimizer, weights, start = TRAININGS[end]
    module, callback = WithOptimizer(optimizer), make_callback(dashboard=True, weights=weights)
    logger = TensorBoardLogger(folder, name="logs", version=end)
    saver = ModelCheckpoint(folder, f"{end}.{{step}}", every_n_train_steps=5, save_top_k=-1)
    arguments = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    trainer = make_trainer([callback, saver], logger=logger, log_every_n_steps=2, **arguments)
    path = start and Path(folder) / start
    trainer.fit(module, Late(trainer), Late(trainer), ckpt_path=path, weights_only=True)
    regularizer: Any = callback.regularizer
    outcome = {"weights": module.network.state_dict(), "masks": regularizer.masks}
    torch.save(outcome, Path(folder) / f"{end}.{trainer.global_rank}")


class Late(Shares):
    """Made before the process knows its rank."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(0, 2)
        self.trainer = trainer

    def __iter__(self) -> Any:
        self.share = self.trainer.global_rank, 2
        return super().__iter__()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in TRAININGS:
        train(sys.argv[1], name)
