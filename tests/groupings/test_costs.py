"""What groups cost, against hand counts."""

import math

import pytest
import torch
from torch import nn
from torch.backends import mha

from lightning_wgsef import GroupedLayer, Groups, Member, group_parameters
from lightning_wgsef.groupings.budget import check_budget, parsed_size
from lightning_wgsef.groupings.costs import check_costs
from lightning_wgsef.network.flops import layer_flops
from lightning_wgsef.network.latency import pass_times
from tests.helpers.groups import conv_network, raises_naming

IMAGES = torch.ones(5, 2, 8, 8)


class Attention(nn.Module):
    """A projection, attention among 5 tokens of 8 numbers in 2 heads, and a head."""

    def __init__(self, *, fused):
        super().__init__()
        self.project, self.head = nn.Linear(8, 24), nn.Linear(8, 3)
        self.fused = fused

    def forward(self, tokens):
        parts = self.project(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        query, key, value = parts
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query @ key.mT / 2).softmax(-1) @ value
        return self.head(mixed.transpose(1, 2).flatten(2))


class Watching(nn.Linear):
    """Notes the modes that its forward runs in."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.seen = []

    def forward(self, inputs):
        self.seen.append((self.training, torch.is_grad_enabled(), mha.get_fastpath_enabled()))
        return super().forward(inputs)


class Failing(nn.Module):
    def forward(self, inputs):
        raise KeyError("an error of one's own")


def times(model, example):
    return pass_times([model], example)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def scales(model):
    """A grouping of one's own: the scales of a norm."""
    member = Member("norm1.weight", model.norm1.weight, (0,))
    return Groups([GroupedLayer("norm1", "scale", 6, (member,))])


# --- operations of layers ----------------------------------------------------------------------


# Layer, input, and the multiply-adds by hand.
COUNTED = {
    "Linear": (lambda: nn.Linear(3, 4), (7, 3), 7 * 3 * 4),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3), (7, 2, 10, 9), 7 * 8 * 7 * 2 * 4 * 9),
    "Conv2d, 2 parts": (
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        (7, 4, 5, 5),
        7 * 9 * 2 * (2 * 3) * 9,
    ),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (7, 4, 5, 5), 7 * 9 * 4 * 9),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(2, 4, 3, stride=2),
        (7, 2, 5, 5),
        7 * 25 * 2 * 4 * 9,
    ),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_operations_of_a_layer(kind):
    make, shape, multiply_adds = COUNTED[kind]
    model = nn.Sequential(make(), nn.ReLU())
    assert layer_flops(model, torch.ones(shape)) == ({"0": 2 * multiply_adds}, 2 * multiply_adds)


def test_a_model_that_is_a_layer():
    assert layer_flops(nn.Linear(3, 4), torch.ones(1, 3)) == ({"": 24}, 24)


def test_a_layer_called_twice_counts_twice():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(3, 4), shared, shared)
    assert layer_flops(model, torch.ones(1, 3)) == ({"0": 24, "1": 64}, 88)


def test_several_arguments():
    model = nn.Bilinear(3, 5, 2)
    model.left = nn.Linear(3, 4)
    model.forward = lambda left, right: model.left(left).sum() + right.sum()
    assert layer_flops(model, (torch.ones(2, 3), torch.ones(2, 5))) == ({"left": 48}, 48)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_counts_in_the_whole(fused):
    """Scores and mixture: 2 sentences, 2 heads, 5 x 5 pairs of tokens, 4 numbers."""
    flops, whole = layer_flops(Attention(fused=fused), torch.ones(2, 5, 8))
    assert flops == {"project": 2 * 10 * 8 * 24, "head": 2 * 10 * 8 * 3}
    assert whole == sum(flops.values()) + 2 * (2 * 2 * 2 * 25 * 4)


