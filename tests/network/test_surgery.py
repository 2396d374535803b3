"""Taking channels out: which slices go, what stays as it was, and that the outputs agree."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from lightning_wgsef.network.dependency_graph import build_graph
from lightning_wgsef.network.surgery import RemovalPlan, channel_removal

IMAGE = torch.ones(1, 3, 8, 8)


def removed(model, example, first, bundles):
    """The model without bundles of channels of its layer ``first``, in place."""
    graph = build_graph(model, example)
    module = graph.model.get_submodule(first)
    width = getattr(module, "out_channels", 0) or module.out_features
    plan = channel_removal(graph, [(graph.tied(module, range(width)), bundles)])
    plan.apply(model)
    return plan


def chain(*between, outputs=2):
    return nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.Conv2d(8, outputs, 1))


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("between", "changed"),
    [
        ([], {}),
        ([nn.BatchNorm2d(8)], {"num_features": 5}),
        ([nn.InstanceNorm2d(8, affine=True, track_running_stats=True)], {"num_features": 5}),
        ([nn.InstanceNorm2d(8)], {"num_features": 5}),
        ([nn.PReLU(8)], {"num_parameters": 5}),
        ([nn.PReLU()], {"num_parameters": 1}),
        (
            [nn.Conv2d(8, 8, 3, groups=8)],
            {"groups": 5, "in_channels": 5, "out_channels": 5},
        ),
    ],
)
def test_what_lies_between(between, changed):
    model = chain(*between)
    plan = removed(model, IMAGE, "0", {0, 1, 6})
    assert shapes(model)["0.weight"] == (5, 3, 3, 3)
    assert shapes(model)[f"{len(model) - 1}.weight"] == (2, 5, 1, 1)
    assert plan.kept["0.weight"] == {0: [2, 3, 4, 5, 7]}
    assert (model[0].out_channels, model[-1].in_channels) == (5, 5)
    for name, value in changed.items():
        assert getattr(model[1], name) == value
    assert model.eval()(IMAGE).shape[1] == 2


def test_slices_are_the_right_ones():
    model = chain(nn.BatchNorm2d(8))
    model[1].running_mean.copy_(torch.arange(8.0))
    before = copy.deepcopy(model)
    removed(model, IMAGE, "0", {1, 7})
    kept = [0, 2, 3, 4, 5, 6]
    assert torch.equal(model[0].weight, before[0].weight[kept])
    assert torch.equal(model[0].bias, before[0].bias[kept])
    assert model[1].running_mean.tolist() == kept
    assert torch.equal(model[2].weight, before[2].weight[:, kept])
    assert torch.equal(model[2].bias, before[2].bias)


def test_flatten_and_transposed_convolution():
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 1), nn.Flatten()
    )
    removed(model, IMAGE, "0", {0})
    assert shapes(model)["0.weight"] == (3, 3, 3, 3)
    assert shapes(model)["2.weight"] == (3, 2, 1, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    weight = model[2].weight.detach().clone().view(2, 4, 36)
    removed(model, IMAGE, "0", {0, 2})
    assert torch.equal(model[2].weight, weight[:, [1, 3]].reshape(2, 72))
    assert model[2].in_features == 72


def test_parts_of_a_grouped_convolution_are_cut_alike():
    model = chain(nn.Conv2d(8, 8, 1, groups=2))
    before = copy.deepcopy(model)
    removed(model, IMAGE, "0", {1})  # channels 1 and 5
    kept = [0, 2, 3, 4, 6, 7]
    assert torch.equal(model[0].weight, before[0].weight[kept])
    assert torch.equal(model[1].weight, before[1].weight[:, [0, 2, 3]])
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (2, 6, 8)


class Joined(nn.Module):
    """A concatenation: channels of the second layer lie behind those of the first."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(10, 2, 1)

    def forward(self, images):
        return self.last(torch.cat([relu(self.one(images)), relu(self.two(images))], 1))


def test_two_sets_that_meet_in_one_layer_are_cut_at_once():
    model = Joined()
    before = copy.deepcopy(model)
    graph = build_graph(model, IMAGE)
    one = graph.tied(graph.model.one, range(4)), {0}
    two = graph.tied(graph.model.two, range(6)), {0, 5}
    channel_removal(graph, [one, two]).apply(model)
    kept = [1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(model.last.weight, before.last.weight[:, kept])
    assert (model.one.out_channels, model.two.out_channels) == (3, 4)


class Stream(nn.Module):
    """An embedding, a parameter of its own, and a norm of torch's without a module type here."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.place = nn.Parameter(torch.randn(1, 5, 6))
        self.norm, self.layer, self.last = nn.RMSNorm(6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.last(self.layer(self.norm(self.words(tokens) + self.place)))


def test_embeddings_parameters_and_norms_over_the_width():
    model, tokens = Stream(), torch.tensor([[1, 2, 3, 4, 5]])
    graph = build_graph(model, tokens)
    tied = graph.tied(graph.model.words, range(6))
    channel_removal(graph, [(tied, {0, 3})]).apply(model)
    assert shapes(model) == {
        "place": (1, 5, 4),
        "words.weight": (7, 4),
        "norm.weight": (4,),
        "layer.weight": (4,),
        "layer.bias": (4,),
        "last.weight": (3, 4),
        "last.bias": (3,),
    }
    assert (model.norm.normalized_shape, model.layer.normalized_shape) == ((4,), (4,))
    assert model(tokens).shape == (1, 5, 3)


def test_parameters_stay_themselves():
    model = chain(nn.BatchNorm2d(8))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    calls = []
    model[0].weight.register_hook(lambda gradient: calls.append(tuple(gradient.shape)))
    model(IMAGE).sum().backward()
    model.eval()
    own = list(model.parameters())
    removed(model, IMAGE, "0", {2})
    assert all(one is other for one, other in zip(model.parameters(), own, strict=True))
    assert [p.requires_grad for p in own] == [True, False, True, True, True, True]
    assert own[0].grad is None
    assert not model.training
    before = model[0].weight.detach().clone()
    model.train()(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert calls == [(8, 3, 3, 3), (7, 3, 3, 3)]


def test_tied_weights_are_cut_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.a(x) + self.b(x))

    model = Tied()
    removed(model, torch.ones(1, 3), "first", {0, 1})
    assert model.a.weight is model.b.weight
    assert model.a.weight.shape == (2, 2)
    assert model(torch.ones(1, 3)).shape == (1, 2)


def test_compiled_modules_are_found():
    model = chain(nn.ReLU())
    model[0] = torch.compile(model[0], backend="eager")
    plan = RemovalPlan()
    plan.remove("0", model[0]._orig_mod, "weight", 0, [0])
    plan.resize("0", model[0]._orig_mod, "out_channels", 1)
    plan.apply(model)
    assert model[0]._orig_mod.weight.shape[0] == model[0]._orig_mod.out_channels == 7


def test_nothing_to_remove():
    model = chain(nn.BatchNorm2d(8))
    before = copy.deepcopy(model)
    assert removed(model, IMAGE, "0", set()).kept == {}
    assert torch.equal(model.eval()(IMAGE), before.eval()(IMAGE))
