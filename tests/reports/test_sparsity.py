"""The report's numbers against hand counts, and its table."""

import json
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_wgsef import (
    GroupedLayer,
    Groups,
    Member,
    group_parameters,
    slim,
    sparsity_report,
)
from lightning_wgsef.reports.sparsity import LayerReport, SparsityReport
from lightning_wgsef.utils.tables import format_table
from tests.helpers.groups import ones, raises_naming, rows


def network():
    """For images of 2 x 8 x 8: maps of 6 x 6, 4 x 4, then 3 features."""
    modules = OrderedDict(
        conv1=nn.Conv2d(2, 6, 3),
        norm1=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 4, 3, bias=False),
        drop=nn.Dropout(),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(4, 3),
    )
    return ones(nn.Sequential(modules))


IMAGES = torch.ones(5, 2, 8, 8)


@pytest.fixture
def model():
    """Channels 1 and 4 of conv2 are dead, its filter 0 too; so is channel 3 of fc."""
    model = network()
    with torch.no_grad():
        model.conv2.weight[:, [1, 4]] = 0
        model.conv2.weight[0] = 0
        model.fc.weight[:, 3] = 0
    return model


# --- the numbers -------------------------------------------------------------------------------


def test_a_hand_count(model):
    report = sparsity_report(model, group_parameters(model, "channel", 0.5), IMAGES)
    conv1, conv2, fc = report.layers
    first = "first layer: its channels are the network's input"
    multiply_adds = 36 * 6 * 2 * 9
    assert conv1 == LayerReport(
        "conv1", 0, 0, None, 108 + 6, 114, 2 * multiply_adds, 2 * multiply_adds, first
    )
    dense, alive = 16 * 4 * 6 * 9, 16 * 3 * 4 * 9
    assert conv2 == LayerReport("conv2", 6, 4, 3.0, 216, 108, 2 * dense, 2 * alive, "")
    dense, alive = 3 * 4, 3 * 3
    assert fc == LayerReport("fc", 4, 3, 2.0, 12 + 3, 9 + 3, 2 * dense, 2 * alive, "")
    assert report.parameters == 114 + 12 + 216 + 15
    assert report.parameters_alive == 114 + 12 + 108 + 12


def test_a_dense_model():
    model = network()
    report = sparsity_report(model, group_parameters(model), IMAGES)
    assert report.parameters == report.parameters_alive == 357
    for layer in report.layers:
        assert layer.parameters_alive == layer.parameters
        assert layer.groups_alive == layer.groups
        assert layer.flops_alive == layer.flops > 0


def test_without_an_example_there_are_no_flops(model):
    report = sparsity_report(model, group_parameters(model))
    assert {(layer.flops, layer.flops_alive) for layer in report.layers} == {(None, None)}
    assert report.parameters_alive == 246


def test_the_filters_report(model):
    with torch.no_grad():
        for parameter in (*model.conv1.parameters(), *model.norm1.parameters()):
            parameter[[2, 5]] = 0
    groups = group_parameters(model, "filter", {"conv1": 4, "*": 0.75})
    report = rows(sparsity_report(model, groups, IMAGES))
    assert (report["conv1"].groups, report["conv1"].groups_alive) == (6, 4)
    assert report["conv1"].budget == 4
    assert report["conv1"].parameters_alive == 4 * 18 + 4
    assert 6 * report["conv1"].flops_alive == 4 * report["conv1"].flops
    assert (report["conv2"].groups, report["conv2"].groups_alive) == (4, 3)
    assert report["fc"].note == "last layer: its filters are the network's outputs"


def test_single_zeros_save_parameters_and_no_operations():
    model = ones(nn.Sequential(nn.Linear(3, 4, bias=False)))
    model[0].weight.data[[0, 1], [0, 1]] = 0
    report = rows(sparsity_report(model, group_parameters(model, "element", 10), torch.ones(1, 3)))
    assert (report["0"].groups, report["0"].groups_alive) == (12, 10)
    assert (report["0"].parameters, report["0"].parameters_alive) == (12, 10)
    assert report["0"].flops_alive == report["0"].flops == 24


def test_everything_dead():
    model = network()
    groups = group_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report = sparsity_report(model, groups, IMAGES)
    assert report.parameters_alive == 0
    assert {layer.flops_alive for layer in report.layers} == {0}
    assert [layer.groups_alive for layer in report.layers] == [0, 0, 0]


def test_frozen_parameters_and_buffers():
    """Frozen weights count, buffers (running means, counts of batches) do not."""
    model = network()
    for parameter in model.conv1.parameters():
        parameter.requires_grad_(False)
    report = sparsity_report(model, group_parameters(model))
    assert report.parameters == 357
    assert rows(report)["conv1"].parameters == 114


