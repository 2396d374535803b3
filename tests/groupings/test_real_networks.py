"""Groupings on well-known architectures: what is found, what training leaves, what can be removed.

Expected numbers are derived by hand from the architectures in `real_networks`: every layer's width
is written there.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch

from lightning_wgsef import Groups, WGSEFCallback, group_parameters
from lightning_wgsef.groupings.registry import find_groups
from lightning_wgsef.groupings.removability import zero_invariance
from lightning_wgsef.network.dependency_graph import Graph
from tests.helpers.groups import members, names
from tests.helpers.networks.real import real_network, run_network
from tests.helpers.products import every_value

BOTH = "head and hidden"
PATTERNS = {
    "ViT": {"*.attention": "head", "*.mlp": "hidden"},
    "BERT": {"*.attention": "head", "*.intermediate": "hidden"},
    "GPT-2": {"*.attn": "head", "*.mlp": "hidden"},
    "Llama": {"*.self_attn": "head", "*.mlp": "hidden"},
    "T5": {"*Attention": "head", "*.DenseReluDense": "hidden"},
}
FIRST, LAST = "first layer", "last layer"
OUTPUTS = "its channels are the network's outputs"
SHARE = "would share weights with"
DEPTHWISE = "depthwise"
OUTSIDE = "belongs to no residual block"
STREAM = "residual stream of"
HEADS = "mixes its channels with heads"
OTHER = "is none of"
TIED = "(tied)"
DIVIDES = "needs inputs that 4 divides"

# For every network and grouping: sets of groups (which have a budget each), groups, and how many
# layers are left out, by what their reason says.
FOUND = {
    ("LeNet-5", "filter"): (4, 28, {LAST: 1}),
    ("LeNet-5", "channel"): (4, 172, {FIRST: 1}),
    ("LeNet-5", "structure"): (4, 28, {OUTPUTS: 1}),
    ("LeNet-5", "hidden"): (1, 10, {SHARE: 1}),
    ("VGG16-BN", "filter"): (15, 126, {LAST: 1}),
    ("VGG16-BN", "channel"): (15, 156, {FIRST: 1}),
    ("VGG16-BN", "structure"): (15, 126, {OUTPUTS: 1}),
    ("VGG16-BN", "hidden"): (1, 12, {SHARE: 1}),
    ("ResNet18", "filter"): (20, 140, {LAST: 1}),
    ("ResNet18", "channel"): (20, 134, {FIRST: 1}),
    # In every stage one residual stream, and between the two convolutions of both blocks.
    ("ResNet18", "structure"): (4 * 3, 3 * (4 + 6 + 8 + 10), {OUTPUTS: 1}),
    # The first block of stages 1 to 3 has a convolution on its shortcut.
    ("ResNet18", "layer"): (1, 5, {OUTSIDE: 1 + 3 * 3 + 1}),
    ("ResNet18", "2:4"): (11, 3344, {DIVIDES: 10}),
    ("ResNet50", "filter"): (53, 402, {LAST: 1}),
    ("ResNet50", "channel"): (53, 386, {FIRST: 1}),
    # The stem; in every stage one residual stream; in every block two inner widths.
    ("ResNet50", "structure"): (1 + 4 + 2 * 16, 174, {OUTPUTS: 1}),
    ("ResNet50", "layer"): (1, 2 + 3 + 5 + 2, {OUTSIDE: 1 + 4 * 4 + 1}),
    ("MobileNetV1", "filter"): (27, 684, {LAST: 1}),
    ("MobileNetV1", "channel"): (14, 374, {FIRST: 1, DEPTHWISE: 13}),
    ("MobileNetV1", "structure"): (14, 374, {OUTPUTS: 1}),
    ("MobileNetV2", "filter"): (52, 958, {LAST: 1}),
    ("MobileNetV2", "channel"): (35, 654, {FIRST: 1, DEPTHWISE: 17}),
    # Two of the stem, 16 expansions, 6 widths between blocks, and the last convolution.
    ("MobileNetV2", "structure"): (2 + 16 + 6 + 1, 4 + 2 + 300 + 88 + 160, {OUTPUTS: 1}),
    # Blocks of stride 1 between equal widths: 10 of 16.
    ("MobileNetV2", "layer"): (1, 10, {OUTSIDE: 53 - 3 * 10}),
    ("DenseNet40", "filter"): (12, 90, {LAST: 1}),
    ("DenseNet40", "channel"): (12, 288, {FIRST: 1}),
    ("DenseNet40", "structure"): (12, 90, {OUTPUTS: 1}),
    ("UNet", "filter"): (12, 66, {LAST: 1}),
    ("UNet", "channel"): (12, 76, {FIRST: 1}),
    ("UNet", "structure"): (12, 66, {OUTPUTS: 1}),
    ("ConvNeXt", "filter"): (19, 244, {LAST: 1}),
    ("ConvNeXt", "channel"): (14, 208, {FIRST: 1, DEPTHWISE: 5}),
    ("ConvNeXt", "structure"): (5, 4 * (4 + 6 + 8 + 8 + 10), {STREAM: 4, OUTPUTS: 1}),
    ("ConvNeXt", "hidden"): (5, 4 * (4 + 6 + 8 + 8 + 10), {}),
    ("ConvNeXt", "layer"): (1, 5, {OUTSIDE: 1 + 3 + 1}),
    ("ViT", "filter"): (13, 112, {LAST: 1, OTHER: 1}),
    ("ViT", "channel"): (13, 112, {FIRST: 1, OTHER: 1}),
    ("ViT", "structure"): (2, 24, {HEADS: 6, STREAM: 1, OUTPUTS: 1, OTHER: 1}),
    ("ViT", "layer"): (1, 2, {OUTSIDE: 2}),
    ("ViT", BOTH): (4, 2 * (2 + 12), {}),
    ("BERT", "filter"): (13, 112, {LAST: 1, OTHER: 3}),
    # The first dense layer of a language model reads embeddings, not the network's input.
    ("BERT", "channel"): (14, 120, {OTHER: 3}),
    # The pooler, besides the hidden units.
    ("BERT", "structure"): (3, 2 * 12 + 8, {HEADS: 6, STREAM: 1, OUTPUTS: 1}),
    ("BERT", BOTH): (4, 2 * (2 + 12), {}),
    ("GPT-2", "layer"): (1, 2, {OUTSIDE: 1}),
    ("GPT-2", BOTH): (4, 2 * (2 + 12), {}),
    ("Llama", "filter"): (14, 224, {LAST: 1, OTHER: 1}),
    ("Llama", "channel"): (15, 256, {OTHER: 1}),
    ("Llama", "structure"): (2, 48, {HEADS: 6, STREAM: 1, OUTPUTS: 1}),
    ("Llama", "layer"): (1, 2, {OUTSIDE: 1}),
    ("Llama", BOTH): (4, 2 * (2 + 24), {}),  # two heads of keys and values, with two queries each
    ("Llama", "2:4"): (15, 4320, {OTHER: 1}),
    ("T5", "filter"): (32, 272, {TIED: 1, OTHER: 5}),
    ("T5", "channel"): (32, 272, {TIED: 1, OTHER: 5}),
    ("T5", "structure"): (4, 48, {HEADS: 18, TIED: 11, OTHER: 5}),
    # Each sublayer is a branch: two in a block of the encoder, three in one of the decoder.
    ("T5", "layer"): (1, 2 * 2 + 2 * 3, {OUTSIDE: 1}),
    ("T5", BOTH): (10, 6 * 2 + 4 * 12, {}),
}
REASONS = (
    FIRST,
    LAST,
    OUTPUTS,
    SHARE,
    DEPTHWISE,
    OUTSIDE,
    STREAM,
    HEADS,
    OTHER,
    TIED,
    DIVIDES,
)

# Filters alone: how many layers can be taken out, and what stands against the others. Residual
# streams and depthwise convolutions tie; a BatchNorm behind one of these, or behind a
# concatenation, has a shift that no filter owns.
NORM = "is in no group"
TO = "tied to"
FILTERS = {
    "LeNet-5": {"": 4},
    "VGG16-BN": {"": 15},
    "ResNet18": {"": 8, TO: 12},
    "ResNet50": {"": 1 + 32, TO: 16 + 4},
    "MobileNetV1": {"": 1, TO: 13, NORM: 13},
    "MobileNetV2": {"": 3, TO: 17 + 15, NORM: 17},
    "DenseNet40": {NORM: 12},
    "UNet": {"": 12},
    "ConvNeXt": {"": 5, TO: 1 + 3 + 2 * 5},
    "ViT": {"": 2, TO: 1 + 2 * 2, HEADS: 6},
    "BERT": {"": 3, TO: 2 * 2, HEADS: 6},
    "Llama": {TO: 2 * 2 + 2 * 2, HEADS: 6},
    "T5": {"": 4, TO: 6, HEADS: 18, OUTPUTS: 4},  # the encoder's stream is an output, too
}

# Layers that say themselves that their groups cannot be taken out.
RELATIVE = "'relative_attention_bias.weight' has an entry for every head"
KEPT = {
    ("T5", BOTH): {
        f"{stack}.block.0.layer.0.SelfAttention": RELATIVE for stack in ("encoder", "decoder")
    }
}


@pytest.fixture(autouse=True)
def _no_endless_search(monkeypatch):
    """A search among channels (3,460 steps at most where it ends) stops where it does not end."""
    searched = Graph.width
    calls = itertools.count(1)

    def counted_width(self, side):
        if next(calls) > 20_000:
            raise TimeoutError
        return searched(self, side)

    monkeypatch.setattr(Graph, "width", counted_width)


def cases(*groupings):
    """Networks and groupings, all or these."""
    return pytest.mark.parametrize(
        ("network", "grouping"),
        [
            pytest.param(*case, id=" ".join(case))
            for case in FOUND
            if not groupings or case[1] in groupings
        ],
    )


def arguments(network, grouping, example):
    """Of `group_parameters` and of the callback."""
    traced = {"example_input": example} if grouping in ("structure", "layer") else {}
    return {"grouping": PATTERNS[network] if grouping == BOTH else grouping, "k": 0.5, **traced}


def found(network, grouping):
    """The model, its groups and an example input."""
    model, example = real_network(network)
    return model, group_parameters(model, **arguments(network, grouping, example)), example


def counted(reasons, known):
    """How many reasons have each of the known words in them; every reason has just one."""
    words = [[word for word in known if word and word in reason] for reason in reasons]
    assert all(len(one) == (reason != "") for one, reason in zip(words, reasons, strict=True)), (
        reasons
    )
    return Counter(one[0] if one else "" for one in words)


# --- what is found --------------------------------------------------------------------------------


@cases()
def test_groups_and_what_is_left_out(network, grouping):
    sets, count, left_out = FOUND[network, grouping]
    _, groups, _ = found(network, grouping)
    assert (len(groups.layers), len(groups)) == (sets, count)
    assert counted(list(groups.left_out.values()), REASONS) == left_out


def test_gpt2_is_followed_with_a_cache_as_without():
    model, example = real_network("GPT-2")
    cached = find_groups(model, "structure", {**example, "use_cache": True})
    plain = find_groups(model, "structure", {**example, "use_cache": False})
    assert cached.layers == plain.layers == ()
    assert cached.left_out == plain.left_out


@pytest.mark.parametrize("grouping", ["filter", "channel", "structure"])
def test_gpt2_has_heads_and_hidden_units_only(grouping):
    """Its dense layers are of a class of its own; its last layer is its embedding."""
    model, example = real_network("GPT-2")
    example = {**example, "use_cache": False}
    groups = find_groups(model, grouping, example)
    assert groups.layers == ()
    assert counted(list(groups.left_out.values()), REASONS) == {OTHER: 2 + 2 * 4, TIED: 1}
    with pytest.raises(ValueError, match="no layer that grouping="):
        group_parameters(model, grouping, example_input=example)


def scaled(*modules):
    """Names of weights and shifts of convolutions without bias and their norms, in order."""
    return [
        f"{module}.{parameter}"
        for module in modules
        for parameter in ("convolution.weight", "normalization.weight", "normalization.bias")
    ]


def test_a_stage_of_a_resnet_is_one_set():
    _, groups, _ = found("ResNet18", "structure")
    stage = "resnet.encoder.stages.1.layers"
    expected = scaled(f"{stage}.0.shortcut", f"{stage}.0.layer.1", f"{stage}.1.layer.1")
    assert members(groups, f"{stage}.0.shortcut.convolution") == expected


def test_an_expansion_of_mobilenet_takes_its_depthwise_convolution_along():
    _, groups, _ = found("MobileNetV2", "structure")
    block = "mobilenet_v2.layer.3"
    expected = scaled(f"{block}.expand_1x1", f"{block}.conv_3x3")
    assert members(groups, f"{block}.expand_1x1.convolution") == expected


def test_channels_of_densenet_keep_their_places_in_all_norms_behind():
    """The first layer of the first block adds channels 6 to 9 of 10, 14 and 18."""
    _, groups, _ = found("DenseNet40", "structure")
    first = next(layer for layer in groups.layers if layer.name == "features.1.conv")
    places = {member.name: member.index for member in first.members}
    assert places.pop("features.1.conv.weight") is None
    widths = {"features.2.norm": 10, "features.3.norm": 14, "features.4.norm": 18}
    assert {name: index.tolist() for name, index in places.items()} == {
        f"{norm}.{parameter}": [-1] * 6 + [0, 1, 2, 3] + [-1] * (width - 10)
        for norm, width in widths.items()
        for parameter in ("weight", "bias")
    }


def test_outputs_of_a_transposed_convolution_lie_along_its_second_axis():
    _, groups, _ = found("UNet", "structure")
    (up,) = (layer for layer in groups.layers if layer.name == "up2")
    assert [(member.name, member.axes) for member in up.members] == [
        ("up2.weight", (1,)),
        ("up2.bias", (0,)),
    ]


def test_queries_of_llama_follow_their_keys_and_values():
    _, groups, _ = found("Llama", BOTH)
    (heads,) = (x for x in groups.layers if x.name == "model.layers.1.self_attn")
    sizes = {m.name.split(".")[-2]: torch.bincount(m.index).tolist() for m in heads.members}
    assert sizes == {"q_proj": [8, 8], "k_proj": [4, 4], "v_proj": [4, 4], "o_proj": [8, 8]}


# --- what training leaves -------------------------------------------------------------------------


class Repeated:
    """One batch, again and again."""

    def __init__(self, batch, times):
        self.batch, self.times = batch, times

    def __iter__(self):
        return itertools.repeat(self.batch, self.times)


class Regression(pl.LightningModule):
    """The network with random targets."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *inputs, **named):
        return self.network(*inputs, **named)

    def training_step(self, batch, batch_idx):
        example, targets = batch
        return (run_network(self, example) - targets).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def trained(model, example, **more):
    """The module after 20 steps, and the callback."""
    module = Regression(model)
    with torch.no_grad():
        targets = torch.randn_like(run_network(model, example))
    callback = WGSEFCallback(**more)
    pl.Trainer(
        max_steps=20,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, Repeated((example, targets), 20))
    return module, callback.regularizer