@pytest.mark.parametrize("weights", [True, False])
def test_torch_s_own_attention_counts_in_the_whole(weights):
    """In evaluation mode it has a fast path that is one operation which nobody counts."""
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    tokens = torch.ones(2, 5, 8)
    _, whole = layer_flops(model, (tokens, tokens, tokens, None, weights))
    assert whole == 2 * 10 * 8 * 24 + 2 * (2 * 2 * 2 * 25 * 4) + 2 * 10 * 8 * 8


def test_layers_of_a_transformer_are_called():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    measured = layer_flops(model, torch.ones(2, 5, 8))[0]
    assert measured == {"linear1": 2560, "linear2": 2560}
    assert pass_times([model], torch.ones(2, 5, 8))[0].modules.keys() > measured.keys()


# torch says that global hooks (its own counter's) fire twice for a compiled module.
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
@pytest.mark.parametrize("part", ["all", "inner"])
@pytest.mark.parametrize("used", [True, False])
def test_a_compiled_model(part, used):
    """Hooks set after the first run of a compiled model would not be called."""
    plain, model = conv_network(), conv_network()
    if part == "all":
        model = torch.compile(model, backend="eager")
    else:
        model.conv2 = torch.compile(model.conv2, backend="eager")
    if used:
        with torch.no_grad():
            model(IMAGES)
    assert layer_flops(model, IMAGES) == layer_flops(plain, IMAGES)
    assert pass_times([model], IMAGES)[0].modules.keys() >= {"conv1", "conv2", "fc"}


# --- what measuring leaves as it was -----------------------------------------------------------


@pytest.mark.parametrize("measure", [layer_flops, times])
@pytest.mark.parametrize("training", [True, False])
def test_modes_weights_and_buffers_stay(measure, training):
    model = conv_network().train(training)
    model.norm1.train(not training)  # as with a frozen norm
    model.fc.register_forward_hook(lambda *_: None)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    measure(model, IMAGES)
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes.pop("norm1") is not training
    assert set(modes.values()) == {training}
    assert all(torch.equal(after, state[name]) for name, after in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    assert mha.get_fastpath_enabled()
    assert hooks(model) == 1


@pytest.mark.parametrize("measure", [layer_flops, times])
def test_the_forward_pass_is_in_evaluation_mode(measure):
    model = nn.Sequential(nn.Linear(3, 4), Watching(4, 2)).train()
    measure(model, torch.ones(1, 3))
    assert {seen[:2] for seen in model[1].seen} == {(False, False)}
    assert (False, False, False) in model[1].seen  # with marks; a pass without is as it would be


@pytest.mark.parametrize("measure", [layer_flops, times])
@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [
        (torch.ones(5, 3, 8, 8), ["(5, 3, 8, 8)", "channels"]),
        ((torch.ones(5, 2, 8, 8), torch.ones(4)), ["((5, 2, 8, 8), (4,))"]),
        ((torch.ones(4), {"mask": 1}), ["((4,), 'dict')"]),
        ((), ["got ()"]),
        ({"x": torch.ones(4)}, ["got {'x': (4,)}"]),
    ],
)
def test_an_input_that_does_not_fit(measure, inputs, shapes):
    model = conv_network().train()
    model.norm1.eval()
    with raises_naming("example_input", "Sequential", *shapes):
        measure(model, inputs)
    assert model.training
    assert not model.norm1.training
    assert torch.is_grad_enabled()
    assert mha.get_fastpath_enabled()
    assert hooks(model) == 0


@pytest.mark.parametrize("measure", [layer_flops, times])
def test_the_first_error_is_kept(measure):
    with pytest.raises(ValueError, match="one's own") as caught:
        measure(nn.Sequential(nn.Linear(3, 4), Failing()), torch.ones(1, 3))
    assert isinstance(caught.value.__cause__, KeyError)


# --- costs of groups ---------------------------------------------------------------------------


def priced(model, costs, example, **arguments):
    """What the groups of every layer cost."""
    groups = group_parameters(model, costs=costs, example_input=example, **arguments)
    return {layer.name: layer.costs.tolist() for layer in groups.layers}, groups