def test_tied_weights_count_once_in_the_sum():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    report = sparsity_report(model, group_parameters(model))
    assert [layer.parameters for layer in report.layers] == [16, 20, 20]
    assert report.parameters == 16 + 20 + 4
    assert rows(report)["2"].note == "its weight is that of '1' (tied)"


def test_a_parametrised_layer():
    model = nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
    groups = group_parameters(model, "channel", include="0")
    report = rows(sparsity_report(model, groups, torch.ones(1, 3)))
    assert (report["1"].groups, report["1"].flops) == (0, 32)
    assert "parametrisation" in report["1"].note


def test_all_parameters_of_a_parametrised_layer():
    """Bias, direction and length: the rows add up to the sum."""
    model = nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 4)))
    report = sparsity_report(model, group_parameters(model, "channel", include="0"))
    assert rows(report)["1"].parameters == 4 + 16 + 4
    assert sum(layer.parameters for layer in report.layers) == report.parameters


def test_a_broken_group_is_alive(model):
    """NaN is not zero: the group is not dead while its weights are counted as alive."""
    model.fc.weight.data[0, 1] = float("nan")
    report = rows(sparsity_report(model, group_parameters(model)))
    assert (report["fc"].groups_alive, report["fc"].parameters_alive) == (3, 12)


def test_groups_of_other_modules():
    """Whatever is grouped is reported, also scales of norms, by a function of one's own."""

    def scales(model):
        member = Member("norm1.weight", model.norm1.weight, (0,))
        return Groups([GroupedLayer("norm1", "scale", 6, (member,))])

    model = network()
    model.norm1.weight.data[[0, 3]] = 0
    report = rows(sparsity_report(model, group_parameters(model, scales, 4)))
    assert "norm1" in report
    assert (report["norm1"].groups, report["norm1"].groups_alive) == (6, 4)
    assert (report["norm1"].budget, report["norm1"].parameters_alive) == (4, 10)


# --- a compiled model --------------------------------------------------------------------------


# torch says that global hooks (its own counter's) fire twice for a compiled module: the wrapper
# has no weights, so that nothing is counted twice, as the numbers show.
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
@pytest.mark.parametrize("part", ["all", "inner"])
def test_a_compiled_model(part, model):
    plain = sparsity_report(model, group_parameters(model), IMAGES)
    if part == "all":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        compiled.conv2 = torch.compile(model.conv2, backend="eager")
    assert sparsity_report(compiled, group_parameters(compiled), IMAGES) == plain


# --- what it leaves as it was ------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_modes_weights_and_buffers_stay(model, training):
    model.train(training)
    model.norm1.train(not training)  # as with a frozen norm
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    groups = group_parameters(model)
    sparsity_report(model, groups, IMAGES)
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes.pop("norm1") is not training
    assert set(modes.values()) == {training}
    after = model.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hooks_stay(model):
    model.fc.register_forward_hook(lambda *_: None)
    sparsity_report(model, group_parameters(model), IMAGES)
    assert hooks(model) == 1


def test_modes_come_back_after_an_error(model):
    groups = group_parameters(model)
    model.train()
    model.norm1.eval()
    with pytest.raises(ValueError, match=r"example_input.*channels"):
        sparsity_report(model, groups, torch.ones(5, 3, 8, 8))
    assert model.training
    assert model.drop.training
    assert not model.norm1.training
    assert hooks(model) == 0


def test_the_forward_pass_is_in_evaluation_mode():
    seen = []

    class Watching(nn.Linear):
        def forward(self, inputs):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(inputs)

    model = nn.Sequential(nn.Linear(3, 4), Watching(4, 2)).train()
    sparsity_report(model, group_parameters(model), torch.ones(1, 3))
    assert seen == [(False, False)]


# --- as data and as a table --------------------------------------------------------------------


def test_as_dict_is_ready_for_json(model):
    report = sparsity_report(model, group_parameters(model), IMAGES)
    data = json.loads(json.dumps(report.as_dict()))
    names = {"parameters", "parameters_alive", "parameters_slim", "flops_slim"}
    assert data.keys() == {"layers", *names}
    assert data["parameters_slim"] is data["flops_slim"] is None
    assert data["parameters_alive"] == 246
    assert [layer["name"] for layer in data["layers"]] == ["conv1", "conv2", "fc"]
    layers = tuple(LayerReport(**layer) for layer in data["layers"])
    assert SparsityReport(layers, data["parameters"], data["parameters_alive"]) == report


