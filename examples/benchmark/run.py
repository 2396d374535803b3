"""One run: train, freeze, fine-tune, make it smaller, measure."""

from __future__ import annotations

import copy
import logging
import math
import resource
import shutil
import statistics
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from examples.benchmark.callbacks import (
    Checkpoint,
    Clock,
    CosineRate,
    Sides,
    Watch,
    accuracy,
    total_steps,
)
from examples.benchmark.latencies import save_small, small_networks
from examples.benchmark.method_api import Pruning, Situation, counted
from examples.benchmark.methods import METHODS
from examples.benchmark.records import Record, origin, set_aside
from examples.benchmark.registry import DATA, NETWORKS
from examples.benchmark.suite import Run
from examples.data.modules import InMemory
from examples.sizes import budget_for_operations
from examples.training import Classifier
from lightning_wgsef import Groups, group_parameters, network_report, slim
from lightning_wgsef.groupings.patterns import by_pattern
from lightning_wgsef.utils.files import atomic_write

PLAIN_STEPS = 30


class Trained(Classifier):
    """A classifier whose optimizer a method may wrap, and whose network it may cut."""

    def __init__(self, network: nn.Module, run: Run, pruning: Pruning, classes: int) -> None:
        super().__init__(network, run.task.lr * pruning.lr, num_classes=classes)
        self.run, self.pruning = run, pruning

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The task's optimizer, as the method wants it."""
        optimizer = plain_optimizer(self.network, self.run, self.lr)
        return self.pruning.wrap(optimizer, self.network, total_steps(self.trainer))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the network into the form that the checkpoint's has."""
        self.pruning.restore(self.network, checkpoint)


def plain_optimizer(network: nn.Module, run: Run, lr: float) -> torch.optim.Optimizer:
    """The task's optimizer."""
    decay = run.task.weight_decay
    if run.task.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=decay)
    kind = torch.optim.Adam if run.task.optimizer == "adam" else torch.optim.AdamW
    return kind(network.parameters(), lr, weight_decay=decay)


def execute(
    run: Run,
    data_dir: Path,
    work: Path,
    device: str,
    weights: Path | None = None,
    until: float = math.inf,
) -> Record:
    """Train once, from where an earlier process got; the record of the run.

    Args:
        run: what to do.
        data_dir: folder of the data sets.
        work: folder for the checkpoint; removed at the end.
        device: "cpu" or "cuda".
        weights: file of the dense network that the run starts from, or that it leaves.
        until: see `Checkpoint`.
    """
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_flush_denormal(True)
    work.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(run.seed, verbose=False)
    data = DATA[run.task.data](data_dir, run.task.batch_size, device)
    data.prepare_data()
    data.setup()
    dense = NETWORKS[run.task.network](**run.task.arguments)
    if run.task.pretrained is not None:
        assert weights is not None, "a run that starts from a dense network"
        dense.load_state_dict(load_file(weights))
    if device == "cuda":
        dense = dense.to(memory_format=torch.channels_last)
    example = torch.zeros(2, *data.image_shape)
    situation = sized(Situation(run.task, dense, example, data.train_dataloader()), run)
    pruning = METHODS[run.method].make(situation, run.value)
    network = dense if pruning.network is None else pruning.network
    original = copy.deepcopy(dense)
    model = Trained(network, run, pruning, data.num_classes)
    arguments = pruning.groups or situation.groups()
    groups = group_parameters(original, **arguments)
    count = pruning.count or counted(groups, arguments)
    sides = Sides(arguments) if any(layer.m for layer in groups.layers) else None
    watch = Watch(data.val_dataloader(), count, run.task.freeze)
    checkpoint = work / "last.ckpt"
    clock = Clock(None if run.trial else lambda: plain_seconds(original, run, data, device))
    callbacks = [
        CosineRate(model.lr),
        clock,
        *pruning.callbacks,
        watch,
        *([] if sides is None else [sides]),
        Checkpoint(checkpoint, until),
    ]
    trainer = make_trainer(run, callbacks, device, max_epochs=run.task.epochs)
    trainer.fit(model, data, ckpt_path=usable(checkpoint), weights_only=False)
    if weights is not None and run.method == "dense":
        save_weights(model.cpu().network, weights)
    record = {
        "name": run.name,
        **asdict(run),
        **({} if run.task.operations is None else {"k": situation.task.k}),
        "budget": budget_of(groups),
        "seconds": round(sum(clock.seconds), 1),
        "step_ratios": clock.ratios,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **watch.seen,
        **({} if sides is None else sides.record()),
        **outcome(model.cpu().network, original, data, run, small_networks(work.parent) / run.name),
        **origin(device),
    }
    shutil.rmtree(work)
    return record


