"""The size that was named is the size that comes out of slim, after training."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_wgsef import WGSEF, CubicRamp, Homotopy, WGSEFCallback, group_parameters, slim
from lightning_wgsef.network.flops import layer_flops
from tests.helpers.networks.scope import IMAGES, Pictures, loader
from tests.helpers.networks.slim import Residual
from tests.helpers.trainers import make_trainer


def counted(network, example):
    values = {id(x): x for x in [*network.parameters(), *network.buffers()]}.values()
    return {
        "FLOPs": layer_flops(network, example)[1] / len(example),
        "parameters": sum(p.numel() for p in network.parameters()),
        "bytes": sum(x.numel() * x.element_size() for x in values),
    }


def trained(network, example, steps=30, **arguments):
    """Pruned in a plain loop on random numbers, with Adam, which moves dead groups, too."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    more = {"scope": "global", "example_input": example, "lam": Homotopy(length=20), **arguments}
    regularizer = WGSEF(network, **more).attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        batch = torch.randn(4, *example.shape[1:], generator=generator)
        network(batch).square().mean().backward()
        optimizer.step()
    assert regularizer.frozen
    return regularizer


def check(regularizer, network, example):
    """At most what was named; and no more below it than one group costs."""
    groups = regularizer.groups
    small = slim(network, example)
    left = counted(small, example)[groups.size.unit]
    alive = torch.cat(list(regularizer.masks.values()))
    assert left == float(groups.size.of(alive))
    dearest = max(float(layer.costs.max()) for layer in groups.layers)
    assert groups.limit - dearest < left <= groups.limit * (1 + 1e-9)
    assert all(mask.any() for mask in regularizer.masks.values())
    return left


def encoder():
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 2))


UNITS = {"*attn": "head", "*linear1": "hidden"}
CASES = {
    "residual": (Residual, torch.randn(1, 3, 6, 6), "structure"),
    "units": (encoder, torch.randn(1, 5, 3), UNITS),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("costs", ["flops", "params"])
@pytest.mark.parametrize("k", [0.7, 0.4])
def test_shares(name, costs, k):
    torch.manual_seed(0)
    make, example, grouping = CASES[name]
    network = make()
    dense = counted(network, example)
    regularizer = trained(network, example, k=k, costs=costs, grouping=grouping)
    groups = regularizer.groups
    assert groups.limit == pytest.approx(k * dense[groups.size.unit])
    check(regularizer, network, example)


@pytest.mark.parametrize("k", ["30 kFLOPs", "1.2 kparams", "5 kB"])
def test_sizes(k):
    torch.manual_seed(0)
    network, example = Residual(), torch.randn(1, 3, 6, 6)
    left = check(trained(network, example, k=k, grouping="structure"), network, example)
    torch.manual_seed(0)
    network = Residual()
    regularizer = trained(network, example, k=k, grouping="structure", scope="layer")
    groups = regularizer.groups
    alike = float(groups.size.of(torch.cat(list(regularizer.masks.values()))))
    assert max(alike, left) <= groups.limit
    assert counted(slim(network, example), example)[groups.size.unit] == alike


def test_the_budget_falls_in_size():
    """As in gradual pruning: K + (C - K) (1 - t)^3 of what slim would make, step by step."""
    torch.manual_seed(0)
    network, example = Residual(), torch.randn(1, 3, 6, 6)
    dense = counted(network, example)["FLOPs"]
    ramp = CubicRamp(0.4, length=10)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    arguments = {"scope": "global", "costs": "flops", "example_input": example}
    regularizer = WGSEF(network, ramp, Homotopy(start=1, length=12), "structure", **arguments)
    regularizer.attach(optimizer)
    dearest = max(float(layer.costs.max()) for layer in regularizer.groups.layers)
    for number in range(1, 13):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        left = counted(slim(network, example), example)["FLOPs"]
        limit = dense * (0.4 + 0.6 * max(0.0, 1 - number / 10) ** 3)
        assert limit - dearest < left <= limit * (1 + 1e-9)
    assert regularizer.frozen


def test_what_is_too_dear_shrinks_beside_what_is_stronger():
    """Not beside the weakest that fits into the room that it leaves, which it never would."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(60, 6), nn.ReLU(), nn.Linear(6, 20), nn.Linear(20, 1))
    k = "700 FLOPs"  # of n and m units: 2 (60 n + n m + m)
    more = {"scope": "global", "example_input": torch.ones(1, 60), "grouping": "structure"}
    groups = group_parameters(network, k=k, **more)
    strengths = torch.tensor([10.0] * 5 + [1.0] + [1e-3] * 20)
    norms = groups.norms()
    weights = (strengths / norms).square() * groups.costs
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    lam = Homotopy(start=0.3, length=4)
    WGSEF(network, CubicRamp(k, length=1), lam, weights=weights, **more).attach(optimizer)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = groups.norms()
    assert (after[:6] > 0).tolist() == [True] * 5 + [False]
    assert int((after[6:] > 0).sum()) == 8
    torch.testing.assert_close(after[after > 0], norms[after > 0])


def test_the_callback_says_it_back(capsys):
    pl.seed_everything(0, verbose=False)
    model = Pictures()
    dense = counted(model, IMAGES)["FLOPs"]
    callback = WGSEFCallback(k="100 kFLOPs", scope="global", lam=Homotopy(length=0.5))
    make_trainer([callback], enable_model_summary=True, max_epochs=2).fit(model, loader(10))
    left = counted(slim(model, IMAGES), IMAGES)["FLOPs"]
    text = capsys.readouterr().out
    share = 1e5 / dense
    assert f"at most 100,000 of {dense:,.0f} FLOPs ({share:.1%})" in text
    assert f"the slim network has {left:,.0f} FLOPs, {left / dense:.1%} of" in text
    assert f"(asked for: at most 100,000, {share:.1%})" in text
