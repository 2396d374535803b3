"""Steps of optimizers of every kind, each against a plain loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_wgsef import Constant, WGSEFCallback
from tests.helpers.groups import batches
from tests.helpers.plain_loops import (
    LAM,
    RATE,
    Dense,
    K,
    alive,
    assert_same,
    data,
    fit,
    loss_of,
    sgd,
    single,
    slow_loop,
    slow_prox,
)
from tests.helpers.trainers import make_trainer


def test_every_step_is_followed_by_one_proximal_step() -> None:
    """What the tests below start from."""
    model = Dense()
    schedule, _ = fit(model, 10)
    assert schedule.rates == [RATE] * 10
    assert_same(model.net, slow_loop(single(10)))
    assert alive(model.net) == [[1, 2, 3], [0, 1, 2, 3]]  # of columns 0 to 4 and 0 to 5


def test_the_comparison_can_fail() -> None:
    """A proximal step left out, taken twice, or taken with another rate is seen."""
    model = Dense()
    fit(model, 10)

    def planted(at: int, mistake: Any) -> nn.Module:
        steps = iter(range(10))

        def prox(net: nn.Sequential) -> None:
            if next(steps) == at:
                mistake(net)
            else:
                slow_prox(net)

        return slow_loop(single(10), prox=prox)

    def twice(net: nn.Sequential) -> None:
        slow_prox(net)
        slow_prox(net)

    for mistake in (lambda net: None, twice, lambda net: slow_prox(net, 1.001 * RATE)):
        for at in (0, 9):
            with pytest.raises(AssertionError):
                assert_same(model.net, planted(at, mistake))


def test_accumulation_with_an_incomplete_last_window() -> None:
    model = Dense()
    schedule, trainer = fit(model, 10, accumulate_grad_batches=4)
    assert len(schedule.rates) == trainer.global_step == 3

    def windows() -> nn.Sequential:
        """Lightning divides by 4 in the last window of 2 batches, too."""
        net = Dense().net
        optimizer = sgd(net)
        for window in (batches(10)[:4], batches(10)[4:8], batches(10)[8:]):
            optimizer.zero_grad()
            for batch in window:
                (loss_of(net, batch) / 4).backward()
            optimizer.step()
            slow_prox(net)
        return net

    assert_same(model.net, windows())


class Overflowing(Dense):
    """The gradients of batches 2 and 5 are infinite."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.steps: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return loss_of(self.net, batch) * (float("inf") if batch_idx in (2, 5) else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = sgd(self.net, fused=self.fused)
        optimizer.register_step_post_hook(
            lambda *_: self.steps.append(float(getattr(optimizer, "found_inf", 0.0)))
        )
        return optimizer


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("fused", [False, True])
def test_infinite_gradients_under_a_scaler(device: str, fused: bool) -> None:
    model = Overflowing(fused)
    # Powers of 2 scale gradients without rounding.
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", device, scaler)
    schedule, trainer = fit(model, 8, accelerator=device, devices=1, plugins=[plugin])
    assert trainer.global_step == 8
    assert scaler.get_scale() == 2.0**8  # halved twice
    # A plain optimizer is not called; a fused one is, and leaves the weights as they are.
    assert model.steps == ([0, 0, 1, 0, 0, 1, 0, 0] if fused else [0] * 6)
    assert len(schedule.rates) == (8 if fused else 6)
    taken = [step for number, step in enumerate(single(8)) if number not in (2, 5)]
    assert_same(model.cpu().net, slow_loop(taken))


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_step_that_returns_none(accumulate: int) -> None:
    class Some(Dense):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx in (0, 3, 6, 7) else super().training_step(batch, batch_idx)

    model = Some()
    schedule, _ = fit(model, 8, accumulate_grad_batches=accumulate)
    parts = batches(8)
    # In windows of two: 1 alone, 2 alone, 4 and 5, none.
    windows = {1: [[1], [2], [4], [5]], 2: [[1], [2], [4, 5]]}[accumulate]
    assert len(schedule.rates) == len(windows)

    net = Dense().net
    optimizer = sgd(net)
    for window in windows:
        optimizer.zero_grad()
        for number in window:
            (loss_of(net, parts[number]) / accumulate).backward()
        optimizer.step()
        slow_prox(net)
    assert_same(model.net, net)


def test_lbfgs() -> None:
    """One proximal step after every step, whatever the number of its evaluations."""
    evaluations = []

    class Quasi(Dense):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            evaluations.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.net.parameters(), lr=RATE, max_iter=4)

    model = Quasi()
    schedule, _ = fit(model, 6)
    assert len(schedule.rates) == 6
    assert len(evaluations) > 6

    net = Dense().net
    optimizer = torch.optim.LBFGS(net.parameters(), lr=RATE, max_iter=4)
    for batch in batches(6):

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        slow_prox(net)
    assert_same(model.net, net)


@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimization(raw: bool) -> None:
    """Two optimizers, the second at every other batch; raw ones do not count as global steps."""

    def optimizers(net: nn.Sequential) -> list[torch.optim.Optimizer]:
        body = [*net[0].parameters(), *net[2].parameters()]
        return [torch.optim.SGD(body, lr=RATE), torch.optim.SGD(net[3].parameters(), lr=2 * RATE)]

    class Manual(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for number, optimizer in enumerate(self.optimizers(use_pl_optimizer=not raw)):
                if number == 0 or batch_idx % 2 == 0:
                    optimizer.zero_grad()
                    self.manual_backward(loss_of(self.net, batch))
                    optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return optimizers(self.net)

    model = Manual()
    callback = WGSEFCallback(k=K, lam=Constant(LAM), freeze=None)
    trainer = make_trainer([callback], max_epochs=1)
    trainer.fit(model, data(7))
    assert [part.taken for part in callback.regularizer.pruners] == [7, 4]
    assert trainer.global_step == (0 if raw else 11)

    net = Dense().net
    first, second = optimizers(net)
    for number, batch in enumerate(batches(7)):
        for optimizer, layer, rate in ((first, 2, RATE), (second, 3, 2 * RATE)):
            if layer == 2 or number % 2 == 0:
                optimizer.zero_grad()
                loss_of(net, batch).backward()
                optimizer.step()
                slow_prox(net, rate, [layer])
    assert_same(model.net, net)


def test_an_optimizer_step_that_skips() -> None:
    class Skipping(Dense):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            if batch_idx % 2 == 0:
                super().optimizer_step(epoch, batch_idx, optimizer, closure)
            else:
                closure()

    model = Skipping()
    schedule, _ = fit(model, 10)
    assert len(schedule.rates) == 5
    assert_same(model.net, slow_loop(single(10)[::2]))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_rate_of_every_step_and_empty_param_groups(as_tensor: bool) -> None:
    def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
        rate = torch.tensor(RATE, dtype=torch.float64) if as_tensor else RATE
        groups = [{"params": [], "lr": 7.0}, {"params": list(net.parameters())}]
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)

    class Scheduled(Dense):
        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(self.net)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    model = Scheduled()
    schedule, _ = fit(model, 8)
    rates = [RATE * 0.5 ** (step // 3) for step in range(8)]
    assert schedule.rates == pytest.approx(rates, rel=1e-12)

    net = Dense().net
    optimizer = optimizer_of(net)
    remaining = iter(rates)

    def prox(net: nn.Sequential) -> None:
        slow_prox(net, next(remaining))

    for rate, step in zip(rates, single(8), strict=True):
        optimizer.param_groups[1]["lr"] = rate
        slow_loop([step], net, optimizer, prox)
    assert_same(model.net, net)
