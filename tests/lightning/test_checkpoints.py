"""Checkpoints: what is grouped, saved and loaded again."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    ModelCheckpoint,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.data.batches import Batches
from lightning_wgsef import Homotopy, WGSEFCallback
from tests.helpers.groups import batches, dense_network
from tests.helpers.plain_loops import (
    Dense,
    K,
    Recorded,
    alive,
    assert_same,
    data,
    fit,
    single,
    slow_loop,
)
from tests.helpers.trainers import make_trainer


def pruning(length: int = 5) -> WGSEFCallback:
    return WGSEFCallback(k=K, lam=Homotopy(length=length))


def saver(folder: Any, every: int, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1, **arguments)


def resumable() -> Batches:
    """The batches of the plain loop; a run that goes on gets those that it has not seen."""
    inputs, targets = (torch.cat(parts) for parts in zip(*batches(10), strict=True))
    return Batches(inputs, targets, 16)


@pytest.mark.filterwarnings("ignore:Be aware that")
def test_resume_in_mid_epoch_is_the_plain_loop(tmp_path: Any) -> None:
    """A run that stopped after 7 of 10 batches takes 3 more steps, with its momentum."""
    first = Recorded()
    callback = WGSEFCallback(k=K, lam=first, freeze=None)
    whole = Dense()
    trainer = make_trainer([callback, saver(tmp_path, 7)], max_epochs=1, enable_checkpointing=True)
    trainer.fit(whole, resumable())
    rest = Recorded(first=7)
    resumed = Dense()
    trainer = make_trainer([WGSEFCallback(k=K, lam=rest, freeze=None)], max_epochs=1)
    path = next(tmp_path.glob("*step=7.ckpt"))
    trainer.fit(resumed, resumable(), ckpt_path=path, weights_only=True)
    assert (len(first.rates), len(rest.rates)) == (10, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    assert_same(resumed.net, slow_loop(single(10)))


def test_weights_only_checkpoint(tmp_path: Any) -> None:
    """It has no state of the callback; its zeros are the masks."""
    model = Dense()
    parts = [pruning(), saver(tmp_path, 8, save_weights_only=True)]
    make_trainer(parts, max_epochs=1, enable_checkpointing=True).fit(model, data(8))
    path = next(tmp_path.glob("*step=8.ckpt"))
    saved = torch.load(path, weights_only=True)
    assert "callbacks" not in saved
    tuned = Dense()
    tuned.load_state_dict(saved["state_dict"])
    assert_same(tuned.net, model.net, 0)
    fit(tuned, 8, WGSEFCallback(masks=path))
    assert [len(columns) for columns in alive(model.net)] == [K, K]
    assert alive(tuned.net) == alive(model.net)
    assert not torch.equal(tuned.net[2].weight, model.net[2].weight)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:.* fixes the mask at step 7")
def test_validate_and_test_with_a_checkpoint(tmp_path: Any) -> None:
    """They show the weights of the file, be they dense or pruned, and a fit goes on from there."""

    class Seen(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[Tensor] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.losses.append(self.training_step(batch, batch_idx))

        test_step = validation_step

    model, callback = Seen(), pruning(7)
    trainer = make_trainer([callback, saver(tmp_path, 2)], max_epochs=1, enable_checkpointing=True)
    trainer.fit(model, data(8))
    pruned = alive(model.net)
    early, late = (next(tmp_path.glob(f"*step={step}.ckpt")) for step in (2, 8))
    saved = torch.load(early, weights_only=True)["state_dict"]
    before = [
        saved[f"net.{layer}.weight"].norm(dim=0).nonzero().flatten().tolist() for layer in (2, 3)
    ]
    assert before != pruned
    for run, path, expected in (
        (trainer.test, early, before),
        (trainer.validate, late, pruned),
        (trainer.test, early, before),
    ):
        model.losses.clear()
        run(model, data(2), ckpt_path=path, weights_only=True, verbose=False)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
        assert alive(model.net) == expected
        twin = dense_network()
        twin.load_state_dict({key.removeprefix("net."): value for key, value in saved.items()})
        losses = [(twin(x) - y).square().mean() for x, y in batches(2)]
        assert torch.equal(torch.stack(model.losses), torch.stack(losses))
    # The state that belongs to the weights that were loaded last: 2 of 7 steps are taken.
    make_trainer([callback], max_epochs=1).fit(model, data(5))
    assert callback.regularizer.pruners[0].taken == 7
    assert callback.regularizer.frozen
    assert [len(columns) for columns in alive(model.net)] == [K, K]


class Everything(pl.LightningModule):
    """What weights can be: tied, none, empty, without groups, and dead before the start."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 1)
        self.deep = nn.Conv2d(4, 4, 3, groups=4, padding=1)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.up = nn.ConvTranspose2d(6, 5, 2, bias=False)
        self.tied = nn.Linear(5, 5)
        self.twin = nn.Linear(5, 5)
        self.twin.weight = self.tied.weight
        self.norm = nn.LayerNorm(5)
        self.scale = nn.Parameter(torch.ones(5))
        self.empty = nn.Parameter(torch.empty(0, 5))
        self.register_parameter("nothing", None)
        self.last = nn.Linear(5, 3)
        with torch.no_grad():
            self.up.weight[1] = 0
            self.tied.weight[:, 2] = 0
            self.last.weight.zero_()

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        x = self.up(self.grouped(self.deep(self.first(images)))).mean((2, 3))
        x = self.twin(torch.relu(self.tied(x)))
        return self.last(self.norm(x) * self.scale + self.empty.sum()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def groups_of(self, grouping: str) -> dict[str, list[list[Tensor]]]:
        """The weights of every group, written out by hand."""
        if grouping == "filter":
            layers = (self.first, self.deep, self.grouped, self.tied)
            names = ("first", "deep", "grouped", "tied")
            rows = {
                name: [[layer.weight[i], layer.bias[i]] for i in range(len(layer.bias))]
                for name, layer in zip(names, layers, strict=True)
            }
            return {**rows, "up": [[self.up.weight[:, i]] for i in range(5)]}
        return {
            "grouped": [
                [self.grouped.weight[3 * (i // 2) : 3 * (i // 2) + 3, i % 2]] for i in range(4)
            ],
            "up": [[self.up.weight[i]] for i in range(6)],
            "tied": [[self.tied.weight[:, i]] for i in range(5)],
            "last": [[self.last.weight[:, i]] for i in range(5)],
        }


@pytest.mark.parametrize("grouping", ["channel", "filter"])
def test_tied_empty_and_dead_weights(grouping: str) -> None:
    """At learning rate 0 the strongest stay bit for bit, and every other group is zero."""
    model, expected = Everything(), Everything()
    callback = WGSEFCallback(k=K, lam=Homotopy(length=3), grouping=grouping)
    images = list(torch.randn(4, 3, 2, 5, 5, generator=torch.Generator().manual_seed(0)))
    make_trainer([callback], max_epochs=1).fit(model, DataLoader(images, None))
    layers = expected.groups_of(grouping)
    assert {layer.name for layer in callback.regularizer.groups.layers} == set(layers)
    with torch.no_grad():
        for name, groups in layers.items():
            norms = [sum(float(part.square().sum()) for part in group) for group in groups]
            kept = sorted(range(len(groups)), key=norms.__getitem__)[-K:]
            for number, group in enumerate(groups):
                for part in group:
                    part.mul_(number in kept and norms[number] > 0)
            zeros = [norms[i] == 0 or i not in kept for i in range(len(groups))]
            assert (~callback.regularizer.masks[name]).tolist() == zeros
    for (name, ours), theirs in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert model.twin.weight is model.tied.weight


def test_network_made_in_configure_model() -> None:
    """The network does not exist before the fit has started."""

    class Late(Dense):
        def __init__(self) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = Dense().net

    model = Late()
    schedule, _ = fit(model, 10)
    assert len(schedule.rates) == 10
    assert_same(model.net, slow_loop(single(10)))


def test_buffers_named_mask_and_names_of_the_state() -> None:
    """Buffers of the user that look like masks of pruning are nobody else's."""

    class Masked(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.net[2].register_buffer("weight_mask", torch.zeros(6, 5))
            self.register_buffer("net_mask", torch.full((3,), 7.0))

    model = Masked()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, 10)
    after = model.state_dict()
    assert list(after) == list(before)
    for name in ("net.2.weight_mask", "net_mask"):
        assert torch.equal(after[name], before[name])
    del model.net[2].weight_mask
    assert_same(model.net, slow_loop(single(10)))


def test_strict_load_into_the_plain_class(tmp_path: Any) -> None:
    model, callback = Dense(), pruning()
    trainer = make_trainer([callback], max_epochs=1)
    trainer.fit(model, data(8))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Dense.load_from_checkpoint(tmp_path / "last.ckpt", strict=True, weights_only=True)
    plain = dense_network()
    weights = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("net.") for name in weights)
    plain.load_state_dict({name[4:]: value for name, value in weights.items()}, strict=True)
    inputs, _ = batches(1)[0]
    for net in (plain, loaded.net):
        assert type(net[2]) is nn.Linear
        assert alive(net) == alive(model.net)
        assert [len(columns) for columns in alive(net)] == [K, K]
        assert torch.equal(net(inputs), model.net(inputs))