def save_weights(network: nn.Module, path: Path) -> None:
    """Keep a dense network, of whatever memory format, for the runs that start from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        state = {name: value.contiguous() for name, value in network.state_dict().items()}
        save_file(state, temporary)


def sized(situation: Situation, run: Run) -> Situation:
    """The situation with the k that leaves the task's share of the operations to this method.

    A method that cannot leave as little, because it ties nothing, keeps the share of its groups
    that tied ones would keep.
    """
    task = situation.task
    if task.operations is None:
        return situation
    with_k = partial(replace, situation)
    pruning = METHODS[run.method].make(with_k(task=replace(task, k=1.0)), run.value)
    groups = pruning.groups or situation.groups()
    if groups.get("costs") == "flops":  # then k is the share
        return with_k(task=replace(task, k=task.operations))
    if groups["grouping"] == task.structure and groups.get("scope") != "global":
        (row,) = network_report({"dense": situation.network}, situation.example).networks
        size = f"{task.operations * row.flops:.0f} FLOPs"
        kept = group_parameters(situation.network, **{**groups, "k": size}).layers
        numbers = by_pattern({layer.name: round(layer.budget) for layer in kept})
        return with_k(task=replace(task, k=numbers))

    def k(groups: dict[str, Any]) -> int | dict[str, int]:
        arguments = {name: value for name, value in groups.items() if name != "k"}
        example = arguments.pop("example_input", situation.example)
        return budget_for_operations(situation.network, task.operations, example, **arguments)

    tied = situation.groups()
    try:
        found: Any = k(pruning.groups or tied)
    except ValueError:
        alike = group_parameters(situation.network, **{**tied, "k": k(tied)})
        found = float(alike.budgets.sum()) / len(alike)
    return with_k(task=replace(task, k=found))


def budget_of(groups: Groups) -> float:
    """How many groups may stay; of n:m those of all rows of m."""
    rows = [1 if layer.m is None else layer.count // layer.m for layer in groups.layers]
    return float(
        groups.budgets.sum() if groups.is_global else groups.budgets @ torch.tensor(rows).double()
    )


def usable(checkpoint: Path) -> Path | None:
    """The checkpoint, if there is one that can be read; another is set aside."""
    if not checkpoint.exists():
        return None
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever a damaged file is to torch
        set_aside(checkpoint, str(error))
        return None
    return checkpoint


def make_trainer(
    run: Run, callbacks: list[pl.Callback], device: str, **arguments: Any
) -> pl.Trainer:
    """A Trainer that writes and shows nothing."""
    return pl.Trainer(
        callbacks=callbacks,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision=run.task.precision,
        limit_train_batches=run.task.share_of_epoch,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **arguments,
    )


def plain_seconds(dense: nn.Module, run: Run, data: InMemory, device: str) -> float:
    """Median time of a training step of the dense network, in the same Trainer."""
    model, clock = Trained(copy.deepcopy(dense), run, Pruning(), data.num_classes), Clock()
    trainer = make_trainer(run, [clock], device, max_epochs=-1, max_steps=PLAIN_STEPS)
    with torch.random.fork_rng():
        trainer.fit(model, copy.copy(data.train_dataloader()))
    return statistics.median(clock.seconds)


def outcome(network: nn.Module, dense: nn.Module, data: InMemory, run: Run, path: Path) -> Record:
    """What the trained network is worth, and what is left of it when it is made smaller.

    Args:
        network: the trained one.
        dense: the one before training.
        data: its data.
        run: what was done.
        path: where the smaller network is kept until its latency is measured.
    """
    found: Record = {"validation_accuracy": accuracy(network, data.val_dataloader())}
    if run.trial:
        return found  # the test images are for runs that count
    found["test_accuracy"] = accuracy(network, data.test_dataloader())
    example = torch.zeros(2, *data.image_shape)
    small = slim(network, example)
    networks = {"dense": dense, "slim": small}
    rows = network_report(networks, example).networks
    found["slim_test_accuracy"] = accuracy(small, data.test_dataloader())
    found["parameters"] = [row.parameters for row in rows]
    found["flops"] = [row.flops for row in rows]
    save_small(path, small, example)
    return found
