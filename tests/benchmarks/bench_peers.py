"""Others on the same tensors against the same floor: torchao's prox maps, Lightning's pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks.measure import Rounds, add_row, once
from tests.benchmarks.networks import grouped, weights
from tests.benchmarks.steps import HOMOTOPY, floor, groups_step

CASE = "others, the same tensors"


def ours(tensors: list[Tensor]) -> Callable[[], None]:
    return groups_step(grouped(tensors, "filter"), HOMOTOPY)


def group_lasso(tensors: list[Tensor]) -> Callable[[], None]:
    from torchao.prototype.pat.optim import ProxGroupLasso

    return by_torchao(tensors, ProxGroupLasso(reg_lambda=1e-4), counts=False)


def group_lasso_vectorized(tensors: list[Tensor]) -> Callable[[], None]:
    from torchao.prototype.pat.optim import ProxGroupLassoVectorized

    prox = ProxGroupLassoVectorized(reg_lambda=1e-4, reduce_dim=1)
    rows = [tensor.flatten(1) for tensor in tensors]
    return lambda: [prox.apply_(row, 0.1) for row in rows]


def min_sparsity(tensors: list[Tensor]) -> Callable[[], None]:
    from torchao.prototype.pat.optim import MinSparsityConstraint

    return by_torchao(tensors, MinSparsityConstraint(0.0, min_sparsity=0.75), counts=True)


def by_torchao(tensors: list[Tensor], prox: Any, counts: bool) -> Callable[[], None]:
    """A prox map as torchao's PruneOptimizer applies it."""
    from torchao.prototype.pat.group import Dim0Grouper
    from torchao.prototype.pat.optim.prox_executor import apply_prox_to_param

    settings = {
        "gamma": 0.1,
        "gamma_index_slope": 0.0,
        "disable_vmap": False,
        "is_svd_grouper": False,
        "zero_elts_are_counts": counts,
    }
    return lambda: [apply_prox_to_param(t, prox, Dim0Grouper, {}, settings) for t in tensors]


TORCHAO = {
    "torchao 0.18, ProxGroupLasso as its optimizer applies it (vmap)": group_lasso,
    "torchao 0.18, ProxGroupLassoVectorized": group_lasso_vectorized,
    "torchao 0.18, MinSparsityConstraint (75 %)": min_sparsity,
}


@pytest.mark.parametrize("name", [f"this package, {HOMOTOPY}", *TORCHAO])
def test_prox_map(benchmark: Any, name: str) -> None:
    tensors = weights("ResNet18")
    originals = [tensor.clone() for tensor in tensors]
    texts = {"case": CASE, "name": "ResNet18, filter", "floor": "_foreach_norm and _foreach_mul_"}
    try:
        step = TORCHAO.get(name, ours)(tensors)
        step()
    except Exception as error:
        once(benchmark, lambda: None)
        failed = f"{name} does not run: {type(error).__name__}: {error}"
        add_row(benchmark, value=None, what=name, note=failed, **texts)
        return
    measured = Rounds(
        benchmark,
        {"step": step, "floor": floor(tensors)},
        before=lambda: torch._foreach_copy_(tensors, originals),
    )
    measured.row("step", "floor", what=name, **texts)


def test_lightning(benchmark: Any) -> None:
    from pytorch_lightning.callbacks import ModelPruning

    tensors = weights("ResNet18")
    originals = [tensor.clone() for tensor in tensors]
    pruning: list[Any] = []

    def fresh() -> None:
        torch._foreach_copy_(tensors, originals)
        modules = []
        for tensor in tensors:
            module = nn.Module()
            module.weight = nn.Parameter(tensor)
            modules.append(module)
        pruning[:] = [
            ModelPruning(
                "ln_structured",
                parameters_to_prune=[(module, "weight") for module in modules],
                use_global_unstructured=False,
                amount=0.75,
                pruning_dim=0,
                pruning_norm=2,
            )
        ]

    measured = Rounds(
        benchmark,
        {"step": lambda: pruning[0].apply_pruning(0.75), "floor": floor(tensors)},
        before=fresh,
    )
    measured.row(
        "step",
        "floor",
        case=CASE,
        name="ResNet18, filter",
        what="Lightning's ModelPruning, ln_structured, applied once",
        floor="_foreach_norm and _foreach_mul_",
        note="ModelPruning then multiplies by the mask in every forward pass, which is not in it.",
    )
