"""A slim network written and rebuilt from the class it had: bit for bit, or a clear message."""

import json
import os

import pytest
import safetensors
import torch
from helpers import raises_naming
from safetensors.torch import save_file
from slim_networks import IMAGE, SEQUENCE, Residual, convolutions, drawn, pruned, silent
from torch import nn

from lightning_wgsef.slim_files import load_slim, save_slim
from lightning_wgsef.slimming import slim


class Tied(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.words, self.inner = nn.Embedding(9, 6), nn.Linear(6, width)
        self.outer, self.head = nn.Linear(width, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        x = self.words(tokens)
        return self.head(x + self.outer(self.inner(x).tanh()))


def encoder():
    layer = nn.TransformerEncoderLayer(12, 4, 16, dropout=0.1, batch_first=True)
    return drawn(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def without_bias():
    last = nn.Conv2d(8, 4, 1, bias=False)
    return convolutions(nn.BatchNorm2d(8, affine=False), nn.Sigmoid(), last=last)


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
BOTH = {"*self_attn": "head", "*linear1": "hidden"}
NETWORKS = {
    "filters": (lambda: convolutions(nn.BatchNorm2d(8)), "filter", [0, 7], IMAGE),
    "blocks and sums": (Residual, "structure", [0, 3], IMAGE),
    "skipped": (Residual, "layer", [1], IMAGE),
    "heads and units": (encoder, BOTH, [1, 4, 5, 10], SEQUENCE),
    "tied": (Tied, "hidden", [1], TOKENS),
    "norms of torch": (
        lambda: nn.Sequential(nn.Linear(12, 8), nn.RMSNorm(8), nn.Linear(8, 2)),
        "channel",
        [],
        SEQUENCE,
    ),
}


def made(kind):
    """How to make the network, a slim one, and its example."""
    make, grouping, dead, example = NETWORKS[kind]
    traced = example if grouping in ("structure", "layer") else None
    return make, slim(pruned(drawn(make()), grouping, *dead, example=traced), example), example


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_read_is_what_was_written(kind, tmp_path):
    make, small, example = made(kind)
    save_slim(small, tmp_path / "small.safetensors")
    assert os.listdir(tmp_path) == ["small.safetensors"]
    again = load_slim(tmp_path / "small.safetensors", make)
    assert [name for name, _ in again.named_parameters()] == [
        name for name, _ in small.named_parameters()
    ]
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in small.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(example), small.eval()(example))
    assert str(again) == str(small)
    save_slim(again, tmp_path / "again.safetensors")  # it can be made smaller once more
    assert [x.kept for x in again.slimming.plans] == [x.kept for x in small.slimming.plans]


def test_others_may_read_it_as_any_new_file(tmp_path):
    _, small, _ = made(next(iter(NETWORKS)))
    save_slim(small, tmp_path / "small.safetensors")
    (tmp_path / "another").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_bias_that_was_added(tmp_path):
    network = silent(without_bias(), 1)
    with torch.no_grad():
        network[1].running_mean[1] = network[0].bias[1] = 0  # else training differs
    small = slim(network, IMAGE)
    assert small[3].bias is not None
    save_slim(small, tmp_path / "small.safetensors")
    again = load_slim(tmp_path / "small.safetensors", without_bias)
    assert torch.equal(again[3].bias, small[3].bias)


def test_ties_survive(tmp_path):
    make, small, _ = made("tied")
    save_slim(small, tmp_path / "small.safetensors")
    again = load_slim(tmp_path / "small.safetensors", make)
    assert again.head.weight is again.words.weight


def test_two_rounds(tmp_path):
    make, small, _ = made("filters")
    smaller = slim(pruned(small, "filter", 0), IMAGE)
    assert len(smaller.slimming.plans) == 2
    save_slim(smaller, tmp_path / "small.safetensors")
    assert load_slim(tmp_path / "small.safetensors", make)[0].out_channels == 5


def test_the_file_holds_numbers_and_json(tmp_path):
    _, small, _ = made("filters")
    save_slim(small, tmp_path / "small.safetensors")
    with safetensors.safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        plans = json.loads(file.metadata()["plans"])
    assert plans[0]["kept"]["0.weight"] == {"0": [1, 2, 3, 4, 5, 6]}


# --- mistakes ----------------------------------------------------------------------------------


def refused(path, make, *words):
    with raises_naming(*words):
        load_slim(path, make)


def test_no_such_file(tmp_path):
    refused(tmp_path / "none", Residual, "no file", "none")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated(share, tmp_path):
    make, small, _ = made("filters")
    path = tmp_path / "small.safetensors"
    save_slim(small, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(path, make, "truncated", "small.safetensors")


def test_another_kind_of_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1)}, path)
    refused(path, Residual, "save_slim", "None")
    torch.save({"a": torch.ones(1)}, path)
    refused(path, Residual, "no safetensors file")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tied(5), ["make_model", "Tied"]),
        (lambda: Tied(9), ["make_model", "Tied"]),
        (Residual, ["make_model", "Tied"]),
        (lambda: nn.Sequential(Tied()), ["make_model", "Tied"]),
        (nn.Flatten, ["make_model", "Tied"]),
    ],
)
def test_another_network(make, words, tmp_path):
    _, small, _ = made("tied")
    path = tmp_path / "small.safetensors"
    save_slim(small, path)
    if make().__class__ is Tied and make().inner.out_features == 9:
        again = load_slim(path, make)  # what is kept is there: it is the same network after all
        assert again.inner.out_features == 7
    else:
        refused(path, make, *words)


@pytest.mark.parametrize(
    "header", [{}, {"plans": "[]"}, {"plans": "[1]", "tied": "{}"}, {"plans": "[{", "tied": "{}"}]
)
def test_a_damaged_header(header, tmp_path):
    path = tmp_path / "small.safetensors"
    file_format = {"format": "lightning_wgsef slim network, version 1"}
    save_file({"a": torch.ones(1)}, path, {**file_format, **header})
    refused(path, Residual, "header", "damaged")


def test_heads_of_something_else(tmp_path):
    _, small, _ = made("heads and units")
    path = tmp_path / "small.safetensors"
    save_slim(small, path)

    def other():
        network = encoder()
        network.layers[0].self_attn = nn.Linear(12, 12)
        return network

    refused(path, other, "make_model", "layers.0.self_attn")


def test_a_network_that_is_not_slim(tmp_path):
    with raises_naming("model", "slim", "Residual"):
        save_slim(Residual(), tmp_path / "small.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_path_that_cannot_be_written(tmp_path):
    _, small, _ = made("filters")
    with raises_naming("path", "missing"):
        save_slim(small, tmp_path / "missing" / "small.safetensors")
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path, monkeypatch):
    _, small, _ = made("filters")
    path = tmp_path / "small.safetensors"
    save_slim(small, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_wgsef.slim_files.save_file", full)
    with raises_naming("small.safetensors", "No space left"):
        save_slim(small, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["small.safetensors"]