def test_weights_by_hand():
    """A filter, its bias, its norm, and what reads it: 9 weights of each of 4 filters."""
    found, _ = priced(conv_network(), "params", IMAGES, grouping="filter", exclude="conv2")
    assert found == {"conv1": [18 + 1 + 2 + 36] * 6}


def test_operations_by_hand():
    """Of one sample: columns, and the filters that make what they read."""
    found, _ = priced(conv_network(), "flops", IMAGES, grouping="channel")
    made, read, last = 2 * 36 * 2 * 9, 2 * 16 * 4 * 9, 2 * 16 * 6 * 9
    assert found == {"conv2": [made + read] * 6, "fc": [last + 2 * 3] * 4}


def test_parts_of_a_grouped_convolution():
    """Its parts lose the same places: two groups, each a channel of both."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 3, groups=2))
    found, groups = priced(model, "flops", torch.ones(7, 4, 5, 5), grouping="structure")
    assert found == {"0": [2 * 2 * 25 * 4 + 2 * 9 * 6 * 9] * 2}
    assert groups.layers[0].count == 2


def test_attention_is_counted():
    """A head is its rows and columns, and its part of both products of attention."""
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    found, _ = priced(model, "flops", torch.ones(2, 5, 8), grouping="head")
    rows, columns, products = 2 * 5 * 12 * 8, 2 * 5 * 4 * 8, 2 * 2 * 25 * 4
    assert found == {"self_attn": [rows + columns + products] * 2}


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("costs", ["params", "flops", "latency"])
def test_an_example_is_needed(costs):
    with raises_naming(f"costs='{costs}' needs an example_input"):
        group_parameters(conv_network(), costs=costs)


def test_an_example_that_does_not_run():
    with raises_naming("example_input must be what", "(5, 3, 8, 8)"):
        group_parameters(conv_network(), costs="flops", example_input=torch.ones(5, 3, 8, 8))


@pytest.mark.parametrize("grouping", ["element", "filter_shape", "block:2x2"])
def test_groups_that_stay_in_place_have_no_size(grouping):
    with raises_naming("conv2", "stay in place", grouping):
        group_parameters(conv_network(), grouping, costs="params", example_input=IMAGES)


def test_a_layer_that_is_tied_is_left_out():
    """One of two layers that read the same channels cannot lose them alone."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(16, 6), nn.Linear(6, 2))
    _, groups = priced(model, "params", torch.ones(1, 2, 2, 2), scope="global", k=0.9)
    assert [layer.name for layer in groups.layers] == ["3"]
    assert "cannot be taken out, so that they do not count: groups 0 and 1" in groups.left_out["2"]


def test_a_layer_of_one_group_is_left_out():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 1, 12, batch_first=True))
    kinds = {"*attn": "head", "*linear1": "hidden"}
    _, groups = priced(model, "params", torch.ones(1, 3, 8), grouping=kinds)
    assert [layer.name for layer in groups.layers] == ["0.linear1"]
    assert groups.left_out["0.self_attn"] == "it has one group, which has to stay"


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "size"),
    [
        ("120 MFLOPs", (120e6, "flops")),
        ("1.5gflops", (1.5e9, "flops")),
        ("2e3 FLOP", (2e3, "flops")),
        ("4 MB", (4e6, "bytes")),
        ("4 MiB", (2**22, "bytes")),
        ("64KB", (64e3, "bytes")),
        ("5 ms", (5.0, "latency")),
        ("0.25s", (250.0, "latency")),
        ("800 \u00b5s", (0.8, "latency")),
        ("3 US", (0.003, "latency")),
        ("1 ks", None),
        ("512 bytes", (512, "bytes")),
        ("800 kparams", (8e5, "params")),
        ("1.2 M parameters", (1.2e6, "params")),
        ("1.2M params", (1.2e6, "params")),
        ("  .5  gflops ", (5e8, "flops")),
        ("49,110 FLOPs", (49110.0, "flops")),
        ("1,234.5 kB", (1234.5e3, "bytes")),
        ("49,11 FLOPs", None),
        ("5 m s", None),
        ("1e400 MB", None),
        ("120 MMACs", None),
        ("3 Mparameters", (3e6, "params")),
        ("5 miles", None),
        ("50% FLOPs", None),
        ("half", None),
        ("MB", None),
        ("0 MB", None),
        ("-4 MB", None),
        ("4", None),
        ("inf MB", None),
        ("", None),
    ],
)
def test_units(k, size):
    assert parsed_size(k) == size
    if size is None:
        with raises_naming("k must be", "'120 MFLOPs'", "FLOPs, params, B", "half of", repr(k)):
            check_budget(k)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("k", ["10 kFLOPs", "250 params", "1.3 kB"])
