"""Parameters that are frozen, thaw, or join the optimizer while training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_wgsef import WGSEF, Constant, WGSEFCallback
from tests.helpers.plain_loops import (
    LAM,
    RATE,
    Dense,
    K,
    assert_same,
    data,
    fit,
    single,
    slow_loop,
    slow_prox,
)
from tests.helpers.trainers import make_trainer


class Unfreezing(pl.callbacks.BaseFinetuning):
    """net.3 joins the optimizer at the second epoch."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.net[3])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[3], optimizer, lr=RATE)


class Trainable(Dense):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.net.parameters() if p.requires_grad]
        return torch.optim.SGD(trainable, lr=RATE)


class Thawing(pl.Callback):
    """All parameters are in the optimizer from the start; net.3 trains at the second epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[3].requires_grad_(trainer.current_epoch == 1)


def two_stages() -> nn.Sequential:
    """Five steps without net.3, and five with it."""
    net = Dense().net
    body = [*net[0].parameters(), *net[2].parameters()]
    optimizer = torch.optim.SGD(body, lr=RATE)
    net[3].requires_grad_(False)
    slow_loop(single(5), net, optimizer, lambda net: slow_prox(net, layers=[2]))
    net[3].requires_grad_(True)
    optimizer.add_param_group({"params": list(net[3].parameters())})
    return slow_loop(single(5), net, optimizer)


def named() -> WGSEFCallback:
    """A layer that is frozen when training starts is grouped where it is named."""
    return WGSEFCallback(k=K, lam=Constant(LAM), freeze=None, include=["net.2", "net.3"])


@pytest.mark.parametrize("first", [True, False])
def test_frozen_parameters_that_join_the_optimizer(first: bool) -> None:
    model, callback = Trainable(), named()
    both = [callback, Unfreezing()] if first else [Unfreezing(), callback]
    with pytest.warns(UserWarning, match=r"net\.3: no optimizer trains these layers"):
        make_trainer(both, max_epochs=2).fit(model, data(5))
    assert [part.taken for part in callback.regularizer.pruners] == [10, 5]
    assert_same(model.net, two_stages())


def test_parameters_that_thaw_inside_the_optimizer() -> None:
    class Plain(Dense):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=RATE)

    model, callback = Plain(), named()
    model.net[3].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"net\.3: no optimizer trains these layers"):
        make_trainer([callback, Thawing()], max_epochs=2).fit(model, data(5))
    assert [part.taken for part in callback.regularizer.pruners] == [10, 5]
    assert_same(model.net, two_stages())


def test_frozen_parameters_are_left_out() -> None:
    model = Dense()
    model.net[3].requires_grad_(False)
    callback = WGSEFCallback(k=K, lam=Constant(LAM), freeze=None)
    fit(model, 10, callback)
    groups = callback.regularizer.groups
    assert groups.left_out["net.3"] == "frozen: net.3.weight has no gradient"
    twin = Dense().net
    twin[3].requires_grad_(False)
    slow_loop(single(10), twin, prox=lambda net: slow_prox(net, layers=[2]))
    assert_same(model.net, twin)
    assert torch.equal(model.net[3].weight, Dense().net[3].weight)


class Joining(Unfreezing):
    """Lightning restores what an optimizer holds, but not what needs a gradient: this does."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        pl_module.net[3].requires_grad_(trainer.current_epoch >= 1)


