"""The operations in a report against hand counts."""

from collections import OrderedDict

import pytest
import torch
from helpers import ones, rows
from torch import nn

from lightning_wgsef import group_parameters, sparsity_report


def flops(model, inputs, include="0"):
    """Dense and alive, of one layer."""
    groups = group_parameters(model, "element", include=include)
    row = rows(sparsity_report(model, groups, inputs))[include]
    return row.flops, row.flops_alive


# Layer, input, and the multiply-adds by hand.
COUNTED = {
    "Linear": (lambda: nn.Linear(3, 4), (7, 3), 7 * 3 * 4),
    "Linear, no bias": (lambda: nn.Linear(3, 4, bias=False), (7, 3), 7 * 3 * 4),
    "Linear, sequence": (lambda: nn.Linear(3, 4), (7, 5, 3), 7 * 5 * 3 * 4),
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3), (7, 2, 10), 7 * 8 * 2 * 4 * 3),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3), (7, 2, 10, 9), 7 * 8 * 7 * 2 * 4 * 9),
    "Conv2d, stride": (
        lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (7, 2, 10, 8), 7 * 5 * 4 * 2 * 4 * 9
    ),
    "Conv2d, dilation": (
        lambda: nn.Conv2d(2, 4, 3, dilation=2), (7, 2, 10, 10), 7 * 6 * 6 * 2 * 4 * 9
    ),
    "Conv2d, 2 parts": (
        lambda: nn.Conv2d(4, 6, 3, groups=2), (7, 4, 5, 5), 7 * 9 * 2 * (2 * 3) * 9
    ),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (7, 4, 5, 5), 7 * 9 * 4 * 9),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (7, 2, 3, 4, 5), 7 * 2 * 3 * 4 * 2 * 4 * 8),
    # A transposed convolution spreads every input pixel over a kernel.
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(2, 4, 3, stride=2), (7, 2, 5, 5), 7 * 25 * 2 * 4 * 9
    ),
    "ConvTranspose2d, 2 parts": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (7, 4, 5, 5), 7 * 25 * 2 * (2 * 3) * 9
    ),
}  # fmt: skip


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
    dense = 2 * 7 * 9 * 2 * (2 * 3) * 9
    assert (row.flops_alive, row.flops) == (dense * 3 // 4, dense)


def test_operations_left_are_exact():
    """37 of 84 rows and 41 of 120 columns: no rounding in the last digits."""
    model = ones(nn.Sequential(nn.Linear(120, 84)))
    model[0].weight.data[37:] = 0
    model[0].weight.data[:, 41:] = 0
    batch = 10_000
    inputs = torch.ones(1, 120).expand(batch, 120)
    assert flops(model, inputs) == (2 * batch * 120 * 84, 2 * batch * 41 * 37)


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
    groups = group_parameters(model)
    report = rows(sparsity_report(model, groups, (torch.ones(2, 3), torch.ones(2, 5))))
    assert (report["left"].flops, report["right"].flops) == (2 * 2 * 12, 2 * 2 * 20)


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