def test_a_size_is_that_of_the_whole_slim_network(scope, k):
    """Also where every layer has its own budget: then all keep the same share, to within one."""
    model = conv_network()
    groups = group_parameters(model, "structure", k, scope=scope, example_input=IMAGES)
    limit, _ = parsed_size(k)
    said = f"at most {limit:,.0f} of {float(groups.size.total):,.0f} {groups.size.unit}"
    assert said in str(groups)
    if scope == "layer":
        kept = [int(layer.budget) for layer in groups.layers]
        alive = [torch.arange(x.count) < n for x, n in zip(groups.layers, kept, strict=True)]
        assert float(groups.size.of(torch.cat(alive))) <= limit
        shares = [n / x.count for x, n in zip(groups.layers, kept, strict=True)]
        steps = [1 / x.count for x in groups.layers]
        assert max(shares) - min(shares) <= max(steps)
        more = [torch.arange(x.count) <= n for x, n in zip(groups.layers, kept, strict=True)]
        assert float(groups.size.of(torch.cat(more))) > limit


@pytest.mark.parametrize("costs", ["params", "latency", torch.ones(3)])
def test_a_size_in_other_units_than_the_costs(costs):
    with raises_naming("costs must be None or 'flops'", "'2 kFLOPs'"):
        group_parameters(conv_network(), k="2 kFLOPs", costs=costs, example_input=IMAGES)


def test_a_size_of_one_layer_is_none():
    with raises_naming("k['conv*'] must be a number of groups", "'2 kFLOPs'"):
        check_budget({"conv*": "2 kFLOPs"})


@pytest.mark.parametrize(
    "costs",
    [
        None,
        "params",
        "flops",
        "latency",
        torch.tensor([1.0, 0.5]),
        torch.tensor([1, 2]),
        {"fc": torch.tensor([1.0]), "conv": torch.tensor([2.0, 3.0])},
    ],
)
def test_costs_that_are_accepted(costs):
    check_costs(costs)


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        ("macs", ["'macs'", "'flops'", "'latency'", "'params'"]),
        (3, ["got 3"]),
        ([1.0, 2.0], ["[1.0, 2.0]"]),
        ({}, ["{}"]),
        ({1: torch.ones(2)}, ["layer names", "got {1: tensor"]),
        ({"fc": [1.0]}, ["costs['fc']", "[1.0]"]),
        ({"fc": torch.ones(2), "b": torch.ones(1, 2)}, ["costs['b']", "(1, 2)"]),
        (torch.tensor(1.0), ["costs", "()"]),
        (torch.ones(0), ["(0,)"]),
        (torch.tensor([1.0, 0.0]), ["0.0 at index 1"]),
        (torch.tensor([1, -2]), ["-2 at index 1"]),
        (torch.tensor([math.nan, 1.0]), ["nan at index 0"]),
        (torch.tensor([1.0, math.inf]), ["inf at index 1"]),
        (torch.tensor([True]), ["torch.bool"]),
        (torch.tensor([1j]), ["torch.complex64"]),
    ],
)
def test_costs_that_are_refused(costs, words):
    with raises_naming("costs", *words):
        check_costs(costs)
