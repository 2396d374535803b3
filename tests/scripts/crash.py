"""A training that can be killed at any moment, and goes on from the last whole checkpoint.

Every step is noted in FOLDER/step; the final weights are FOLDER/final.pt.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_wgsef import WGSEFCallback
from tests.helpers.trainers import loader, make_module, make_trainer

EPOCHS, EVERY = 3, 4


class Note(pl.Callback):
    """Writes the number of the step that was just taken."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "step"

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.file.write_text(str(trainer.global_step))
        time.sleep(0.02)  # so that who watches can kill in time on a busy machine


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint that can be read: the last one may be cut off."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda x: -x.stat().st_mtime_ns):
        try:
            torch.load(path, weights_only=True)
        except Exception:  # whatever a truncated file is to torch
            path.unlink()
        else:
            return path
    return None


def train(rank: int, folder: Path) -> None:
    """Train to the end, from where an earlier process got."""
    warnings.filterwarnings("ignore")
    model = make_module()
    saver = ModelCheckpoint(folder, every_n_train_steps=EVERY, save_top_k=-1)
    callbacks = [WGSEFCallback(k=0.25), saver, Note(folder)]
    trainer = make_trainer(callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
    trainer.fit(model, loader(), ckpt_path=last_whole(folder), weights_only=True)
    torch.save(model.state_dict(), folder / "final.part")
    (folder / "final.part").rename(folder / "final.pt")