def wrong_weights(groups, masks):
    """Parameters with a weight in a dead group that is not zero, and sets with a lost group."""
    wrong = [
        layer.name
        for layer in groups.layers
        if not Groups([layer]).alive()[masks[layer.name]].all()
    ]
    for layer in groups.layers:
        for member in layer.members:
            dead = member.along(~masks[layer.name], False).expand(tuple(member.extent))
            if member.seen(member.parameter.detach())[dead].any():
                wrong.append(member.name)
    return wrong


@every_value("network, grouping", FOUND)
def test_training_ends_on_the_budget(network, grouping):
    model, example = real_network(network)
    module, regularizer = trained(model, example, **arguments(network, grouping, example))
    groups, masks = regularizer.groups, regularizer.masks
    sets, count, _ = FOUND[network, grouping]
    assert regularizer.frozen
    assert (len(groups.layers), len(groups)) == (sets, count)
    for layer in groups.layers:
        budget = 2 if grouping == "2:4" else max(1, (layer.count + 1) // 2)
        alive = masks[layer.name].view(-1, 4 if grouping == "2:4" else layer.count).sum(1)
        assert alive.tolist() == [budget] * len(alive)
    assert wrong_weights(groups, masks) == []
    with torch.no_grad():
        assert run_network(module.eval(), example).isfinite().all()


def test_a_weight_that_should_be_zero_is_noticed():
    model, example = real_network("DenseNet40")
    _, regularizer = trained(model, example, **arguments("DenseNet40", "structure", example))
    groups, masks = regularizer.groups, regularizer.masks
    dead = int((~masks["network.features.1.conv"]).nonzero()[0])
    assert wrong_weights(groups, masks) == []
    with torch.no_grad():
        model.features[4].norm.bias[6 + dead] = 1e-30
    assert wrong_weights(groups, masks) == ["network.features.4.norm.bias"]


# --- what can be taken out ------------------------------------------------------------------------


@cases("structure", "hidden", "layer", BOTH)
def test_zero_groups_can_be_taken_out(network, grouping):
    model, groups, example = found(network, grouping)
    kept = KEPT.get((network, grouping), {})
    obstacles = {layer.name: layer.obstacle for layer in groups.layers if not layer.removable}
    assert obstacles == kept
    causes = zero_invariance(model, groups, example)
    assert list(causes) == [name for name in names(groups) if name not in kept]
    for name, cause in causes.items():
        # The attention of all blocks but the first adds the position bias of the first.
        shared = (network, grouping) == ("T5", BOTH) and "block.1." in name and "ttention" in name
        assert ("the network does not run without them" in cause) if shared else cause == "", name


@pytest.mark.parametrize(
    "network",
    [pytest.param(x, marks=[pytest.mark.sweep] * (x == "MobileNetV2")) for x in FILTERS],
)
def test_which_filters_can_be_taken_out_alone(network):
    model, groups, example = found(network, "filter")
    causes = zero_invariance(model, groups, example)
    assert list(causes) == names(groups)
    assert counted(list(causes.values()), (TO, NORM, HEADS, OUTPUTS)) == FILTERS[network]


def test_filters_of_a_residual_stream_name_the_tie():
    model, groups, example = found("ResNet18", "filter")
    causes = zero_invariance(model, groups, example)
    stages = "resnet.encoder.stages"
    streams = [["resnet.embedder.embedder", f"{stages}.0.layers.0.layer.1"]]
    streams += [
        [f"{stages}.{stage}.layers.0.shortcut", f"{stages}.{stage}.layers.0.layer.1"]
        for stage in (1, 2, 3)
    ]
    for stage, stream in enumerate(streams):
        stream.append(f"{stages}.{stage}.layers.1.layer.1")
        tied = {f"{name}.convolution" for name in stream}
        for name in tied:
            (other,) = re.findall("tied to '(.*?)'", causes.pop(name))
            assert other in tied - {name}
    assert set(causes.values()) == {""}


def test_a_forgotten_shift_is_noticed():
    model, groups, example = found("VGG16-BN", "structure")
    layers = [
        replace(x, members=tuple(m for m in x.members if m.name != "features.4.bias"))
        for x in groups.layers
    ]
    causes = zero_invariance(model, Groups(layers), example)
    assert [name for name, cause in causes.items() if cause] == ["features.3"]
    assert "'features.4' is in no group" in causes["features.3"]
