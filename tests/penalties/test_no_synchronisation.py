"""On an accelerator nothing waits for the device.

Tensors on torch's meta device have no values: whatever would read one on the host raises, and the
package treats every device but the CPU alike. This needs no accelerator.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_wgsef import (
    WGSEF,
    Constant,
    Homotopy,
    envelope_conjugate,
    envelope_value,
    prox_multipliers,
    sparsity_gap,
)
from lightning_wgsef.penalties.segments import Segments


def test_the_check_can_fail() -> None:
    with pytest.raises(RuntimeError, match="meta tensors"):
        bool(torch.ones(3, device="meta").sum() > 2)


@pytest.mark.parametrize("debias", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("anchored", [False, True])
def test_prox(debias: float, anchored: bool) -> None:
    norms = torch.ones(100, device="meta")
    segments = Segments.of_sizes([40, 0, 20, 10, 10, 15, 5], "meta")
    budgets = torch.ones(7, device="meta")
    factors = prox_multipliers(
        norms,
        torch.ones(7, device="meta"),
        budgets,
        weights=norms,
        costs=norms,
        segments=segments,
        debias=debias,
        anchored=anchored,
    )
    assert factors.shape == norms.shape
    assert factors.device.type == "meta"


def test_value_gap_and_conjugate() -> None:
    norms = torch.ones(100, device="meta")
    segments = Segments.of_sizes([40, 0, 20, 10, 10, 15, 5], "meta")
    budgets = torch.ones(7, device="meta")
    for function in (envelope_value, sparsity_gap, envelope_conjugate):
        assert function(norms, budgets, segments=segments).shape == (7,)


@pytest.mark.parametrize("lam", [Homotopy(length=40), Constant(0.1)])
@pytest.mark.parametrize("grouping", ["channel", "filter", "element"])
def test_whole_step_and_the_numbers_to_log(grouping: str, lam: Homotopy | Constant) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 3)
    ).to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    regularizer = WGSEF(model, k=0.5, lam=lam, grouping=grouping).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()
    assert regularizer.pruners[0].taken == 3
    assert all(number.dim() == 0 for number in regularizer.metrics().values())


class Kernels(TorchDispatchMode):
    """Counts operations that compute, which on an accelerator start a kernel each."""

    free = ("view", "expand", "slice", "select", "detach", "squeeze", "split", "empty", "types")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not any(name in str(function) for name in self.free)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lam", [Homotopy(length=40), Constant(0.1)])
def test_few_kernels(lam: Homotopy | Constant) -> None:
    """Three for every parameter (two a layer), and some for all of them."""
    counts = []
    for depth in (2, 12):
        model = nn.Sequential(*[nn.Conv2d(64, 64, 3) for _ in range(depth)]).to("meta")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regularizer = WGSEF(model, k=0.5, lam=lam, grouping="filter")
        regularizer.attach(optimizer).detach()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(2):
            regularizer.step(optimizer)
        with Kernels() as kernels:
            regularizer.step(optimizer)
        counts.append(kernels.count)
    per_layer = (counts[1] - counts[0]) / 10
    assert 4 <= per_layer <= 6
    assert counts[0] - 2 * per_layer <= 160, counts
