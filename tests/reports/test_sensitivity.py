"""Sensitivity of the loss to layers: the numbers, the proposal, what is written, bad input."""

import copy
import json

import pytest
import torch
from torch import nn

from lightning_wgsef import plot_report, prune, sensitivity
from lightning_wgsef.network.flops import layer_flops
from tests.helpers.groups import mlp, raises_naming
from tests.helpers.networks.slim import Residual

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 2
PAIRS = [(IMAGES[:16], LABELS[:16]), (IMAGES[16:], LABELS[16:])]


def residual():
    torch.manual_seed(0)
    network = Residual()
    network(IMAGES)  # statistics that are of no batch alone
    network.block.eval()
    return network


def test_losses_are_those_of_networks_without_the_weakest_groups():
    """Against an own loop in float64, over a network without a norm: units of two layers."""
    torch.manual_seed(1)
    network = nn.Sequential(*mlp(4, 12, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(30, 4).double(), torch.arange(30) % 3
    pairs = [(inputs[:20], targets[:20]), (inputs[20:], targets[20:])]
    report = sensitivity(network, pairs, levels=(0.5, 0.25))
    entropy = nn.functional.cross_entropy
    assert report.loss == pytest.approx(entropy(network(inputs), targets).item())
    for layer, reader in (("0", "2"), ("2", "4")):
        modules = dict(network.named_modules())
        worth = torch.zeros(len(modules[layer].weight)).double()
        for x, y in pairs:
            network.zero_grad()
            entropy(network(x), y).backward()
            made, read = modules[layer], modules[reader]
            sums = (made.weight * made.weight.grad).sum(1) + made.bias * made.bias.grad
            worth += (sums + (read.weight * read.weight.grad).sum(0)).square()
        own = next(x for x in report.layers if x.name == layer)
        assert own.kept == (len(worth) // 2, len(worth) // 4)
        for number, loss in zip(own.kept, own.losses, strict=True):
            cut = copy.deepcopy(network)
            dead = worth.argsort(descending=True)[number:]
            module = dict(cut.named_modules())[layer]
            module.weight.data[dead], module.bias.data[dead] = 0, 0
            assert loss == pytest.approx(entropy(cut(inputs), targets).item(), rel=1e-6), layer


@pytest.mark.parametrize(
    ("k", "measure"),
    [("900 params", "params"), ("4 kB", "bytes"), (9, "groups")],
)
def test_the_proposal_keeps_the_size_and_is_no_worse_than_like_shares(k, measure):
    network = residual()
    options = {"costs": None} if measure == "groups" else {}
    report = sensitivity(network, PAIRS, k=k, **options)
    assert report.proposed_size <= report.limit
    assert report.alike_size <= report.limit
    assert report.proposed_loss <= report.alike_loss
    small = prune(network, PAIRS, report.k)
    found = {
        "params": sum(p.numel() for p in small.parameters()),
        "bytes": sum(x.numel() * x.element_size() for x in small.state_dict().values()),
        "groups": sum(len(small.get_submodule(x.name).weight) for x in report.layers),
    }[measure]
    assert found == report.proposed_size


def test_the_loss_of_the_proposal_is_that_of_what_prune_returns():
    """Statistics of BatchNorm are those of the network that was cut."""
    network = residual()
    report = sensitivity(network, PAIRS, k=0.5)
    small = prune(network, PAIRS, report.k).eval()
    assert layer_flops(small, IMAGES[:1])[1] == report.proposed_size <= report.limit
    losses = [nn.functional.cross_entropy(small(x), y, reduction="sum").item() for x, y in PAIRS]
    assert report.proposed_loss == pytest.approx(sum(losses) / 24, rel=1e-4)


def test_a_layer_that_the_loss_does_not_feel_gives_what_is_asked_for():
    torch.manual_seed(0)
    network = nn.Sequential(*mlp(4, 16, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        network[2].weight[:, 2:] = 0  # 14 of 16 units are read by nobody
        network[0].weight.mul_(10)
    inputs = torch.randn(64, 4)
    targets = network(inputs).argmax(1)
    report = sensitivity(network, [(inputs, targets)], k=0.5)
    assert report.layers[0].losses == pytest.approx([report.loss] * 3)
    assert report.proposed_loss < report.loss + 1e-3 < report.alike_loss


def test_the_model_is_left_as_it_was():
    network = residual()
    network.stem.weight.grad = torch.ones_like(network.stem.weight)
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    random = torch.get_rng_state()
    sensitivity(network, PAIRS)
    assert all(torch.equal(before[name], x) for name, x in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(network.stem.weight.grad, torch.ones_like(network.stem.weight))
    assert sum(p.grad is not None for p in network.parameters()) == 1


def test_text_json_and_plot(tmp_path):
    report = sensitivity(residual(), PAIRS, levels=[0.25, 0.5], multiple_of={"stem": 2})
    text = str(report)
    assert text.splitlines()[0].split() == [
        *("layer", "groups", "loss,", "50%", "stay", "loss,", "25%", "stay", "k")
    ]
    assert f"{report.loss:.4g}, on 24 samples" in text
    assert f"k = {report.k}" in text
    report.save_json(tmp_path / "found.json")
    read = json.loads((tmp_path / "found.json").read_text())
    assert read["k"] == report.k
    assert read["levels"] == [0.5, 0.25]
    stem = next(layer for layer in read["layers"] if layer["name"] == "stem")
    assert all(number % 2 == 0 for number in (*stem["kept"], stem["proposed"]))
    upper, lower = plot_report(report).axes
    assert [list(line.get_ydata()) for line in upper.lines[:2]] == [
        [layer.losses[number] for layer in report.layers] for number in (0, 1)
    ]
    shares = [100 * layer.proposed / layer.groups for layer in report.layers]
    assert [bar.get_height() for bar in lower.patches] == pytest.approx(shares)


def test_heads_units_and_a_loss_of_ones_own():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True), nn.Flatten(1))
    pairs = [(torch.randn(4, 5, 8), torch.randn(4, 40))]
    kinds = {"*attn": "head", "*linear1": "hidden"}
    report = sensitivity(encoder, pairs, nn.functional.mse_loss, 0.7, grouping=kinds)
    assert {x.name: x.groups for x in report.layers} == {"0.self_attn": 4, "0.linear1": 16}
    dense = layer_flops(encoder, pairs[0][0])[1]
    small = prune(encoder, pairs, report.k, loss=nn.functional.mse_loss, grouping=kinds)
    assert layer_flops(small, pairs[0][0])[1] <= 0.7 * dense


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batches": [IMAGES]}, ["batches[0] must be a pair of inputs and targets (labels)"]),
        ({"batches": [PAIRS[0], (IMAGES, LABELS[:3])]}, ["cross entropy (loss=None)", "(3,)"]),
        (
            {"batches": [(IMAGES[:, :1], LABELS)]},
            ["the inputs of batches[0] must be what Residual takes"],
        ),
        ({"batches": [PAIRS[0], (IMAGES[:0], LABELS[:0])]}, ["batches[1] must hold at least one"]),
        ({"loss": lambda y, t: y.detach().sum()}, ["weights='taylor'", "loss of batches[0]"]),
        ({"k": 0.001}, ["k = 0.001", "must lie between", "one group of every layer"]),
        ({"k": "5 miles"}, ["k must be", "got '5 miles'", "units: FLOPs, params, B"]),
        ({"k": {"stem": 2}}, ["k must be the size of all layers together", "{'stem': 2}"]),
        ({"levels": (0.5, 1.5)}, ["levels must be shares", "(0, 1)", "got (0.5, 1.5)"]),
        ({"levels": ()}, ["levels must be shares", "got ()"]),
        ({"levels": 3}, ["levels must be shares", "got 3"]),
        ({"loss": lambda y, t: y}, ["loss must return a tensor of one number"]),
        ({"loss": lambda y, t: y.sum() * torch.nan}, ["loss must be finite", "got nan"]),
        ({"scope": "layer"}, ["scope", "sensitivity"]),
        ({"grouping": "nothing"}, ["grouping must be"]),
    ],
)
def test_bad_input(arguments, words):
    with raises_naming(*words):
        sensitivity(residual(), **{"batches": PAIRS, **arguments})
