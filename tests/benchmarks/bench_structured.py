"""A whole proximal step on structured groups, against reading and writing the weights once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.benchmarks.measure import Rounds
from tests.benchmarks.networks import grouped, weights
from tests.benchmarks.steps import VARIANTS, floor, groups_step


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["filter", "channel"])
@pytest.mark.parametrize("network", ["ResNet18", "VGG16", "ViT-B/16"])
def test_step(benchmark: Any, network: str, kind: str, variant: str) -> None:
    tensors = weights(network)
    originals = [tensor.clone() for tensor in tensors]
    groups = grouped(tensors, kind)
    measured = Rounds(
        benchmark,
        {"step": groups_step(groups, variant), "floor": floor(tensors)},
        before=lambda: torch._foreach_copy_(tensors, originals),
        rounds=21,
    )
    measured.row(
        "step",
        "floor",
        target=1.3,
        case="structured groups",
        name=f"{network}, {kind}",
        what=f"norms, multipliers, scaling: {variant}",
        floor="_foreach_norm and _foreach_mul_",
    )
