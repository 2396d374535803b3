"""Parts that TorchScript has compiled: they stay as they are; what is around them is followed."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wgsef import WGSEFCallback, group_parameters, load_slim, save_slim, slim
from lightning_wgsef.network.interface import network_interface
from tests.helpers.groups import raises_naming
from tests.helpers.removal import difference, removal

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Normalise(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


def with_activation():
    act = torch.jit.script(Swish())
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act, nn.Conv2d(8, 4, 3))


def with_scripted_block():
    block = torch.jit.script(Block())
    convs = (nn.Conv2d(3, 8, 3), block, nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    return nn.Sequential(*convs)


def with_traced_block():
    block = torch.jit.trace(Block().eval(), torch.ones(1, 8, 4, 4))
    convs = (nn.Conv2d(3, 8, 3), block, nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    return nn.Sequential(*convs)


MAKERS = {
    with_activation: ({"0"}, {}),
    with_scripted_block: ({"2"}, {"0": "ConvolutionBackward"}),
    with_traced_block: ({"2"}, {"0": "ConvolutionBackward"}),
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("passes", [0, 5], ids=["cold", "warm"])
def test_what_is_around_them_is_taken_out(make, passes, tmp_path):
    """Warm, TorchScript has joined operations to one that autograd does not tell apart."""
    network = make()
    for _ in range(passes):
        network(IMAGES.clone().requires_grad_())
    names, left_out = MAKERS[make]
    found = removal(network, IMAGES, "structure")
    assert {layer.name for layer in found.groups.layers} == names
    for name, reason in left_out.items():
        assert reason in found.groups.left_out[name]
    if left_out:
        assert "compiled by TorchScript" in found.groups.left_out["1.conv"]
    assert all(parameter.is_leaf for parameter in found.small.parameters())  # to be trained on
    save_slim(found.small, tmp_path / "slim.safetensors")
    loaded = load_slim(tmp_path / "slim.safetensors", make)
    assert difference(found.small, loaded, IMAGES) == 0


@pytest.mark.parametrize("grouping", ["channel", "filter", "element"])
def test_other_groupings(grouping):
    groups = group_parameters(with_scripted_block(), grouping, example_input=IMAGES)
    assert {"2"} <= {layer.name for layer in groups.layers} <= {"0", "2", "4"}
    assert "compiled by TorchScript" in groups.left_out["1.conv"]


def test_no_hook_of_all_modules_is_left():
    """torch.compile warns of them."""
    network = with_activation()
    group_parameters(network, "structure", example_input=IMAGES)
    slim(network.eval(), IMAGES)
    assert not torch.nn.modules.module._has_any_global_hook()


def test_the_first_layer_behind_a_scripted_one_reads_the_input():
    network = nn.Sequential(torch.jit.script(Normalise()), *with_activation())
    for example in (IMAGES, None):
        found = network_interface(network, example)
        assert (set(found.inputs), set(found.outputs)) == ({"1"}, {"4"})
    assert network_interface(network, IMAGES).unseen == ""


def test_a_scripted_network_is_refused_in_words():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    for grouping in ("channel", "filter", "structure"):
        with raises_naming(f"grouping='{grouping}'", "compiled by TorchScript"):
            group_parameters(scripted, grouping, example_input=IMAGES)


class Module(pl.LightningModule):
    """The training step calls a scripted part itself."""

    def __init__(self):
        super().__init__()
        self.prepare, self.net = torch.jit.script(Normalise()), with_activation()

    def forward(self, x):
        return self.net(self.prepare(x))

    def training_step(self, batch, _):
        prepared = self.prepare(batch[0])
        return nn.functional.cross_entropy(self.net(prepared).mean((2, 3)), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_training(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(64, 3, 8, 8)
    data = DataLoader(TensorDataset(images, (images[:, 0].mean((1, 2)) > 0).long()), 16)
    module = Module()
    callback = WGSEFCallback(k=0.5, grouping="structure", example_input=images[:2])
    trainer = pl.Trainer(
        max_epochs=6,
        callbacks=[callback],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    small = slim(module.eval(), images[:2])
    assert small.net[0].out_channels == 4
    assert torch.allclose(small(images), module(images), atol=1e-5)
