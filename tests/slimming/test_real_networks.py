"""Half of every set of well-known architectures zero, and taken out: sizes and outputs."""

import copy
import itertools

import torch

from lightning_wgsef import group_parameters, slim
from tests.helpers.networks.real import NETWORKS, real_network, run_network
from tests.helpers.products import every_value

TRACED = ("structure", "layer")
NOTHING = {  # networks that have no groups of a kind
    "structure": {"GPT-2"},
    "head": set(NETWORKS) - {"ViT", "BERT", "GPT-2", "T5"},
    "hidden": set(NETWORKS)
    - {"LeNet-5", "VGG16-BN", "ConvNeXt", "ViT", "BERT", "GPT-2", "Llama", "T5"},
    "layer": {"LeNet-5", "VGG16-BN", "MobileNetV1", "DenseNet40", "UNet", "BERT"},
}
# Two attention modules of T5 make position biases for every head; its first blocks hand them on.
STAY = {("T5", "head"): 2, ("T5", "layer"): 2}
TIED = ("ResNet18", "MobileNetV2", "DenseNet40", "ConvNeXt", "UNet")
CASES = [
    (network, grouping)
    for grouping, without in NOTHING.items()
    for network in NETWORKS
    if network not in without
]


def half_zero(network, grouping):
    """The network with random biases and half of the groups of each set at zero; and the groups."""
    model, example = real_network(network)
    traced = example if grouping in TRACED else None
    groups = group_parameters(model, grouping, example_input=traced)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and (tensor.dim() == 1) and "running_var" not in name:
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    factors, start = torch.ones(len(groups)), 0
    for count in groups.counts:
        order = torch.randperm(count, generator=generator)
        factors[start + order[: count // 2]] = 0
        start += count
    groups.scale_(factors)
    return model, example, groups


def answers(model, example, training):
    """Outputs in one of the modes, without dropout."""
    twin = copy.deepcopy(model).train(training)
    for module in twin.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return run_network(twin, example)


@every_value("network, grouping", sorted(CASES, key=lambda case: case not in STAY))
def test_what_is_left_are_the_groups_that_are_not_zero(network, grouping):
    model, example, groups = half_zero(network, grouping)
    small = slim(model, example)
    traced = example if grouping in TRACED else None
    left = group_parameters(small, grouping, 1.0, example_input=traced)
    stay = STAY.get((network, grouping), 0)
    if stay:
        assert len(small.slimming.kept) >= stay
        assert sum(left.counts) < sum(groups.counts)
    elif grouping == "layer":
        assert left.counts == [count - count // 2 for count in groups.counts]
    else:
        alive = {x.name: x.count - x.count // 2 for x in groups.layers}
        # Sets with one channel left are no groups any more.
        assert dict(zip((x.name for x in left.layers), left.counts, strict=True)) == {
            name: count for name, count in alive.items() if count > 1 or name in left_names(left)
        }
        assert bool(left.alive().all())
    before, after = small.slimming.parameters
    assert after < before
    modes = (False, True) if small.slimming.difference[1] is not None else (False,)
    for training in modes:
        one, two = (answers(x, example, training) for x in (model, small))
        assert one.shape == two.shape
        assert float((one - two).abs().max()) <= 1e-5 * max(1.0, float(one.abs().max()))
    dense, _ = real_network(network)
    assert not torch.allclose(answers(dense, example, False), answers(model, example, False))


def left_names(groups):
    return {layer.name for layer in groups.layers}


@every_value("network, grouping", itertools.product(TIED, ["filter", "channel"]))
def test_filters_and_channels_go_as_far_as_ties_allow(network, grouping):
    model, example, _ = half_zero(network, grouping)
    small = slim(model, example)
    before, after = small.slimming.parameters
    assert after < before
    for training in (False, True):
        one, two = (answers(x, example, training) for x in (model, small))
        assert float((one - two).abs().max()) <= 1e-5 * max(1.0, float(one.abs().max()))
