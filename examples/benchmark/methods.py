"""The methods that compete, each with the one number that is tuned for it.

All of them train for the same number of epochs, have half of them to become sparse, and meet the
same budget at that point: those without a budget of their own are cut to it there. The second half
fine-tunes what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from examples.benchmark.baselines.classical import AdaHSPG, GradualMagnitude
from examples.benchmark.baselines.rivals import (
    TorchPruning,
    magnitude_once,
    pat_lasso,
    pat_min_sparsity,
    smaller_network,
)
from examples.benchmark.method_api import Pruning, Situation
from lightning_wgsef import GroupLasso, HalfSpace, Homotopy, WGSEFCallback

FREEZE = 0.5
"""Share of training after which the mask is fixed."""


@dataclass(frozen=True)
class Method:
    """One competitor.

    Attributes:
        tuned: what ``values`` are.
        values: what is tried, the same number of them for every method.
        make: from a situation and one of the values.
        ours: is it one of this package's?
    """

    tuned: str
    values: tuple[float, ...]
    make: Callable[[Situation, float], Pruning]
    ours: bool = False


RATES = (0.5, 1.0, 2.0)
LASSO = (1e-3, 3e-3, 1e-2)
PENALTY = (3e-3, 3e-2, 3e-1)


def _callback(callback: pl.Callback) -> Pruning:
    return Pruning([callback])


def _wgsef(situation: Situation, grouping: Any, scope: str, **arguments: Any) -> Pruning:
    groups = situation.groups(grouping, scope=scope)
    return Pruning([WGSEFCallback(**groups, **arguments)], groups=groups)


def _ours() -> dict[str, Method]:
    """Four ways to weaken groups, times two groupings, times a budget a layer or one for all."""
    ways: dict[str, tuple[str, tuple[float, ...], Callable[[float], dict[str, Any]]]] = {
        "homotopy": ("start", (1e-5, 1e-4, 1e-3), lambda x: {"lam": Homotopy(x, FREEZE)}),
        "paper": ("lam", PENALTY, lambda x: {"lam": x, "freeze": FREEZE}),
        "paper, half-space": (
            "lam",
            PENALTY,
            lambda x: {"lam": x, "freeze": FREEZE, "half_space": HalfSpace(0.0, FREEZE / 2)},
        ),
        "unbiased": ("lam", PENALTY, lambda x: {"lam": x, "freeze": FREEZE, "debias": 1.0}),
    }
    methods = {}
    for way, (tuned, values, arguments) in ways.items():
        for kind in ("structure", "channel"):
            for scope in ("layer", "global"):
                grouping = None if kind == "structure" else kind

                def make(
                    situation: Situation,
                    value: float,
                    arguments: Any = arguments,
                    grouping: Any = grouping,
                    scope: str = scope,
                ) -> Pruning:
                    return _wgsef(situation, grouping, scope, **arguments(value))

                methods[f"{way}, {kind}, {scope}"] = Method(tuned, values, make, ours=True)
    for metric in ("auto", "group"):

        def in_metric(situation: Situation, value: float, metric: str = metric) -> Pruning:
            return _wgsef(situation, None, "layer", lam=Homotopy(value, FREEZE), metric=metric)

        methods[f"homotopy, structure, layer, metric {metric}"] = Method(
            "start", (1e-5, 1e-4, 1e-3), in_metric, ours=True
        )
    for weights in ("uniform", "size", "sqrt_size"):

        def by(situation: Situation, value: float, weights: str = weights) -> Pruning:
            lam = Homotopy(value, FREEZE)
            return _wgsef(situation, None, "global", lam=lam, weights=weights)

        name = f"homotopy, structure, global, weights {weights}"
        methods[name] = Method("start", (1e-5, 1e-4, 1e-3), by, ours=True)
    methods["homotopy by length, structure, layer"] = Method(
        "length",
        (0.3, 0.5, 0.7),
        lambda s, x: _wgsef(s, None, "layer", lam=Homotopy(length=x)),
        ours=True,
    )
    return methods


def _lasso(situation: Situation, value: float, half_space: HalfSpace | None) -> Pruning:
    return _wgsef(
        situation,
        None,
        "layer",
        lam=value,
        penalty=GroupLasso(),
        freeze=FREEZE,
        half_space=half_space,
    )


def _hesso(situation: Situation, value: float) -> Pruning:
    from examples.benchmark.baselines.hesso import hesso

    return hesso(situation, value, FREEZE)


METHODS: dict[str, Method] = {
    "dense": Method("learning rate", RATES, lambda s, x: Pruning(lr=x)),
    "small from scratch": Method(
        "learning rate", RATES, lambda s, x: Pruning(network=smaller_network(s), lr=x)
    ),
    "one-shot magnitude": Method("learning rate", RATES, lambda s, x: magnitude_once(s, x, FREEZE)),
    "gradual magnitude": Method(
        "length", (0.3, 0.4, 0.5), lambda s, x: _callback(GradualMagnitude(x, **s.groups()))
    ),
    "ProxSGD": Method("lam", LASSO, lambda s, x: _lasso(s, x, None)),
    "HSPG": Method("lam", LASSO, lambda s, x: _lasso(s, x, HalfSpace(0.9, FREEZE / 2))),
    "AdaHSPG+": Method("lam", LASSO, lambda s, x: _callback(AdaHSPG(x, **s.groups(freeze=FREEZE)))),
    "PAT, minimum sparsity": Method(
        "warm-up", (0.0, 0.1, 0.25), lambda s, x: pat_min_sparsity(s, x, FREEZE)
    ),
    "PAT, group lasso": Method("lam", LASSO, lambda s, x: pat_lasso(s, x, FREEZE)),
    "Torch-Pruning": Method(
        "reg", (1e-4, 1e-3, 1e-2), lambda s, x: TorchPruning(s, x, FREEZE).pruning()
    ),
    "HESSO": Method("start", (0.0, 0.1, 0.25), _hesso),
    **_ours(),
}
