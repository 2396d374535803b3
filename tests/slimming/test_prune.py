"""A finished network made smaller in one go: the size, the importances, the statistics, errors."""

import copy

import pytest
import torch
from torch import nn

from lightning_wgsef import group_parameters, prune
from lightning_wgsef.groups.norm_statistics import estimate_statistics
from lightning_wgsef.network.flops import layer_flops
from tests.helpers.groups import mlp, raises_naming
from tests.helpers.networks.slim import Residual

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 2


def batches(size=8):
    return list(zip(IMAGES.split(size), LABELS.split(size), strict=True))


def residual():
    torch.manual_seed(0)
    return Residual().eval()


def flops(network):
    return layer_flops(network, IMAGES[:1])[1]


@pytest.mark.parametrize("k", [0.7, 0.4, 0.15])
@pytest.mark.parametrize("weights", ["taylor", "fisher", "layer_norm"])
def test_a_network_of_the_size_that_was_named(k, weights):
    network = residual()
    before = copy.deepcopy(network.state_dict())
    small = prune(network, batches(), k, weights=weights)
    group = flops(network) * (1 / 6 + 1 / 8)
    assert k * flops(network) - group < flops(small) <= k * flops(network)
    assert small(IMAGES).shape == (24, 2)
    assert all(torch.equal(before[name], x) for name, x in network.state_dict().items())
    assert all(parameter.grad is None for parameter in (*network.parameters(), *small.parameters()))


def test_other_sizes_groupings_and_limits():
    network = residual()
    small = prune(network, batches(), "600 params")
    assert sum(p.numel() for p in small.parameters()) <= 600
    small = prune(network, batches(), 0.5, multiple_of=2, at_least={"stem": 4})
    assert small.stem.out_channels in (4, 6)
    assert small.block.inner.out_channels % 2 == 0
    small = prune(network, batches(), {"stem": 3, "*": 0.5}, grouping="structure")
    assert (small.stem.out_channels, small.block.inner.out_channels) == (3, 4)
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True), nn.Flatten(1))
    pairs = [(torch.randn(4, 5, 8), torch.tensor([0, 1, 2, 3]))]
    kinds = {"*attn": "head", "*linear1": "hidden"}
    small = prune(encoder, pairs, 0.7, grouping=kinds)
    dense = layer_flops(encoder, pairs[0][0])[1]
    assert 0.5 * dense < layer_flops(small, pairs[0][0])[1] <= 0.7 * dense


def test_what_the_loss_does_not_feel_goes_first():
    """Units that the data never uses are taken out, however large they are; outputs stay."""
    torch.manual_seed(0)
    network = mlp(4, 12, 3)
    with torch.no_grad():
        network[0].weight[4:] = -torch.rand(8, 4) * 10
        network[0].bias[4:] = -1.0
        network[2].weight[:, 4:] *= 100
    inputs = torch.rand(32, 4)  # of positive numbers these units make nothing
    small = prune(network, [(inputs, torch.arange(32) % 3)], 0.35)
    assert small[0].out_features == 4
    torch.testing.assert_close(small(inputs), network(inputs))


def test_a_loss_of_ones_own():
    network = mlp(4, 8, 2)
    pairs = [(torch.randn(6, 4), torch.randn(6, 2))]
    small = prune(network, pairs, 0.5, loss=nn.functional.mse_loss)
    assert small[0].out_features == 4
    with raises_naming("loss must return a tensor of one number", "(6, 2)"):
        prune(network, pairs, 0.5, loss=lambda outputs, targets: (outputs - targets).square())


