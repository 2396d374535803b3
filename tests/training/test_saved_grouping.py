"""Fine-tuning under masks without naming the grouping: from a checkpoint, and from zeros."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_wgsef import WGSEF, Groups, Homotopy, WGSEFCallback, slim
from lightning_wgsef.groupings.per_layer import filter_groups
from tests.helpers.groups import raises_naming
from tests.helpers.plain_loops import Dense, data
from tests.helpers.trainers import make_trainer

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inside, self.behind = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.up, self.last = nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        x = (x + self.behind(self.inside(x))).relu()
        outputs: Tensor = self.last(self.up(x).relu()).mean((2, 3))
        return outputs


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.block(tokens).mean(1))
        return outputs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = x + self.b(self.a(x).relu())
        return outputs


class Blocks(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), *(Block() for _ in range(4)), nn.Linear(8, 2))


def own_filters(model: nn.Module) -> Groups:
    return filter_groups(model)


CASES: dict[str, tuple[type[nn.Module], Tensor, Any]] = {
    "channel": (Convolutions, IMAGES, "channel"),
    "filter": (Convolutions, IMAGES, "filter"),
    "structure": (Convolutions, IMAGES, "structure"),
    "filter_shape": (Convolutions, IMAGES, "filter_shape"),
    "element": (Convolutions, IMAGES, "element"),
    "2:4": (Convolutions, IMAGES, "2:4"),
    "block": (Convolutions, IMAGES, "block:2x2"),
    "function": (Convolutions, IMAGES, own_filters),
    "mapping": (Convolutions, IMAGES, {"stem": "filter", "last": "channel"}),
    "head": (Attention, TOKENS, "head"),
    "hidden": (Attention, TOKENS, "hidden"),
    "head and hidden": (Attention, TOKENS, {"*attn*": "head", "*linear1": "hidden"}),
    "layer": (Blocks, TOKENS, "layer"),
}


def train(network: nn.Module, inputs: Tensor, regularizer: WGSEF, steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), 0.01, weight_decay=0.1)
    regularizer.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (network(inputs) - 1).square().mean().backward()
        optimizer.step()
    regularizer.detach()


def trained(name: str) -> tuple[nn.Module, WGSEF]:
    make, inputs, grouping = CASES[name]
    torch.manual_seed(0)
    network = make()
    example = inputs if name in ("structure", "layer") else None
    regularizer = WGSEF(network, 0.5, Homotopy(length=4), grouping, example_input=example)
    train(network, inputs, regularizer, 6)
    assert regularizer.frozen
    return network, regularizer


@pytest.mark.filterwarnings("ignore:lam = Homotopy")  # a way of four steps cuts
@pytest.mark.filterwarnings("ignore:.*zero as a whole")
@pytest.mark.parametrize("name", CASES)
def test_no_grouping_has_to_be_named(name: str, tmp_path: Path) -> None:
    network, regularizer = trained(name)
    _, inputs, _ = CASES[name]
    state = regularizer.state_dict()
    path = tmp_path / "pruned.ckpt"
    torch.save({"state_dict": network.state_dict(), "callbacks": {"WGSEFCallback": state}}, path)
    for masks in (path, "from_zeros"):
        tuned = copy.deepcopy(network)
        kept = WGSEF(tuned, masks=masks)
        train(tuned, inputs, kept, 4)
        before, after = dict(network.named_parameters()), dict(tuned.named_parameters())
        of_groups = {m.name for layer in regularizer.groups.layers for m in layer.members}
        for parameter in of_groups:
            dead = before[parameter] == 0
            assert not bool(after[parameter][dead].any()), (masks, parameter)
            assert bool(dead.all()) == torch.equal(after[parameter], before[parameter])
        if masks == path:  # the same groups, by the same names, and what was alive is their budget
            assert kept.groups.counts == regularizer.groups.counts
            assert {n: x.tolist() for n, x in kept.masks.items()} == {
                n: x.tolist() for n, x in regularizer.masks.items()
            }
            again = kept.state_dict()["grouping"]
            assert again["grouping"] == state["grouping"]["grouping"]
            assert again["layers"].keys() == state["grouping"]["layers"].keys()


@pytest.mark.filterwarnings("ignore:lam = Homotopy")
def test_what_was_removable_is_removable_after_fine_tuning() -> None:
    network, _ = trained("structure")
    train(network, IMAGES, WGSEF(network, masks="from_zeros"), 4)
    small = slim(network.eval(), IMAGES)
    assert (small.stem.out_channels, small.up.out_channels) == (4, 4)


@pytest.mark.filterwarnings("ignore:lam = Homotopy")
def test_another_grouping_than_the_checkpoints_is_said(tmp_path: Path) -> None:
    network, regularizer = trained("structure")
    state = {"WGSEFCallback": regularizer.state_dict()}
    path = tmp_path / "pruned.ckpt"
    torch.save({"state_dict": network.state_dict(), "callbacks": state}, path)
    with pytest.warns(UserWarning, match="pruned with grouping='structure', k=0.5"):
        WGSEF(copy.deepcopy(network), grouping="filter", include="stem", masks=path)
    other = (
        WGSEF(Convolutions(), 0.5, Homotopy(length=4), "filter").attach(
            torch.optim.SGD(network.parameters(), 0.1)
        )
        if False
        else None
    )
    assert other is None


def test_filters_that_torch_pruned_in_front_of_a_norm_stay_zero() -> None:
    torch.manual_seed(0)
    network = Convolutions()
    for layer in (network.stem, network.inside):
        prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
        prune.remove(layer, "weight")
    dead = network.stem.weight.flatten(1).eq(0).all(1)
    assert dead.sum() == 4
    with raises_naming("no group is zero in", "beside masks= no grouping"):
        WGSEF(network, grouping="filter", masks="from_zeros")
    train(network, IMAGES, WGSEF(network, masks="from_zeros"), 4)
    assert torch.equal(network.stem.weight.flatten(1).eq(0).all(1), dead)
    assert network.norm.bias[dead].any()  # of the norm nothing was zero, and it is trained


def test_zeros_outside_of_the_groups_that_are_named_are_said() -> None:
    network = Convolutions()
    network.last.weight.data[:, :4] = 0
    network.stem.weight.data[:2] = 0
    with pytest.warns(UserWarning, match=r"zero weights of stem.weight \(25%\).*'channel'"):
        WGSEF(network, grouping="channel", masks="from_zeros")
    assert len(WGSEF(network, masks="from_zeros").groups.layers) == 2


def test_new_layers_of_zeros_are_named() -> None:
    network = Convolutions()
    network.last.weight.data[:, :4] = 0
    nn.init.zeros_(network.inside.weight)
    with pytest.warns(UserWarning, match="inside: zero as a whole"):
        WGSEF(network, masks="from_zeros")
    kept = WGSEF(network, masks="from_zeros", exclude="inside")
    assert "inside" not in kept.masks
    assert kept.masks["last"].sum() == 4


@pytest.mark.parametrize("damage", [3, {"layers": 3}, {"layers": {"a": {}}}, {"layers": {"a": 1}}])
def test_a_damaged_grouping_is_refused(damage: Any, tmp_path: Path) -> None:
    network = Convolutions()
    network.last.weight.data[:, :4] = 0
    state = {"WGSEFCallback": {"attachments": [], "grouping": damage}}
    torch.save({"state_dict": network.state_dict(), "callbacks": state}, tmp_path / "last.ckpt")
    if damage == 3:  # is none
        assert WGSEF(network, masks=tmp_path / "last.ckpt").masks["last"].sum() == 4
        return
    with raises_naming("the saved grouping is damaged"):
        WGSEF(network, masks=tmp_path / "last.ckpt")


def test_of_another_model(tmp_path: Path) -> None:
    network, regularizer = Dense(), WGSEF(Dense())
    network.net[2].weight.data[:, :4] = 0
    state = {"WGSEFCallback": regularizer.state_dict()}
    torch.save({"state_dict": network.state_dict(), "callbacks": state}, tmp_path / "last.ckpt")
    with raises_naming("which the model lacks: another model"):
        WGSEF(Convolutions(), masks=tmp_path / "last.ckpt")


# --- in Lightning --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:lam = Homotopy")
def test_the_two_lines_of_the_guide_and_a_resumed_fine_tuning(tmp_path: Path) -> None:
    def fit(model: pl.LightningModule, epochs: int, callback: Any, **more: Any) -> Any:
        trainer = make_trainer([callback], max_epochs=epochs)
        trainer.fit(model, data(4), **more)
        return trainer

    model = Dense()
    pruning = WGSEFCallback(0.5, Homotopy(length=3), "filter")
    fit(model, 2, pruning).save_checkpoint(tmp_path / "pruned.ckpt")
    dead = {name: p == 0 for name, p in model.named_parameters()}
    assert any(bool(x.any()) for x in dead.values())
    for number, masks in enumerate((tmp_path / "pruned.ckpt", "from_zeros")):
        tuned = Dense()
        tuned.load_state_dict(torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"])
        last = tmp_path / f"tuned{number}.ckpt"
        fit(tuned, 1, WGSEFCallback(masks=masks)).save_checkpoint(last)
        (tmp_path / "moved.ckpt").write_bytes(b"")  # resuming needs the first file no more
        again = Dense()
        fit(again, 2, WGSEFCallback(masks=masks), ckpt_path=last, weights_only=True)
        for network in (tuned, again):
            for name, parameter in network.named_parameters():
                assert not bool(parameter[dead[name]].any())
    with raises_naming("of grouping='filter', k=0.5", "resume with the same model, grouping"):
        fit(
            Dense(),
            3,
            WGSEFCallback(0.5, grouping="element"),
            ckpt_path=tmp_path / "pruned.ckpt",
            weights_only=True,
        )
