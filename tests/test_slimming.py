"""A slim network: smaller as expected by hand, the same outputs, and nothing else changed."""

import copy

import pytest
import torch
from helpers import raises_naming, without
from torch import nn
from torch.nn.functional import relu

from lightning_wgsef import group_parameters
from lightning_wgsef.groupings.removal_plan import RemovalPlan
from lightning_wgsef.slim_modules import Skip, SlimAttention
from lightning_wgsef.slimming import slim

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VECTOR = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def drawn(network, seed=0):
    """With random biases, norms and statistics: fresh ones are zero and one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() == 1:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise.abs() + 0.1 if name.endswith("running_var") else noise)
    return network


def pruned(network, grouping, *dead, example=None):
    """With groups of these numbers set to zero."""
    without(group_parameters(network, grouping, example_input=example), list(dead))
    return network


def outputs(network, example, training=False):
    twin = copy.deepcopy(network).train(training)
    with torch.no_grad():
        return twin(example)


def check(network, example, small):
    """The slim network is the other's equal, in both modes."""
    for training in (False, True):
        one, two = outputs(network, example, training), outputs(small, example, training)
        assert torch.allclose(one, two, atol=1e-5, rtol=1e-5)
    assert small.slimming.difference[0] <= 1e-5


def shapes(network):
    return {name: tuple(p.shape) for name, p in network.named_parameters() if p.dim() > 1}


def convolutions(*between, last=None):
    return drawn(
        nn.Sequential(nn.Conv2d(3, 8, 3), *between, last or nn.Conv2d(8, 4, 1), nn.Flatten())
    )


@pytest.mark.parametrize("grouping", ["filter", "structure"])
def test_filters(grouping):
    network = convolutions(nn.BatchNorm2d(8), nn.ReLU())
    pruned(network, grouping, 0, 2, 7, example=IMAGE if grouping == "structure" else None)
    small = slim(network, IMAGE)
    assert shapes(small) == {"0.weight": (5, 3, 3, 3), "3.weight": (4, 5, 1, 1)}
    assert torch.equal(small[0].weight, network[0].weight[[1, 3, 4, 5, 6]])
    assert small.slimming.kept == {}
    check(network, IMAGE, small)


def test_channels_that_nobody_reads_take_their_producer_along():
    network = convolutions(nn.BatchNorm2d(8), nn.Sigmoid())
    pruned(network, "channel", 1, 6)
    small = slim(network, IMAGE)
    assert shapes(small) == {"0.weight": (6, 3, 3, 3), "3.weight": (4, 6, 1, 1)}
    check(network, IMAGE, small)


