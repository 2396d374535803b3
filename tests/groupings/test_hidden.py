"""What `hidden` promises: a zero unit is as if it were cut out, and blocks are what they seem."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_wgsef.groupings.hidden import hidden_groups
from tests.helpers.groups import members, mlp, names
from tests.helpers.networks.transformers import (
    HUGGING_FACE,
    GatedUnits,
    GroupedQueryAttention,
    apart,
    drawn,
    given,
    hugging_face,
    output_of,
    shifted,
    zeroed,
)


def is_transposed(layer):
    return not isinstance(layer, nn.Linear)


def keep(module, name, axis, kept):
    """Cut a parameter or buffer down to some of its slices."""
    tensor = getattr(module, name)
    if tensor is not None:
        smaller = tensor.detach().index_select(axis, kept)
        setattr(module, name, nn.Parameter(smaller) if name in module._parameters else smaller)


def cut(network, ups, down, number, norms=()):
    """A copy without one hidden unit: its weights are gone, not zero."""
    smaller = copy.deepcopy(network)
    down_layer = smaller.get_submodule(down)
    width = down_layer.weight.shape[0 if is_transposed(down_layer) else 1]
    kept = torch.tensor([unit for unit in range(width) if unit != number])
    for path in ups:
        layer = smaller.get_submodule(path)
        keep(layer, "weight", 1 if is_transposed(layer) else 0, kept)
        keep(layer, "bias", 0, kept)
        layer.nf = layer.out_features = width - 1
    keep(down_layer, "weight", 0 if is_transposed(down_layer) else 1, kept)
    for path in norms:
        norm = smaller.get_submodule(path)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if hasattr(norm, name):
                keep(norm, name, 0, kept)
    return smaller


def cut_error(network, inputs, ups, down, numbers, norms=(), grouping=hidden_groups):
    """How far outputs with a zero unit are from those without it."""
    error, whole = 0.0, output_of(network, inputs)
    for number in numbers:
        expected = output_of(cut(network, ups, down, number, norms), inputs)
        assert apart(expected, whole) > 1e-4  # the unit matters
        pruned = output_of(zeroed(network, grouping, ups[0], number), inputs)
        error = max(error, apart(expected, pruned))
    return error


# --- a zero unit is one cut out -------------------------------------------------------------------

ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "GELU and dropout": lambda: nn.Sequential(nn.GELU(), nn.Dropout(0.5)),
    "Sigmoid": nn.Sigmoid,  # of zero it is not zero
    "Softplus": nn.Softplus,
    "PReLU": nn.PReLU,
    "PReLU for every unit": lambda: nn.PReLU(6),
    "identity": nn.Identity,
}


def sequence(*between, inputs=4, units=6):
    return nn.Sequential(nn.Linear(inputs, units), *between, nn.Linear(units, 3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_zero_unit_adds_nothing(activation):
    network = drawn(sequence(ACTIVATIONS[activation]()))
    groups = hidden_groups(network)
    assert (names(groups), groups.counts, groups.left_out) == (["0"], [6], {})
    assert groups.layers[0].removable
    slopes = ["1.weight"] if activation == "PReLU for every unit" else []
    assert members(groups, "0") == ["0.weight", "0.bias", *slopes, "2.weight"]
    assert groups.sizes.tolist() == [4 + 1 + len(slopes) + 3] * 6
    norms = ["1"] if slopes else []
    assert cut_error(network, given(40, 4), ["0"], "2", range(6), norms) < 1e-6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_between_the_two_joins_the_units(training, affine):
    network = drawn(sequence(nn.BatchNorm1d(6, affine=affine), nn.Sigmoid())).train(training)
    with torch.no_grad():
        network[1].running_mean.normal_()
    groups = hidden_groups(network)
    joined = ["1.weight", "1.bias"] if affine else []
    assert members(groups, "0") == ["0.weight", "0.bias", *joined, "3.weight"]
    assert groups.layers[0].removable
    assert cut_error(network, given(40, 4), ["0"], "3", range(6), ["1"]) < 1e-6


@pytest.mark.parametrize("member", ["0.weight", "0.bias", "2.weight"])
def test_a_unit_off_by_one_is_noticed(member):
    network, inputs = drawn(sequence(nn.Sigmoid())), given(40, 4)
    wrong = shifted(hidden_groups, member, by=1)
    assert cut_error(network, inputs, ["0"], "2", range(6), grouping=wrong) > 1e-3


@pytest.mark.parametrize(
    "path", [("w1", "w2", "w3"), ("gate_proj", "down_proj", "up_proj"), ("wi_0", "wo", "wi_1")]
)
@pytest.mark.parametrize("inputs", [4, 6])  # 6: all layers are square
def test_gated_units(path, inputs):
    gate, down, up = path
    network = drawn(GatedUnits(inputs, names=path))
    groups = hidden_groups(network)
    assert (names(groups), groups.counts, groups.left_out) == ([gate], [6], {})
    expected = [f"{name}.{kind}" for name in (gate, up) for kind in ("weight", "bias")]
    assert members(groups, gate) == [*expected, f"{down}.weight"]
    assert cut_error(network, given(40, inputs), [gate, up], down, range(6)) < 1e-6
    for member in (f"{gate}.weight", f"{up}.bias", f"{down}.weight"):
        wrong = shifted(hidden_groups, member, by=1)
        error = cut_error(network, given(40, inputs), [gate, up], down, range(6), (), wrong)
        assert error > 1e-3


def test_gated_units_under_other_names_are_known_by_their_shapes():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    groups = hidden_groups(Gated())
    assert members(groups, "a") == ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight"]


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_a_zero_unit_of_a_hugging_face_model_adds_nothing(kind):
    model, inputs, _, (ups, down) = hugging_face(kind)
    groups = hidden_groups(model)
    assert names(groups) == [ups[0].replace("1", "0", 1), ups[0]]
    assert groups.counts == [24, 24]
    assert groups.left_out == {}
    groups.check_disjoint()
    parameters = dict(model.named_parameters())
    expected = [f"{up}.{part}" for up in ups for part in ("weight", "bias")]
    assert members(groups, ups[0]) == [
        *(name for name in expected if name in parameters),
        f"{down}.weight",
    ]
    assert cut_error(model, inputs, ups, down, [0, 7, 23]) < 1e-5
    wrong = shifted(hidden_groups, f"{down}.weight", by=1)
    assert cut_error(model, inputs, ups, down, [7], grouping=wrong) > 1e-4


@pytest.mark.parametrize("units", [7, 12])  # 12: as wide as the block
@pytest.mark.parametrize("training", [True, False])  # in eval mode, torch takes its fast path
def test_units_of_a_transformer_encoder(units, training):
    network = drawn(nn.TransformerEncoderLayer(12, 3, units, 0.0, "gelu", batch_first=True))
    network.train(training)
    groups = hidden_groups(network)
    assert (names(groups), groups.counts, groups.left_out) == (["linear1"], [units], {})
    assert groups.layers[0].removable
    inputs = given(2, 5, 12)
    assert cut_error(network, inputs, ["linear1"], "linear2", range(units)) < 2e-6


def test_attention_is_not_hidden():
    network = nn.ModuleList([nn.TransformerDecoderLayer(12, 3, 7), GroupedQueryAttention(4)])
    groups = hidden_groups(network)
    assert names(groups) == ["0.linear1"]
    assert groups.left_out == {}


def test_a_block_that_holds_attention_and_units_itself():
    class Block(GroupedQueryAttention):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 5), nn.Linear(5, 8)

    Block.__name__ = "Block"
    assert members(hidden_groups(Block()), "fc1") == ["fc1.weight", "fc1.bias", "fc2.weight"]


def test_layers_inside_children_that_hold_one_each():
    network = nn.Sequential(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Sequential(nn.Dropout(), nn.Linear(6, 3))
    )
    assert members(hidden_groups(network), "0.0") == ["0.0.weight", "0.0.bias", "1.1.weight"]


# --- blocks do not overlap ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "grouped", "left_out"),
    [
        ((6, 5, 4), ["0"], []),
        ((6, 5, 4, 3), ["0"], ["2"]),
        ((6, 5, 4, 3, 2), ["0", "4"], ["2"]),
        ((6, 6, 6, 6), ["0"], ["2"]),
        ((6, 5), [], []),
    ],
)
def test_blocks_of_a_chain_are_disjoint(widths, grouped, left_out):
    groups = hidden_groups(mlp(*widths))
    groups.check_disjoint()
    assert names(groups) == grouped
    assert list(groups.left_out) == left_out
    assert all("share weights with those of '0'" in text for text in groups.left_out.values())


# --- what stands between --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm, nn.RMSNorm, lambda width: nn.LayerNorm(width, elementwise_affine=False)]
)
def test_units_behind_a_norm_over_them_cannot_be_taken_out(norm):
    network = drawn(sequence(norm(6), nn.ReLU()))
    layer = hidden_groups(network).layers[0]
    kind = type(network[1]).__name__
    assert layer.obstacle == f"{kind} '1' normalises over the hidden units"
    assert not layer.removable
    assert {member.name for member in layer.members} == {"0.weight", "0.bias", "3.weight"}


def test_a_norm_of_the_hidden_width_counts_wherever_it_is_defined():
    layer = hidden_groups(GatedUnits(norm=nn.LayerNorm)).layers[0]
    assert layer.obstacle == "LayerNorm 'norm' normalises over the hidden units"
    layer = hidden_groups(GatedUnits(norm=lambda _: nn.LayerNorm(4))).layers[0]
    assert layer.obstacle == ""


@pytest.mark.parametrize(
    "between",
    [nn.Softmax(-1), nn.AdaptiveAvgPool1d(6), nn.Conv1d(6, 6, 1), nn.Sequential(nn.Softmax(-1))],
)
def test_what_mixes_units_stands_against_grouping(between):
    groups = hidden_groups(sequence(nn.ReLU(), between))
    assert groups.layers == ()
    assert list(groups.left_out) == ["0"]
    assert f"between it and '3' is {type(between).__name__} '2'" in groups.left_out["0"]


# --- what is left out, and why --------------------------------------------------------------------


class Pair(nn.Module):
    """Two layers of which nobody says which reads which."""

    def __init__(self, first, second):
        super().__init__()
        self.a, self.b = first, second


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (Pair(nn.Linear(4, 4), nn.Linear(4, 2)), "'b' may read its outputs or its inputs: both"),
        (Pair(nn.Linear(4, 12), nn.Linear(6, 4)), "its 12 outputs are twice what 'b' reads"),
    ],
)
def test_pairs_of_unknown_order_are_left_out(pair, words):
    groups = hidden_groups(pair)
    assert groups.layers == ()
    assert list(groups.left_out) == ["a"]
    assert words in groups.left_out["a"]


def test_layers_that_do_not_fit_are_no_candidates():
    for pair in (Pair(nn.Linear(4, 5), nn.Linear(6, 4)), nn.Sequential(nn.LazyLinear(4))):
        groups = hidden_groups(pair)
        assert (groups.layers, groups.left_out) == ((), {})


def test_tied_and_parametrised_layers_are_left_out():
    network = sequence(nn.ReLU())
    nn.utils.parametrizations.weight_norm(network[2])
    groups = hidden_groups(network)
    assert "'2': its weight is computed from other tensors" in groups.left_out["0"]
    tied = nn.ModuleList([sequence(nn.ReLU()), sequence(nn.ReLU())])
    tied[1][0].weight = tied[0][0].weight
    groups = hidden_groups(tied)
    assert groups.layers == ()
    assert "'1.0': its weight is shared (tied): 0.0.weight, 1.0.weight" in groups.left_out["1.0"]


def test_wrappers_do_not_show_in_names():
    network = sequence(nn.ReLU())
    network[0] = torch.compile(network[0], backend="eager")
    groups = hidden_groups(torch.compile(network, backend="eager"))
    assert members(groups, "0") == ["0.weight", "0.bias", "2.weight"]


def test_weights_of_a_large_stack_add_up():
    layer = nn.TransformerEncoderLayer(768, 12, 3072, device="meta")
    groups = hidden_groups(nn.TransformerEncoder(layer, 12, enable_nested_tensor=False))
    assert groups.counts == [3072] * 12
    assert math.isclose(
        sum(float(layer.sizes().sum()) for layer in groups.layers), 12 * 3072 * (768 + 1 + 768)
    )
