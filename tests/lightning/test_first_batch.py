"""Inputs and outputs of a network without an example: the first batch shows them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef import WGSEFCallback
from tests.helpers.trainers import NAMESPACES, make_trainer, namespace

GENERATOR = torch.Generator().manual_seed(0)
ROWS, TIMES = torch.randn(16, 6, generator=GENERATOR), torch.rand(16, 3, generator=GENERATOR)
LABELS = torch.randint(0, 3, (16,), generator=GENERATOR)


def heads(name: str = "pytorch_lightning", *, refuses: bool = False) -> Any:
    """A time embedding before the stem, and two heads: no end is the first or the last alone."""

    class Heads(namespace(name).LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.stem = nn.Linear(3, 8), nn.Linear(6, 8)
            self.body = nn.Linear(8, 12)
            self.first, self.second = nn.Linear(12, 3), nn.Linear(12, 5)
            self.modes: list[bool] = []

        def forward(self, rows: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
            if refuses and not self.training:
                raise RuntimeError("only in training")
            self.modes.append(self.training)
            x = self.body((self.stem(rows) + self.time(times)).relu()).relu()
            return self.first(x), self.second(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            one, other = self(*batch[:2])
            return nn.functional.cross_entropy(one, batch[2]) + other.square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    torch.manual_seed(0)
    return Heads()


def fit(
    model: Any, name: str = "pytorch_lightning", epochs: int = 4, fitting: Any = None, **more: Any
) -> tuple[Any, WGSEFCallback, list[str]]:
    data = torch.utils.data.TensorDataset(ROWS, TIMES, LABELS)
    callback = WGSEFCallback(0.5, **more)
    trainer = make_trainer([callback], name, max_epochs=epochs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4), **(fitting or {}))
    said = [str(x.message) for x in caught if "others may, too" in str(x.message)]
    return trainer, callback, said


@pytest.mark.parametrize("name", NAMESPACES)
@pytest.mark.parametrize(
    ("grouping", "grouped"),
    [("channel", ["body", "first", "second"]), ("filter", ["time", "stem", "body"])],
)
def test_the_first_batch_shows_both_ends(
    name: str, grouping: str, grouped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = heads(name)
    _, callback, said = fit(model, name, grouping=grouping)
    assert not said
    regularizer = callback.regularizer
    assert regularizer is not None
    assert list(regularizer.masks) == grouped
    assert regularizer.frozen
    assert all(int(mask.sum()) == len(mask) / 2 for mask in regularizer.masks.values())
    assert "the first batch shows" in capsys.readouterr().out
    for layer in (model.stem, model.time):  # all of the inputs are read
        assert bool(layer.weight.any(0).all())
    for layer in (model.first, model.second):  # all outputs are made
        assert bool(layer.weight.any(1).all())
    assert model.modes == [False] + [True] * 16  # seen once, in evaluation mode
    assert regularizer.state_dict()["grouping"]["grouping"] == grouping


def test_the_same_training_as_with_an_example() -> None:
    one, other = heads(), heads()
    fit(one)
    fit(other, example_input=(ROWS[:4], TIMES[:4]))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_was_shown_holds_for_a_resumed_run(tmp_path: Path) -> None:
    whole, resumed = heads(), heads()
    fit(whole)
    first = heads()
    trainer, _, _ = fit(first, epochs=1, freeze=8)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    more = {"ckpt_path": tmp_path / "first.ckpt", "weights_only": True}
    _, callback, said = fit(resumed, epochs=4, fitting=more, freeze=8)
    assert not said
    assert callback.regularizer is not None
    assert list(callback.regularizer.masks) == ["body", "first", "second"]
    assert resumed.modes == [True] * 12
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_network_that_does_not_run_on_the_batch() -> None:
    """The order of definition is the rule then, and is said once."""
    _, callback, said = fit(heads(refuses=True))
    assert len(said) == 1
    assert "By the order of definition, 'time' reads the network's input" in said[0]
    assert callback.regularizer is not None
    assert "stem" in callback.regularizer.masks


def test_a_layer_of_outputs_alone_is_an_error_before_the_first_step() -> None:
    class Towers(type(heads())):
        def __init__(self) -> None:
            super().__init__()
            del self.body, self.first, self.second
            self.time, self.stem = nn.Linear(3, 4), nn.Linear(6, 5)

        def forward(self, rows: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
            return self.time(times), self.stem(rows)

    model = Towers()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="no layer that grouping='channel' can group"):
        fit(model)
    assert all(map(torch.equal, before, model.parameters()))
