"""`slim` in place, with masks and an optimizer, and on what it must refuse."""

import pytest
import torch
from torch import nn

from lightning_wgsef import group_parameters
from lightning_wgsef.network.slim_modules import Skip
from lightning_wgsef.network.surgery import RemovalPlan
from lightning_wgsef.slimming.slim import slim
from tests.helpers.groups import raises_naming, without
from tests.helpers.networks.slim import (
    IMAGE,
    VECTOR,
    Residual,
    check,
    convolutions,
    drawn,
    outputs,
    pruned,
    shapes,
    silent,
)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
def test_training_goes_on_in_place(make):
    """As if the network had been slim all the time."""
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    # In float64, for the gradient of a bias in front of a norm is rounding, which Adam divides.
    network = pruned(convolutions(nn.BatchNorm2d(8), nn.ReLU()).double(), "filter", 0, 5)
    image = IMAGE.double()
    slimmed = slim(network, image)
    optimizer = make(slimmed.parameters(), lr=0.01, **options)
    masked_optimizer = make(network.parameters(), lr=0.01, **options)
    groups = group_parameters(network, "filter")

    def step(model, own):
        own.zero_grad()
        model(image).square().mean().backward()
        own.step()

    for _ in range(3):
        step(slimmed, optimizer)
        step(network, masked_optimizer)
        without(groups, [0, 5])
    own = list(network.parameters())
    assert slim(network, image, inplace=True, optimizer=masked_optimizer) is network
    assert all(one is other for one, other in zip(network.parameters(), own, strict=True))
    for _ in range(3):
        step(slimmed, optimizer)
        step(network, masked_optimizer)
    for one, other in zip(slimmed.parameters(), network.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_blocks_and_biases_in_place():
    network = drawn(Residual())
    pruned(network, "layer", 1, example=IMAGE)
    optimizer = torch.optim.Adam(network.parameters())
    network(IMAGE).sum().backward()
    optimizer.step()
    pruned(network, "layer", 1, example=IMAGE)
    slim(network, IMAGE, inplace=True, optimizer=optimizer)
    assert isinstance(network.other, Skip)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in network.parameters()} == {id(p) for p in optimizer.state}

    layers = nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4, bias=False)
    network = silent(drawn(nn.Sequential(*layers, nn.Flatten())), 0)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    expected = outputs(network, VECTOR)
    slim(network, VECTOR, inplace=True, optimizer=optimizer)
    assert any(p is network[2].bias for group in optimizer.param_groups for p in group["params"])
    assert torch.allclose(outputs(network, VECTOR), expected, atol=1e-6)


def test_masks_are_applied_first():
    network = convolutions(nn.ReLU())
    mask = torch.ones_like(network[2].weight)
    mask[:, 3] = 0
    small = slim(network, IMAGE, {"2.weight": mask})
    assert small[2].in_channels == 7
    assert bool(network[2].weight.all())


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"conv.weight": torch.ones(1)}, ["masks", "'conv.weight'", "0.weight", "2.bias"]),
        ({"0.weight": torch.ones(2, 3)}, ["masks", "'0.weight'", "(8, 3, 3, 3)", "(2, 3)"]),
    ],
)
def test_masks_of_another_model(masks, words):
    with raises_naming(*words):
        slim(convolutions(nn.ReLU()), IMAGE, masks)


def test_an_example_that_does_not_fit():
    with raises_naming("example_input", "Sequential", "(2, 4, 8, 8)"):
        slim(convolutions(nn.ReLU()), torch.ones(2, 4, 8, 8))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_low_precision_proves_nothing(kind):
    with raises_naming("model", "'0.weight'", str(kind), "float()"):
        slim(convolutions(nn.ReLU()).to(kind), IMAGE.to(kind))


def test_an_optimizer_needs_the_model_itself():
    network = convolutions(nn.ReLU())
    with raises_naming("optimizer", "inplace=True"):
        slim(network, IMAGE, optimizer=torch.optim.SGD(network.parameters(), 0.1))


def test_an_optimizer_whose_state_cannot_be_cut():
    network = pruned(convolutions(nn.ReLU()), "filter", 0)
    optimizer = torch.optim.Adafactor(network.parameters())
    network(IMAGE).sum().backward()
    optimizer.step()
    pruned(network, "filter", 0)
    before = shapes(network)
    with raises_naming("optimizer", "Adafactor", "0.weight"):
        slim(network, IMAGE, inplace=True, optimizer=optimizer)
    assert shapes(network) == before


def test_a_wrong_plan_is_refused(monkeypatch):
    """As if the wrong channels were cut, and the trial had not seen it."""
    right = RemovalPlan.remove

    def shifted(self, name, module, tensor, axis, positions):
        moved = [(place + 1) % 8 for place in positions] if name == "2" else positions
        right(self, name, module, tensor, axis, moved)

    network = pruned(convolutions(nn.Tanh()), "filter", 1)  # a ReLU may hide the next channel
    monkeypatch.setattr(RemovalPlan, "remove", shifted)
    small = slim(network, IMAGE)  # the trial sees it, and leaves the filter
    assert small[0].out_channels == 8
    assert "differ" in small.slimming.kept["0"]
    monkeypatch.setattr("lightning_wgsef.slimming.slim.difference", lambda *_: "")
    with raises_naming(
        "without its zero groups", "evaluation", "first layer", "Nothing was changed"
    ):
        slim(network, IMAGE)
    with raises_naming("without its zero groups"):
        slim(network, IMAGE, inplace=True)
    assert shapes(network)["0.weight"] == (8, 3, 3, 3)


class Untraceable(nn.Sequential):
    """Its convolutions run outside of what autograd can follow."""

    def forward(self, inputs):
        return super().forward(inputs).detach()


def test_a_network_that_cannot_be_followed():
    network = pruned(Untraceable(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), "hidden", 1, 2)
    small = slim(network, VECTOR)
    assert small[0].out_features == 6  # hidden units need no graph
    network = pruned(Untraceable(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), "filter", 1, 2)
    small = slim(network, IMAGE)
    assert "gradient" in small.slimming.kept["channels"]
    assert small[0].out_channels == 8


def test_compiled_networks():
    network = pruned(convolutions(nn.ReLU()), "filter", 1, 2)
    small = slim(torch.compile(network, backend="eager"), IMAGE)
    assert small[0].out_channels == 6
    check(network, IMAGE, small)


def test_dropout_does_not_hide_the_training_mode():
    network = pruned(convolutions(nn.ReLU(), nn.Dropout(0.5)), "filter", 1, 2)
    assert slim(network, IMAGE).slimming.difference[1] <= 1e-5


class Noisy(nn.Sequential):
    def forward(self, inputs):
        noise = torch.randn_like(inputs) if self.training else 0
        return super().forward(inputs + noise)


def test_a_network_that_is_random_in_training():
    network = pruned(Noisy(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), "filter", 1, 2)
    small = slim(network, VECTOR)
    assert small[0].out_features == 6
    assert small.slimming.difference[1] <= 1e-5, "the same random numbers on both sides"


class Answer:
    def __init__(self, logits):
        self.logits = logits


class Answering(nn.Sequential):
    def forward(self, inputs):
        return Answer(super().forward(inputs))


def test_outputs_that_cannot_be_compared():
    with raises_naming("model", "tensors", "Answering returns Answer"):
        slim(Answering(nn.Linear(6, 4)), VECTOR)