def test_budgets_of_any_kind_are_ready_for_json():
    model = network()
    for k in (0.5, 2):
        report = sparsity_report(model, group_parameters(model, "channel", k))
        assert json.loads(json.dumps(report.as_dict()))["layers"][1]["budget"] in (2, 3)


def test_the_table(model):
    report = sparsity_report(model, group_parameters(model, "channel", 0.5), IMAGES)
    assert str(report).splitlines() == [
        "layer  groups alive  budget  parameters alive      FLOPs alive",
        "conv1             -       -         114 / 114    7,776 / 7,776",
        "conv2         4 / 6       3         108 / 216    3,456 / 6,912",
        "fc            3 / 4       2           12 / 15          18 / 24",
        "all                                 246 / 357  11,250 / 14,712",
        "conv1: first layer: its channels are the network's input",
    ]


def test_the_network_that_comes_out(model):
    """Of conv1 channels 1 and 4 go, of conv2 filter 0 and the channel that fc does not read."""
    groups = group_parameters(model, "channel", 0.5)
    report = sparsity_report(model, groups, IMAGES, slim=slim(model.eval(), IMAGES))
    left = (4 * 2 * 9 + 4, 2 * 4, 2 * 4 * 9, 2 * 3 + 3)  # conv1, its norm, conv2, fc
    flops = (36 * 4 * 2 * 9, 16 * 2 * 4 * 9, 3 * 2)
    assert (report.parameters_slim, report.flops_slim) == (sum(left), 2 * sum(flops))
    last = str(report).splitlines()[-2].split()
    words = ["after", "slim", f"{sum(left)}", "/", "357", f"{2 * sum(flops):,}", "/", "14,712"]
    assert last == words
    assert json.loads(json.dumps(report.as_dict()))["flops_slim"] == 2 * sum(flops)
    without = sparsity_report(model, groups, slim=slim(model, IMAGES))
    assert (without.parameters_slim, without.flops_slim) == (sum(left), None)
    assert str(without).splitlines()[-2].split()[-1] == "-"


def test_the_table_without_operations(model):
    lines = str(sparsity_report(model, group_parameters(model, "channel", 0.5))).splitlines()
    assert lines[2].split() == ["conv2", "4", "/", "6", "3", "108", "/", "216", "-"]
    assert lines[4].split() == ["all", "246", "/", "357", "-"]


def test_the_table_of_budgets_in_units_of_cost():
    row = LayerReport("fc", 3, 2, 2.25, 12, 8, None, None, "")
    assert "2.25" in str(SparsityReport((row,), 12, 8)).splitlines()[1]


def test_format_table():
    assert format_table(["a"], []) == "a"
    assert format_table(["a", "bb"], [["ccc", ""], ["", "d"]]).splitlines() == [
        "a    bb",
        "ccc",
        "      d",
    ]


@pytest.mark.parametrize("row", [[], ["1"], ["1", "2", "3"]])
def test_rows_are_as_long_as_the_header(row):
    with raises_naming("argument"):
        format_table(["a", "b"], [row])


def flops(model, inputs, include="0"):
    """Dense and alive, of one layer."""
    groups = group_parameters(model, "element", include=include)
    row = rows(sparsity_report(model, groups, inputs))[include]
    return row.flops, row.flops_alive


# Layer, input of seven samples, and the multiply-adds of one by hand.
COUNTED = {
    "Linear": (lambda: nn.Linear(3, 4), (7, 3), 3 * 4),
    "Linear, no bias": (lambda: nn.Linear(3, 4, bias=False), (7, 3), 3 * 4),
    "Linear, sequence": (lambda: nn.Linear(3, 4), (7, 5, 3), 5 * 3 * 4),
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3), (7, 2, 10), 8 * 2 * 4 * 3),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3), (7, 2, 10, 9), 8 * 7 * 2 * 4 * 9),
    "Conv2d, stride": (
        lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1),
        (7, 2, 10, 8),
        5 * 4 * 2 * 4 * 9,
    ),
    "Conv2d, dilation": (
        lambda: nn.Conv2d(2, 4, 3, dilation=2),
        (7, 2, 10, 10),
        6 * 6 * 2 * 4 * 9,
    ),
    "Conv2d, 2 parts": (
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        (7, 4, 5, 5),
        9 * 2 * (2 * 3) * 9,
    ),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (7, 4, 5, 5), 9 * 4 * 9),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (7, 2, 3, 4, 5), 2 * 3 * 4 * 2 * 4 * 8),
    # A transposed convolution spreads every input pixel over a kernel.
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(2, 4, 3, stride=2),
        (7, 2, 5, 5),
        25 * 2 * 4 * 9,
    ),
    "ConvTranspose2d, 2 parts": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        (7, 4, 5, 5),
        25 * 2 * (2 * 3) * 9,
    ),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_operations_of_a_layer(kind):
    make, shape, multiply_adds = COUNTED[kind]
    model = ones(nn.Sequential(make()))
    assert flops(model, torch.ones(shape)) == (2 * multiply_adds, 2 * multiply_adds)