def test_one_round_makes_room_for_the_next():
    """The second layer reads nothing but a filter of the first that goes."""
    network = drawn(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU()))
    network.append(nn.Linear(4, 2))
    with torch.no_grad():
        network[2].weight[:3, 0] = 0  # only the last row reads unit 0,
        network[4].weight[:, 3] = 0  # and nobody reads the last row
    small = slim(network, VECTOR)
    assert shapes(small) == {"0.weight": (4, 6), "2.weight": (3, 4), "4.weight": (2, 3)}
    assert len(small.slimming.plans) >= 1
    check(network, VECTOR, small)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.block = Block()
        self.other = Block()
        self.last = nn.Linear(6, 2)

    def forward(self, images):
        x = relu(self.norm(self.stem(images)))
        return self.last(self.other(self.block(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm1 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.outer, self.norm2 = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        return relu(x + self.norm2(self.outer(relu(self.norm1(self.inner(x))))))


def test_residual_sums_go_as_a_whole():
    network = drawn(Residual())
    pruned(network, "structure", 0, 3, 6 + 2, 6 + 8 + 7, example=IMAGE)
    small = slim(network, IMAGE)
    assert shapes(small) == {
        "stem.weight": (4, 3, 3, 3),
        "block.inner.weight": (7, 4, 3, 3),
        "block.outer.weight": (4, 7, 1, 1),
        "other.inner.weight": (7, 4, 3, 3),
        "other.outer.weight": (4, 7, 1, 1),
        "last.weight": (2, 4),
    }
    check(network, IMAGE, small)


def test_filters_of_one_part_of_a_sum_stay():
    network = pruned(drawn(Residual()), "filter", 0, 1)  # of the stem
    small = slim(network, IMAGE)
    assert shapes(small) == shapes(network)
    check(network, IMAGE, small)


def test_whole_blocks():
    network = drawn(Residual())
    pruned(network, "layer", 0, example=IMAGE)
    small = slim(network, IMAGE)
    assert isinstance(small.block, Skip)
    assert isinstance(small.other, Block)
    check(network, IMAGE, small)


def transformer():
    layer = nn.TransformerEncoderLayer(12, 4, 16, dropout=0.1, batch_first=True)
    return drawn(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


SEQUENCE = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


def test_heads_and_hidden_units():
    network = transformer()
    pruned(network, {"*self_attn": "head", "*linear1": "hidden"}, 1, 4, 5, 8 + 2, 8 + 16)
    small = slim(network, SEQUENCE)
    first, second = small.layers
    assert isinstance(first.self_attn, SlimAttention)
    assert (first.self_attn.num_heads, second.self_attn.num_heads) == (3, 2)
    assert (first.linear1.out_features, second.linear1.out_features) == (15, 15)
    assert small.slimming.difference[1] is None or small.slimming.difference[1] < 1e-5
    one, two = outputs(network, SEQUENCE), outputs(small, SEQUENCE)
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_mode_hooks_flags_and_model_survive(training):
    network = convolutions(nn.BatchNorm2d(8), nn.ReLU()).train(training)
    network[1].eval()
    network[0].bias.requires_grad_(False)
    pruned(network, "filter", 1)
    calls = []
    network[2].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(network.state_dict())
    small = slim(network, IMAGE)
    modes = [module.training for module in small.modules()]
    assert modes == [training, training, False, training, training, training]
    assert [m.training for m in network.modules()] == modes
    assert not small[0].bias.requires_grad
    assert small[0].weight.requires_grad
    calls.clear()
    small(IMAGE)
    assert calls == [1]
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert shapes(network)["0.weight"] == (8, 3, 3, 3)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.inner = nn.Embedding(9, 6), nn.Linear(6, 8)
            self.outer, self.head = nn.Linear(8, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.words.weight

        def forward(self, tokens):
            x = self.words(tokens)
            return self.head(x + self.outer(relu(self.inner(x))))

    network = Tied()
    pruned(network, "filter", 1, 2)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    small = slim(network, tokens)
    assert small.head.weight is small.words.weight
    assert small.inner.weight.shape == (6, 6)
    check(network, tokens, small)


# --- constants --------------------------------------------------------------------------------


def silent(network, *filters):
    """Zero the weights of some filters of the first layer, and nothing else."""
    with torch.no_grad():
        network[0].weight[list(filters)] = 0
    return network


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("function", [nn.Sigmoid(), nn.ReLU(), nn.Softplus()])
def test_constants_are_folded_into_dense_layers(function, bias):
    layers = nn.Linear(6, 5), function, nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3)
    network = silent(drawn(nn.Sequential(*layers)), 0, 3)
    small = slim(network, VECTOR)
    assert (small[0].out_features, small[2].in_features) == (3, 3)
    assert small[2].bias is not None
    assert (network[2].bias is not None) == bias
    check(network, VECTOR, small)


def test_constants_are_folded_into_convolutions_without_border():
    network = silent(convolutions(nn.Sigmoid(), last=nn.Conv2d(8, 4, 3)), 2)
    small = slim(network, IMAGE)
    assert small[0].out_channels == 7
    check(network, IMAGE, small)


def test_constants_that_meet_a_border_stay_and_are_reported():
    network = silent(convolutions(nn.Sigmoid(), last=nn.Conv2d(8, 4, 3, padding=1)), 2)
    small = slim(network, IMAGE)
    assert small[0].out_channels == 8
    assert small.slimming.kept == {
        "0": "a constant that is not zero meets the zeros of its padding in '2'"
    }
    check(network, IMAGE, small)
    circular = nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")
    assert slim(silent(convolutions(nn.Sigmoid(), last=circular), 2), IMAGE)[0].out_channels == 7


def test_shifts_of_a_norm_that_depend_on_the_mode_stay():
    """In training, a norm takes the constant off; in evaluation, its running mean."""
    network = silent(convolutions(nn.BatchNorm2d(8), nn.ReLU()), 2)
    small = slim(network, IMAGE)
    assert small[0].out_channels == 8
    assert "not constant" in small.slimming.kept["0"]
    check(network, IMAGE, small)
    with torch.no_grad():
        network[1].weight[2] = 0  # now its shift is all that is left
        network[1].bias[2] = 0.7
    small = slim(network, IMAGE)
    assert small[0].out_channels == 7
    check(network, IMAGE, small)


def test_a_norm_over_the_channels_keeps_them():
    layers = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)
    network = pruned(drawn(nn.Sequential(*layers)), "filter", 1)
    with torch.no_grad():
        network[1].weight[1] = network[1].bias[1] = 0
    small = slim(network, VECTOR)
    assert small[0].out_features == 5
    assert "differ" in small.slimming.kept["0"]


def test_a_layer_keeps_one_channel():
    network = convolutions(nn.ReLU())
    pruned(network, "filter", *range(8))
    small = slim(network, IMAGE)
    assert small[0].out_channels == 1
    check(network, IMAGE, small)


def test_nothing_to_take_out():
    network = convolutions(nn.ReLU())
    small = slim(network, IMAGE)
    assert small.slimming.plans == []
    assert small.slimming.parameters[0] == small.slimming.parameters[1]
    assert "100.0%" in str(small.slimming)


# --- in place, masks, mistakes ------------------------------------------------------------------


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
    monkeypatch.setattr("lightning_wgsef.slimming.difference", lambda *_: "")
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
    assert small.slimming.difference[1] is None
    assert "in training" not in str(small.slimming)