@pytest.mark.filterwarnings("ignore:.*no optimizer trains these")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:lam = .* had not reached the budget")
def test_resume_after_a_layer_has_joined(tmp_path: Path, first: bool) -> None:
    """Saved when two of four epochs are over, before and after the freeze."""

    def fit(freeze: int, **arguments: Any) -> tuple[Trainable, WGSEFCallback]:
        model = Trainable()
        callback = WGSEFCallback(k=K, lam=Constant(LAM), freeze=freeze, include=["net.2", "net.3"])
        both = [callback, Joining()] if first else [Joining(), callback]
        saver = pl.callbacks.ModelCheckpoint(
            tmp_path / str(freeze), "{epoch}", every_n_epochs=1, save_top_k=-1
        )
        trainer = make_trainer([*both, saver], max_epochs=4, enable_checkpointing=True)
        trainer.fit(model, data(5), weights_only=True, **arguments)
        return model, callback

    for freeze in (3, 12):
        model, callback = fit(freeze)
        again, resumed = fit(freeze, ckpt_path=tmp_path / str(freeze) / "epoch=1.ckpt")
        assert [part.frozen for part in callback.regularizer.pruners] == [True, True]
        assert resumed.regularizer.state_dict().keys() == callback.regularizer.state_dict().keys()
        for ours, theirs in zip(
            resumed.regularizer.pruners, callback.regularizer.pruners, strict=True
        ):
            assert ours.taken == theirs.taken
            assert [x.name for x in ours.groups.layers] == [x.name for x in theirs.groups.layers]
        for (name, a), b in zip(
            again.state_dict().items(), model.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


class Convolutions(pl.LightningModule):
    """Two convolutions with norms as a backbone, and a head, for Lightning's own finetuning."""

    def __init__(self, kind: type[torch.optim.Optimizer], **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        self.kind, self.settings = kind, settings
        self.example_input_array = torch.ones(2, 1, 6, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return self.kind(trainable, **self.settings)


@pytest.mark.parametrize("lam", [None, Constant(0.5)])
@pytest.mark.parametrize(
    ("metric", "kind", "settings"),
    [
        ("identity", torch.optim.SGD, {"lr": 0.05}),
        ("auto", torch.optim.Adam, {"lr": 1e-3}),
    ],
)
@pytest.mark.filterwarnings("ignore:lam = .* had not reached the budget")
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_norms_train_before_the_weights_of_their_groups_do(
    metric: str, kind: type[torch.optim.Optimizer], settings: Any, lam: Any
) -> None:
    """`BackboneFinetuning` trains norms from the start and adds convolutions later on."""
    model, named = Convolutions(kind, **settings), ["backbone.0", "backbone.3"]
    callback = WGSEFCallback(k=0.5, grouping="structure", lam=lam, metric=metric, include=named)
    thaw = pl.callbacks.BackboneFinetuning(2, lambda epoch: 1.0, 0.5)
    trainer = make_trainer([thaw, callback], max_epochs=6)
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(12, 1, 6, 6), batch_size=3))
    (pruner,) = callback.regularizer.pruners
    assert pruner.frozen
    first, joined = trainer.optimizers[0].param_groups
    assert pruner.step._lr() == joined["lr"] != first["lr"]
    for number in (0, 3):
        alive = (model.backbone[number].weight.flatten(1) != 0).any(1)
        assert int(alive.sum()) == 4
        assert torch.equal(model.backbone[number + 1].weight != 0, alive)


def emptied(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(False)
    optimizer.param_groups[0]["params"] = []


def dropped(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(False)
    del optimizer.param_groups[0]


def frozen_then_dropped(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    if not model[0].weight.requires_grad:
        del optimizer.param_groups[0]
    model[0].requires_grad_(False)


@pytest.mark.parametrize("metric", ["identity", "auto", "group"])
@pytest.mark.parametrize("lam", [None, Constant(0.1)])
@pytest.mark.parametrize("leave", [emptied, dropped, frozen_then_dropped])
@pytest.mark.filterwarnings("ignore:.*the weakest groups were cut")
def test_a_layer_that_leaves_the_optimizer_keeps_its_budget(
    leave: Any, lam: Any, metric: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    regularizer = WGSEF(
        model, 0.5, lam, "filter", metric=metric, total_steps=20, include=["0", "2"]
    ).attach(optimizer)
    for number in range(20):
        if number == 3 or (number == 6 and leave is frozen_then_dropped):
            leave(model, optimizer)
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    assert regularizer.frozen
    assert [int((model[n].weight != 0).any(1).sum()) for n in (0, 2)] == [8, 8]
