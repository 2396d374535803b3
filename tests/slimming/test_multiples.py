"""Widths that slim leaves are multiples of what was named, and no wider than that needs."""

import pytest
import torch
from torch import nn

from lightning_wgsef import WGSEFCallback, group_parameters, load_slim, save_slim, slim
from tests.helpers.groups import raises_naming
from tests.helpers.networks.slim import IMAGE, Residual, check, drawn, pruned
from tests.helpers.trainers import make_trainer


def convolutions(*widths, groups=1):
    torch.manual_seed(0)
    first, second = widths
    return drawn(
        nn.Sequential(
            nn.Conv2d(3, first, 3),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, groups=groups),
            nn.ReLU(),
            nn.Conv2d(second, 4, 1),
        )
    )


def made(network):
    return [x.out_channels for x in network if isinstance(x, nn.Conv2d)]


@pytest.mark.parametrize(
    ("alive", "multiple_of", "left"),
    [
        (9, 1, 9),
        (9, 8, 16),
        (8, 8, 8),
        (1, 8, 8),
        (0, 8, 8),
        (17, 8, 20),  # of 20: there is no multiple, and nothing else than what is dead may go
        (9, 6, 12),
        (9, {"3": 8}, 16),
        (9, {"0": 8}, 16),
        (9, {"5": 8}, 9),
        (9, {"1*": 4, "*": 8}, 16),
    ],
)
def test_as_many_zero_channels_stay_as_a_multiple_needs(alive, multiple_of, left):
    network = convolutions(20 if alive == 17 else 24, 16)
    network[3].weight.data[:, alive:] = 0
    small = slim(network, IMAGE, multiple_of=multiple_of)
    check(network, IMAGE, small)
    wanted = alive if alive == 17 else left
    # Where nothing is read, what is made is constant, too.
    assert made(small) == [wanted, 16 if alive else 8, 4]
    said = small.slimming.kept.get("0", "")
    assert ("zero groups stay, to keep multiple_of" in said) == (wanted > max(alive, 1))


def test_zeros_that_came_by_themselves(tmp_path):
    """After a run that was asked for multiples, one channel of what stays dies, too."""
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 8, 8), torch.randint(4, (32,))

    class Training(make_module()):
        def __init__(self):
            super().__init__()
            self.network = convolutions(24, 16)
            self.example_input_array = images[:2]

        def forward(self, x):
            return self.network(x).mean((2, 3))

    model = Training()
    options = {"grouping": "structure", "multiple_of": 8}
    callback = WGSEFCallback(0.5, slim_to=tmp_path / "first.safetensors", **options)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 4)
    make_trainer([callback], max_epochs=2).fit(model, data)
    network = model.network.eval()
    assert made(slim(network, images[:2])) == [8, 8, 4]
    alive = network[3].weight.detach().ne(0).flatten(1).any(1).nonzero().flatten()
    for tensor in (network[3].weight, network[3].bias):
        tensor.data[alive[:3]] = 0
    assert made(slim(network, images[:2])) == [8, 5, 4]
    small = slim(network, images[:2], multiple_of=8)
    check(network, images[:2], small)
    assert made(small) == [8, 8, 4]
    # A fine-tuning of it, with its zeros.
    again = WGSEFCallback(
        masks="from_zeros",
        slim_to=tmp_path / "small.safetensors",
        grouping="structure",
        multiple_of=8,
    )
    make_trainer([again], max_epochs=1).fit(model.train(), data)
    loaded = load_slim(tmp_path / "small.safetensors", Training)
    assert made(loaded.network) == [8, 8, 4]
    save_slim(small, tmp_path / "network.safetensors")
    assert made(load_slim(tmp_path / "network.safetensors", lambda: convolutions(24, 16))) == [
        8,
        8,
        4,
    ]


def make_module():
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    return Module


def test_bundles_heads_and_hidden_units():
    """Parts of a grouped convolution lose channels together; a head is four channels."""
    network = convolutions(24, 16, groups=2)
    network[3].weight.data[:, 3:] = 0  # three of every part
    assert made(slim(network, IMAGE, multiple_of=8))[0] == 8
    layer = nn.TransformerEncoderLayer(24, 6, 20, batch_first=True)
    example = torch.randn(2, 5, 24)
    network = pruned(drawn(layer), "head", *range(3), example=example)
    network = pruned(network, "hidden", *range(11), example=example)
    small = slim(network.eval(), example, multiple_of=8)
    assert small.linear1.out_features == 16
    assert small.self_attn.num_heads == 4
    assert slim(network, example).self_attn.num_heads == 3


@pytest.mark.parametrize(
    ("kind", "options", "grouping"),
    [
        ("LSTM", {}, "structure"),
        ("LSTM", {"proj_size": 6}, "hidden"),
        ("GRU", {"bidirectional": True}, "hidden"),
        ("RNN", {}, "structure"),
    ],
)
def test_units_of_recurrent_layers(kind, options, grouping):
    """A unit is one channel, whatever the number of its gates."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = getattr(nn, kind)(4, 20, batch_first=True, **options)
            width = options.get("proj_size", 20 * (1 + bool(options.get("bidirectional"))))
            self.fc = nn.Linear(width, 3)

        def forward(self, x):
            return self.fc(self.inner(x)[0])

    network, example = drawn(Reader().eval()), torch.randn(2, 5, 4)
    options = {"multiple_of": 8, "example_input": example, "include": ["inner"]}
    (layer,) = group_parameters(network, grouping, 0.5, **options).layers
    assert (layer.multiple, layer.budget) == (8, 8)
    pruned(network, grouping, *range(9), example=example)
    assert slim(network, example, multiple_of=8).inner.hidden_size == 16
    assert slim(network, example).inner.hidden_size == 11


def test_residual_streams_and_outputs():
    network = drawn(Residual())
    network.block.outer.weight.data[:, 2:] = 0
    small = slim(network, torch.rand(1, 3, 6, 6), multiple_of=4)
    assert small.block.inner.out_channels == 4
    check(network, torch.rand(2, 3, 6, 6), small)


@pytest.mark.parametrize("bad", [0, -8, 1.5, True, {}, {"0": 0}, {"none*": 8}])
def test_what_is_no_multiple(bad):
    with raises_naming("multiple_of"):
        slim(convolutions(8, 8), IMAGE, multiple_of=bad)
