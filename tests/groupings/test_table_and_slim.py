"""What the table calls removable `slim` takes out, and the rest has a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef import Groups, group_parameters, slim
from lightning_wgsef.network.example_input import mapped
from lightning_wgsef.network.layers import tensors_by_name
from tests.helpers.networks.structure_cases import CASES
from tests.helpers.removal import NEGLIGIBLE, as_double, difference, drawn, zero_beyond_budgets


def find(network: nn.Module, example: Any, grouping: str) -> Groups | None:
    """Return the groups; None where there is nothing to group."""
    try:
        return group_parameters(network, grouping, 0.5, example_input=example)
    except ValueError as error:
        if "can group" not in str(error):
            raise
        return None


def redrawn(value: Any, seed: int) -> Any:
    """Numbers as of another batch; integers within their range, in any combination."""
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value)
    if value.dtype == torch.bool:
        return torch.rand(value.shape, generator=generator) < 0.5
    return torch.randint(int(value.min()), int(value.max()) + 1, value.shape, generator=generator)


@pytest.mark.parametrize("grouping", ["structure", "channel", "filter"])
@pytest.mark.parametrize("name", CASES)
def test_the_table_says_what_slim_does(name: str, grouping: str) -> None:
    make, example, _ = CASES[name]
    torch.manual_seed(0)
    # In float64, for the scale of a norm over its channels is computed anew.
    network, example = drawn(make()).double(), mapped(as_double, example)
    groups = find(network, example, grouping)
    if groups is None:
        return
    alive = zero_beyond_budgets(groups)
    small = slim(network, example)
    left, gone = tensors_by_name(small), dict[tuple[str, int], int]()
    for layer, stays in zip(groups.layers, alive, strict=True):
        if not layer.removable:
            assert layer.obstacle, layer.name
            assert grouping != "structure", layer.name
            continue
        for member in layer.members:
            if len(member.axes) == 1:  # not the parts of a grouped convolution
                index = torch.arange(member.slices) if member.index is None else member.index
                place = (member.name, member.axes[0])
                dead = int(((index >= 0) & (stays[index] == 0)).sum())
                gone[place] = gone.get(place, 0) + dead
    sizes = {(name, axis): left[name].shape[axis] for name, axis in gone}
    before = tensors_by_name(network)
    assert sizes == {(n, axis): before[n].shape[axis] - less for (n, axis), less in gone.items()}
    for seed in range(3):
        varied = mapped(lambda x, seed=seed: redrawn(x, seed), example)
        assert difference(network, small, varied) < NEGLIGIBLE