def test_statistics_are_means_over_batches():
    network = residual()
    momentum = network.norm.momentum
    estimate_statistics(network, IMAGES.split(8))
    made = [network.stem(part) for part in IMAGES.split(8)]
    mean = torch.stack([x.mean((0, 2, 3)) for x in made]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in made]).mean(0)
    torch.testing.assert_close(network.norm.running_mean, mean)
    torch.testing.assert_close(network.norm.running_var, variance)
    assert network.norm.momentum == momentum
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (IMAGES, ["batches must be pairs of inputs and targets", "DataLoader", "got Tensor"]),
        ([], ["at least one pair", "got none"]),
        ([IMAGES], ["batches[0] must be a pair of inputs and targets (labels)", "got Tensor"]),
        ([(IMAGES,)], ["batches[0] must be a pair", "tuple of 1"]),
        ([(IMAGES, LABELS[:3])], ["cross entropy (loss=None)", "(24, 2)", "shape (3,)", "labels"]),
        ([(IMAGES, None)], ["cross entropy (loss=None)", "None", "loss(outputs, targets)"]),
        ([(IMAGES[:0], LABELS[:0])], ["batches[0] must hold at least one sample", "(0, 3, 8, 8)"]),
        ([batches()[0], ([IMAGES[:0]], LABELS[:0])], ["batches[1] must hold at least one sample"]),
        ([batches()[0], (IMAGES, LABELS + 2)], ["cross entropy", "batches[1]", "(24,)"]),
        ([(IMAGES * torch.nan, LABELS)], ["loss must be finite", "nan on batches[0]"]),
        ([batches()[0], (IMAGES * torch.nan, LABELS)], ["loss must be finite", "on batches[1]"]),
        (
            [batches()[0], (IMAGES[:, :1], LABELS)],
            ["the inputs of batches[1] must be what Residual takes", "(24, 1, 8, 8)"],
        ),
    ],
)
def test_batches_that_do_not_fit(given, words):
    with raises_naming(*words):
        prune(residual(), given, 0.5)


def test_a_loss_without_gradients():
    """Of which norms need none."""
    network, pairs = mlp(4, 8, 2), [(torch.rand(6, 4), torch.arange(6) % 2)]
    losses = [
        lambda outputs, targets: (outputs.argmax(1) != targets).float().mean(),
        lambda outputs, targets: torch.ones((), requires_grad=True) * outputs.detach().sum(),
    ]
    for loss in losses:
        with raises_naming("weights='fisher'", "loss of batches[0]", "weights='layer_norm'"):
            prune(network, pairs, loss=loss, weights="fisher")
    assert prune(network, pairs, loss=losses[0], weights="layer_norm")[0].out_features == 4


def test_low_precision_is_refused_before_anything_is_measured():
    def never():
        raise AssertionError
        yield

    with raises_naming("model must be float32 or float64", "torch.float16", "model.float()"):
        prune(residual().half(), never(), 0.5)


def test_a_last_batch_of_one_sample():
    """It has no variance; a norm of images that were averaged cannot take it."""
    network = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 2)).eval()
    inputs, labels = torch.rand(9, 6), torch.arange(9) % 2
    pairs = list(zip(inputs.split(4), labels.split(4), strict=True))
    assert prune(network, pairs, 0.5)[0].out_features == 4
    with raises_naming("batches must hold", "more than one sample", "BatchNorm"):
        prune(network, pairs[-1:], 0.5)


def test_multiples_by_a_name_that_only_groups_have():
    """Residual blocks compete as "branches", which is no layer that slim could know."""
    network = residual()
    kinds = {"branches": "layer"}
    layers = group_parameters(network, kinds, example_input=IMAGES, include="branches").layers
    assert [layer.name for layer in layers] == ["branches"]
    small = prune(network, batches(), {"branches": 1}, grouping=kinds, multiple_of={"branches": 2})
    assert small(IMAGES).shape == (24, 2)


class Shortcut(nn.Module):
    """With a shortcut wherever widths happen to agree, as some networks are written."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.last = nn.Linear(4, 6), nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = torch.relu(self.body(x))
        return self.last(x + y if x.shape == y.shape else y)


@pytest.mark.parametrize("k", ["60 params", "100 FLOPs", "220 B"])
def test_groups_that_have_to_stay_are_told(k):
    """The network does something else with four of each: slim keeps some, and it is too large."""
    pairs = [(torch.rand(8, 4), torch.arange(8) % 2)]
    with pytest.warns(UserWarning, match="more than the .* asked for: zero groups had to stay"):
        prune(Shortcut(), pairs, k, scope="global", at_least=4, at_most=4)


def test_a_size_that_cannot_be():
    with raises_naming("k = 0.001", "must lie between", "one group of every layer"):
        prune(residual(), batches(), 0.001)