@pytest.mark.parametrize(
    ("kind", "axis"),
    [
        ("Linear", 0),
        ("Linear", 1),
        ("Conv1d", 1),
        ("Conv2d", 0),
        ("Conv2d", 1),
        ("Conv3d", 0),
        ("ConvTranspose2d", 0),
        ("ConvTranspose2d", 1),
        ("Conv2d, 2 parts", 0),
        ("Conv2d, depthwise", 0),
    ],
)
def test_operations_left(kind, axis):
    """Without one slice of a weight, its share of the operations goes."""
    make, shape, multiply_adds = COUNTED[kind]
    model = ones(nn.Sequential(make()))
    size = model[0].weight.shape[axis]
    model[0].weight.data.select(axis, 0).zero_()
    left = 2 * multiply_adds * (size - 1) // size
    assert flops(model, torch.ones(shape)) == (2 * multiply_adds, left)


def test_a_kernel_with_zeros_is_not_skipped():
    model = ones(nn.Sequential(nn.Conv2d(2, 4, 3)))
    model[0].weight.data[:, :, 0] = 0
    dense, alive = flops(model, torch.ones(7, 2, 10, 9))
    assert alive == dense


def test_operations_left_in_a_part_of_a_grouped_convolution():
    """Part 0 no longer reads input channel 1: a quarter of the operations is gone."""
    model = ones(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)))
    groups = group_parameters(model, "channel", include="0")
    groups.scale_(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    row = sparsity_report(model, groups, torch.ones(7, 4, 5, 5)).layers[0]
    assert (row.groups_alive, row.groups) == (3, 4)
    dense = 2 * 9 * 2 * (2 * 3) * 9
    assert (row.flops_alive, row.flops) == (dense * 3 // 4, dense)


def test_operations_left_are_exact():
    """37 of 84 rows and 41 of 120 columns: no rounding in the last digits."""
    model = ones(nn.Sequential(nn.Linear(120, 84)))
    model[0].weight.data[37:] = 0
    model[0].weight.data[:, 41:] = 0
    batch = 10_000
    inputs = torch.ones(1, 120).expand(batch, 120)
    assert flops(model, inputs) == (2 * 120 * 84, 2 * 41 * 37)


def test_a_layer_used_twice_counts_twice():
    shared = nn.Linear(4, 4)
    model = ones(nn.Sequential(nn.Linear(3, 4), shared, shared))
    assert flops(model, torch.ones(1, 3), include="1") == (2 * 2 * 16, 2 * 2 * 16)


def test_a_layer_used_in_two_places():
    """As tied decoders are: it is called by another name, but it is the same layer."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(OrderedDict(one=nn.Sequential(shared), other=nn.Sequential(shared)))
    assert flops(ones(model), torch.ones(1, 4), include="one.0") == (2 * 2 * 16, 2 * 2 * 16)


def test_a_layer_that_is_not_called():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs):
            return self.used(inputs)

    model = Partial()
    report = rows(sparsity_report(model, group_parameters(model), torch.ones(1, 4)))
    assert report["used"].flops == 32
    assert report["unused"].flops in (None, 0)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, left, right):
        return self.left(left) + self.right(right)


def test_several_arguments():
    model = ones(Pair())
    with pytest.warns(UserWarning, match="others may, too: 'right'"):
        groups = group_parameters(model)
    report = rows(sparsity_report(model, groups, (torch.ones(2, 3), torch.ones(2, 5))))
    assert (report["left"].flops, report["right"].flops) == (2 * 12, 2 * 20)


def test_a_module_of_the_root_s_name():
    """Names are taken apart at the front only."""
    inner = nn.Sequential(OrderedDict(Sequential=nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))))
    model = ones(nn.Sequential(OrderedDict(Sequential=inner)))
    name = "Sequential.Sequential.0"
    assert flops(model, torch.ones(1, 3), include=name) == (24, 24)


def test_a_model_that_is_a_layer():
    model = ones(nn.Linear(3, 4))
    report = sparsity_report(model, group_parameters(model, "element"), torch.ones(1, 3))
    assert [(layer.flops, layer.parameters) for layer in report.layers] == [(24, 16)]
