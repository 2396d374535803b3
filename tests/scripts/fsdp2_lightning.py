"""Lightning trainings under ModelParallelStrategy (FSDP2), one process of several each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_wgsef import Homotopy, WGSEFCallback
from tests.scripts.fsdp2_plain import EXAMPLE, Network, batch, whole

BATCHES = 12
EPOCHS = 2
SAVED = (5, 15)
"""Steps after which a checkpoint is written: before and after the freeze, at 12."""


class Module(pl.LightningModule):
    example_input_array = EXAMPLE

    def __init__(self, *, sharded: bool = True) -> None:
        super().__init__()
        self.network = Network()
        self.sharded = sharded

    def configure_model(self) -> None:
        if self.sharded:
            self.sharded = False  # it is called again for every fit
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.network.fc1, mesh=mesh)
            fully_shard(self.network, mesh=mesh)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Shares:
    """One process's part of every batch; goes on in mid-epoch after a resume."""

    def __init__(self, rank: int, count: int) -> None:
        self.share = rank, count
        self.handed_out = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        rank, count = self.share
        start = self.handed_out % BATCHES
        for number in range(start, BATCHES):
            self.handed_out = number + 1
            yield tuple(part.chunk(count)[rank] for part in batch(number))

    def state_dict(self) -> dict[str, int]:
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.handed_out = state["handed_out"]


def make_callback(**arguments: Any) -> WGSEFCallback:
    return WGSEFCallback(k=2, lam=Homotopy(length=12), grouping="filter", **arguments)


def make_trainer(callbacks: list[Any], **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        callbacks=callbacks, max_epochs=EPOCHS, accelerator="cpu", **{**quiet, **arguments}
    )


def outcome(module: Module, callback: WGSEFCallback) -> dict[str, Any]:
    assert callback.regularizer is not None
    if hasattr(module.network, "reshard"):
        module.network.reshard()  # validation leaves the parameters of the root gathered
    return {
        "weights": {name: whole(value) for name, value in module.network.named_parameters()},
        "moments": {
            name: whole(callback.regularizer.pruners[0].optimizer.state[value]["exp_avg"])
            for name, value in module.network.named_parameters()
        },
        "masks": callback.regularizer.masks,
        "frozen": callback.regularizer.frozen,
    }


def train(
    rank: int, count: int, port: int, folder: str, *, pieces: bool, start: str | None, end: str
) -> None:
    """One process of a training that leaves its outcome at ``end``, and checkpoints."""
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in where.items()})
    os.environ["WORLD_SIZE"] = str(count)
    slim_to = None if start else Path(folder) / f"{end}.safetensors"
    callback = make_callback(slim_to=slim_to)
    saver = ModelCheckpoint(
        f"{folder}/{end}", "{step}", every_n_train_steps=5, save_top_k=-1, save_last=False
    )
    strategy = ModelParallelStrategy(count, 1, save_distributed_checkpoint=pieces)
    trainer = make_trainer([callback, saver], strategy=strategy, devices=count)
    module = Module()
    trainer.fit(module, Shares(rank, count), Shares(rank, count), ckpt_path=start)
    torch.save(outcome(module, callback), Path(folder) / f"{end}.{rank}")


def work(rank: int, count: int, ports: list[int], folder: str, tasks: list[dict[str, Any]]) -> None:
    for port, task in zip(ports, tasks, strict=True):
        train(rank, count, port, folder, **task)
        torch.distributed.destroy_process_group()
