"""Trainings and callbacks that come, go, stop and start again."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateFinder
from pytorch_lightning.tuner import Tuner
from torch import Tensor, nn

from lightning_wgsef import Constant, Homotopy, WGSEFCallback
from tests.helpers.plain_loops import (
    LAM,
    RATE,
    Dense,
    K,
    Recorded,
    assert_same,
    data,
    fit,
    sgd,
    single,
    slow_loop,
    slow_prox,
)
from tests.helpers.trainers import make_trainer


def test_two_fits_go_on_and_another_model_starts_anew() -> None:
    """Every fit makes a new optimizer, and the callback lets go of the old one."""
    schedule = Recorded()
    callback = WGSEFCallback(k=K, lam=schedule, freeze=None)
    model = Dense()
    fit(model, 5, callback)
    fit(model, 5, callback)
    assert len(schedule.rates) == 10
    net = slow_loop(single(5))
    assert_same(model.net, slow_loop(single(5), net))

    other = Dense()
    schedule.rates.clear()  # the next number of steps taken must be 0
    fit(other, 5, callback)
    assert_same(model.net, net)
    assert_same(other.net, slow_loop(single(5)))


def test_keyboard_interrupt_then_another_fit() -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                raise KeyboardInterrupt

    schedule = Recorded()
    callback = WGSEFCallback(k=K, lam=schedule, freeze=None)
    model = Dense()
    trainer = make_trainer([callback, Interrupt()], max_epochs=1)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer.fit(model, data(10))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert len(schedule.rates) == 4
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    net = slow_loop(single(4))
    assert_same(model.net, net)
    fit(model, 5, callback)
    assert len(schedule.rates) == 9
    assert_same(model.net, slow_loop(single(5), net))


class Tuned(Dense):
    """A module with what the finders look for."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = RATE
        self.batch_size = 16

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.net, lr=self.lr)

    def train_dataloader(self) -> Any:
        return data(30, batch_size=self.batch_size)


def run_finder(finder: str, model: Tuned, callback: WGSEFCallback, tmp_path: Any) -> None:
    """The finder, the values it found set back to those of the plain loop, then the fit."""
    trainer = make_trainer([callback], max_epochs=1, default_root_dir=tmp_path)
    tuner = Tuner(trainer)
    if finder == "rate":
        tuner.lr_find(model, num_training=20, early_stop_threshold=None)
    else:
        tuner.scale_batch_size(model, steps_per_trial=3, max_trials=2)
    model.lr, model.batch_size = RATE, 16
    trainer.fit(model)


@pytest.mark.filterwarnings("ignore:.*num_workers")
@pytest.mark.parametrize("finder", ["rate", "batch size"])
@pytest.mark.parametrize("used", [False, True])
def test_finders_leave_no_trace(finder: str, used: bool, tmp_path: Any) -> None:
    """Also where the callback has seen a fit of another model before."""
    schedule = Recorded()
    callback = WGSEFCallback(k=K, lam=schedule, freeze=None)
    if used:
        fit(Dense(), 3, callback)
        schedule.rates.clear()
    model = Tuned()
    run_finder(finder, model, callback, tmp_path)
    assert schedule.rates == [RATE] * 30
    assert_same(model.net, slow_loop(single(30)))


@pytest.mark.parametrize("first", [True, False])
def test_finder_among_the_callbacks(first: bool, tmp_path: Any) -> None:
    """The rate it finds is the one of all proximal steps of the fit."""
    schedule = Recorded()
    callback = WGSEFCallback(k=K, lam=schedule, freeze=None)
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    both = [callback, finder] if first else [finder, callback]
    model = Tuned()
    make_trainer(both, max_epochs=1, default_root_dir=tmp_path).fit(model)
    assert model.lr != RATE
    assert schedule.rates == [model.lr] * 30
    net = Dense().net
    prox = lambda net: slow_prox(net, model.lr)  # noqa: E731
    assert_same(model.net, slow_loop(single(30), net, sgd(net, lr=model.lr), prox))


def test_two_callbacks_do_what_one_does() -> None:
    """Every weight is bit for bit the same, in both orders."""
    one, two, swapped = Dense(), Dense(), Dense()
    fit(one, 10)
    for model, order in ((two, (2, 3)), (swapped, (3, 2))):
        parts = [
            WGSEFCallback(
                k=K, lam=Constant(LAM), freeze=None, include=f"net.{layer}", name=f"of {layer}"
            )
            for layer in order
        ]
        make_trainer(parts, max_epochs=1).fit(model, data(10))
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), one.parameters(), strict=True)
        )
    assert_same(one.net, slow_loop(single(10)))


class Normed(pl.LightningModule):
    """Convolutions with a bias, each behind one and before the other a BatchNorm."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3)
        self.net = nn.Sequential(conv[0], nn.BatchNorm2d(6), nn.SiLU(), conv[1], nn.BatchNorm2d(4))
        self.make = make
        self.seen: list[list[int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # Before a SiLU even the shift of a dead channel has a gradient.
        return (self.net(batch).mean((2, 3)) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(dead_filters(self.net))


def dead_filters(net: nn.Sequential) -> list[int]:
    """Filters of the first convolution of which nothing is left, in it or in its norm."""
    parts = [net[0].weight.detach().flatten(1).abs().sum(1), net[0].bias.abs()]
    parts += [net[1].weight.abs(), net[1].bias.abs()]
    return (sum(part.detach() for part in parts) == 0).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-2),
        lambda parameters: torch.optim.AdamW(parameters, 0.1, weight_decay=1e-1),
    ],
    ids=["SGD", "AdamW"],
)
def test_norm_and_bias_of_dead_channels(make: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(4, 2, 7, 7, generator=generator) for _ in range(20)]
    model = Normed(make)
    callback = WGSEFCallback(k=K, lam=Homotopy(length=10), grouping="filter", include="net.0")
    make_trainer([callback], max_epochs=1).fit(model, torch.utils.data.DataLoader(images, None))
    dead = (~callback.regularizer.masks["net.0"]).nonzero().flatten().tolist()
    assert len(dead) == 4
    assert model.seen[9:] == [dead] * 11  # from the freeze on, after every step
    outputs = model.net[:2].eval()(images[0])
    assert outputs[:, dead].count_nonzero() == 0
    kept = [number for number in range(6) if number not in dead]
    assert outputs[:, kept].abs().amax((0, 2, 3)).min() > 0
