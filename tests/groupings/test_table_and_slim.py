"""What the table calls removable `slim` takes out, and the rest has a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef import Groups, group_parameters, slim
from lightning_wgsef.network.channels import normalises_width
from lightning_wgsef.network.equivalence import TOLERANCE
from lightning_wgsef.network.example_input import mapped
from lightning_wgsef.network.layers import tensors_by_name
from tests.helpers.networks.structure_cases import CASES
from tests.helpers.removal import NEGLIGIBLE, difference, drawn


def find(network: nn.Module, example: Any, grouping: str) -> Groups | None:
    """Return the groups; None where there is nothing to group."""
    try:
        return group_parameters(network, grouping, 0.5, example_input=example)
    except ValueError as error:
        if "can group" not in str(error):
            raise
        return None


def half_zero(groups: Groups) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    alive = []
    for layer in groups.layers:
        stays = torch.randperm(layer.count, generator=generator)[: int(layer.budget)]
        alive.append(torch.zeros(layer.count).index_fill_(0, stays, 1.0))
    groups.scale_(torch.cat(alive))
    return alive


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
    network = drawn(make())
    groups = find(network, example, grouping)
    if groups is None:
        return
    alive = half_zero(groups)
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
    # The scale of a norm over its channels is drawn together, and rounded to float32.
    exact = not any(map(normalises_width, network.modules()))
    for seed in range(3):
        varied = mapped(lambda x, seed=seed: redrawn(x, seed), example)
        assert difference(network, small, varied) < (NEGLIGIBLE if exact else TOLERANCE)
