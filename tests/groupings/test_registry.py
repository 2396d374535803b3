"""Names of groupings, mappings from patterns to them, penalty weights, and overlap."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_wgsef import Groups, WGSEFCallback, group_parameters
from lightning_wgsef.groupings.per_layer import filter_groups


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.Linear(8, 4),
    )


@pytest.mark.parametrize(
    "name",
    ["chanel", "", "4:2", "4:4", "0:4", "2:4:6", "block", "block:0x2", "block:2", 3, None, {}],
)
def test_unknown_names_list_the_known_ones(name):
    uses = [lambda: WGSEFCallback(grouping=name)] * (name is not None)  # which is the default
    for use in (*uses, lambda: group_parameters(network(), name)):
        with pytest.raises(ValueError, match="grouping must be 'channel', 'element'") as caught:
            use()
        message = str(caught.value)
        assert "'block:RxC'" in message
        assert "'n:m'" in message
        assert message.endswith(f"got {name!r}")


def test_a_mapping_gives_every_layer_its_grouping_and_its_budget():
    grouping = {"0": "filter", "2": filter_groups, "4": "2:4", "*": "channel"}
    groups = group_parameters(network(), grouping, k={"0": 0.25, "2": 3, "*": 0.5})
    found = {layer.name: (layer.grouping, layer.budget) for layer in groups.layers}
    assert found == {"0": ("filter", 2), "2": ("filter", 3), "4": ("2:4", 2), "5": ("channel", 4)}
    assert groups.left_out == {}


def test_a_mapping_keeps_the_reasons():
    groups = group_parameters(
        network(), {"0": "channel", "4": "block:3x3", "5": "filter"}, 0.5, include=["5"]
    )
    assert [layer.name for layer in groups.layers] == ["5"]
    assert groups.left_out == {
        "0": "not named in include",
        "4": "its 8 outputs and 8 inputs cannot be cut into tiles of 3 x 3",
    }


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        ({"7": "channel"}, "grouping: the pattern '7' matches no layer of 'channel'; its layers"),
        ({"0": "chanel"}, "grouping must be 'channel'.*got 'chanel'"),
        ({0: "channel"}, "grouping must map patterns of layer names to names or functions, got 0"),
        ({"0": {"1": "channel"}}, "grouping must map patterns of layer names to names or functi"),
    ],
)
def test_bad_mappings(grouping, message):
    with pytest.raises(ValueError, match=message):
        group_parameters(network(), grouping)


def test_overlap_is_refused_or_resolved_by_order():
    def both(model):
        rows = group_parameters(model, "filter", include="4").layers[0]
        columns = group_parameters(model, "channel", include="4").layers[0]
        return Groups([rows, replace(columns, name="again")])

    clash = r"weights of '4.weight' belong to '4' \(filter\) and to 'again' \(channel\)"
    with pytest.raises(ValueError, match=rf"groups overlap: {clash}"):
        group_parameters(network(), both)
    groups = group_parameters(network(), both, overlap="first")
    assert [layer.name for layer in groups.layers] == ["4"]
    assert list(groups.left_out) == ["again"]
    assert "'4' (filter) and to 'again' (channel)" in groups.left_out["again"]
    for use in (group_parameters, lambda *_, **named: WGSEFCallback(**named)):
        with pytest.raises(ValueError, match="overlap must be 'error' or 'first', got 'last'"):
            use(network(), overlap="last")


def weighted(weights, **arguments):
    return group_parameters(network(), "filter", weights=weights, **arguments)


def test_weights_by_name():
    assert weighted("uniform").weights is None
    sizes = {"0": 28, "2": 73, "4": 9}  # with the bias; the last layer is left out
    for name, power in (("size", 1.0), ("sqrt_size", 0.5)):
        for part in weighted(name).split(weighted(name).weights).values():
            assert part.tolist() == pytest.approx([1.0] * len(part))  # all of a layer are alike
        together = weighted(name, scope="global")
        parts = together.split(together.weights)
        ratio = parts["0"][0] / parts["2"][0]
        assert ratio.item() == pytest.approx((sizes["2"] / sizes["0"]) ** power)
        assert together.weights.mean().item() == pytest.approx(1)
    groups = weighted("layer_norm")
    for part, norms in zip(
        groups.split(groups.weights).values(), groups.split(groups.norms()).values(), strict=True
    ):
        assert (part * norms.square()).mean().item() == pytest.approx(1, rel=1e-5)
    default = weighted(None, scope="global")
    assert torch.equal(default.weights, weighted("layer_norm", scope="global").weights)


def test_size_makes_the_mean_square_of_weights_decide():
    model = nn.Sequential(nn.Linear(100, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1.0)
    for name, same in (("size", True), ("uniform", False)):
        groups = group_parameters(model, "filter", 0.5, weights=name, scope="global")
        w = torch.ones(4) if groups.weights is None else groups.weights
        strengths = groups.norms() * w.sqrt()
        assert torch.allclose(strengths, strengths[0].expand(4)) == same


def test_weights_as_tensors():
    groups = weighted(torch.arange(1.0, 25.0))
    assert groups.weights.tolist() == list(range(1, 25))
    parts = {"0": torch.ones(8), "2": torch.full((8,), 2.0), "4": torch.full((8,), 3.0)}
    assert weighted(parts).weights.tolist() == [1.0] * 8 + [2.0] * 8 + [3.0] * 8
    for wrong, message in (
        (torch.ones(3), r"weights must have one entry for each of the 24 groups.*shape \(3,\)"),
        ({"0": torch.ones(8)}, r"weights must have the groups of every layer, \{'0': 8"),
        (torch.zeros(24), "weights of layer '0' must be positive.*lowest 0.0"),
        (
            "sizes",
            "weights must be 'fisher', 'layer_norm', 'size', 'sqrt_size', 'taylor', 'uniform'",
        ),
        (2.0, "weights must be 'fisher'"),
    ):
        with pytest.raises(ValueError, match=message):
            weighted(wrong)
    with pytest.raises(ValueError, match="weights must be 'fisher'"):
        WGSEFCallback(weights="sizes")


def test_the_table_shows_weights_costs_and_obstacles():
    text = str(weighted("layer_norm", costs="params", example_input=torch.ones(1, 3, 5, 5)))
    header = ["layer", "grouping", "groups", "weights", "each", "weight", "cost", "budget"]
    assert text.splitlines()[0].split() == [*header, "removable"]
    assert "  28  " in text
    assert "left out: 5: last layer: its filters are the network's outputs" in text


@pytest.mark.parametrize(
    ("grouping", "words"),
    [
        ("head", "no nn.MultiheadAttention, and no attention with known names of layers"),
        ("hidden", "no module with two dense layers of which the second reads"),
        ("filter", "no weights"),
    ],
)
def test_what_a_model_lacks(grouping, words):
    model = nn.Sequential(nn.Conv2d(3, 4, 3)) if grouping != "filter" else nn.Sequential(nn.ReLU())
    text = f"Sequential has no layer that .*{grouping}.*: it has {words}"
    with pytest.raises(ValueError, match=text):
        group_parameters(model, grouping)
