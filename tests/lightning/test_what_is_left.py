"""What is decided when a fit starts is compared with what is left: steps, zeros, weights, state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_wgsef import WGSEF, WGSEFCallback
from tests.helpers.trainers import make_trainer
from tests.lightning.test_mask_is_kept import K, Net, alive, data

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


@pytest.mark.parametrize("arguments", [{}, {"freeze": 0.5}, {"freeze": 0.9}, {"lam": 0.1}])
def test_a_dense_checkpoint_behind_the_freeze_point(arguments: Any, tmp_path: Path) -> None:
    trainer = make_trainer([], max_epochs=6)
    trainer.fit(Net(), data())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    model, callback = Net(), WGSEFCallback(k=K, **arguments)
    make_trainer([callback], max_epochs=10).fit(model, data(), ckpt_path=tmp_path / "dense.ckpt")
    assert callback.regularizer.pruners[0].total_steps == 4 * 8
    assert callback.regularizer.frozen
    assert alive(model.net) == [K, K]


def pruned() -> nn.Sequential:
    net = Net().net
    with torch.no_grad():
        for layer in (net[2], net[4]):
            layer.weight[:, K:] = 0
    return net


def test_a_layer_that_is_zero_as_a_whole_is_named() -> None:
    net = pruned()
    nn.init.zeros_(net[4].weight)
    with pytest.warns(UserWarning, match=r"^4: zero as a whole.*exclude=\['4'\]"):
        WGSEF(net, masks="from_zeros")
    WGSEF(net, masks="from_zeros", exclude=["4"])


def test_masks_of_weights_that_were_not_loaded(tmp_path: Path) -> None:
    net, path = pruned(), tmp_path / "pruned.pt"
    torch.save(net.state_dict(), path)
    with pytest.raises(ValueError, match=r"weights of 2, 4 that are zero.*load_state_dict"):
        WGSEF(Net().net, masks=path)
    masks = WGSEF(net, masks=path).masks
    assert [int(mask.sum()) for mask in masks.values()] == [K, K]


@pytest.mark.parametrize(
    "arguments", [{"scope": "global"}, {"weights": "size"}, {"costs": "params"}]
)
def test_other_arguments_are_not_called_damage(arguments: Any) -> None:
    def attached(**more: Any) -> WGSEF:
        net = Net().net
        return WGSEF(net, k=0.25, total_steps=9, **more).attach(torch.optim.Adam(net.parameters()))

    for before, after in (({}, arguments), (arguments, {})):
        with pytest.raises(ValueError, match=r"the arguments changed.*scope=, weights=, costs="):
            attached(**after).load_state_dict(attached(**before).state_dict())
