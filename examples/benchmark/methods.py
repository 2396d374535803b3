"""The methods that compete, each with the one number that is tuned for it.

All of them train for the same number of epochs, have the same share of them to become sparse, and
meet the same budget at that point: those without a budget of their own are cut to it there. The
rest of training fine-tunes what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytorch_lightning as pl

from examples.benchmark.baselines.classical import AdaHSPG, GradualMagnitude, smaller_network
from examples.benchmark.baselines.lightning_pruning import magnitude_once
from examples.benchmark.baselines.n_of_m import SRSTE, MagnitudeOnce
from examples.benchmark.baselines.pat import pat_global, pat_lasso, pat_min_sparsity
from examples.benchmark.baselines.torch_pruning import TorchPruning
from examples.benchmark.method_api import Pruning, Situation
from examples.benchmark.suite import Task
from lightning_wgsef import Constant, GroupLasso, HalfSpace, Homotopy, WGSEFCallback, prune
from lightning_wgsef.training.schedules import in_steps


@dataclass(frozen=True)
class Method:
    """One competitor.

    Attributes:
        tuned: what ``values`` are.
        values: what is tried, the same number of them for every method.
        make: from a situation and one of the values.
        ours: is it one of this package's?
        until_freeze: are ``values`` shares of the time until the freeze? What is tried then are
            shares of training.
    """

    tuned: str
    values: tuple[float, ...]
    make: Callable[[Situation, float], Pruning]
    ours: bool = False
    until_freeze: bool = False

    def tried(self, task: Task) -> tuple[float, ...]:
        """The values that are tried on a task."""
        scale = task.freeze if self.until_freeze else 1.0
        return tuple(value * scale for value in self.values)


RATES = (0.5, 1.0, 2.0)
LASSO = (1e-3, 3e-3, 1e-2)
PENALTY = (3e-3, 3e-2, 3e-1)
START = (1e-5, 1e-4, 1e-3)


def _callback(callback: pl.Callback) -> Pruning:
    return Pruning([callback])


def _wgsef(situation: Situation, grouping: Any, scope: str, **arguments: Any) -> Pruning:
    of_groups = {name: arguments.pop(name) for name in ("costs", "weights") if name in arguments}
    groups = situation.groups(grouping, scope=scope, **of_groups)
    return Pruning([WGSEFCallback(**groups, **arguments)], groups=groups)


def _homotopy(situation: Situation, start: float) -> dict[str, Any]:
    return {"lam": Homotopy(start, situation.task.freeze)}


@dataclass(frozen=True)
class Late(Homotopy):
    """A homotopy that begins after a share of training, in which importances are measured.

    Attributes:
        begin: that share.
    """

    begin: float = 0.15

    def step_size(self, taken: int, total: int | None, lr: Any) -> Any:
        """Nothing before it begins."""
        before = self._before(total)
        own = Homotopy(self.start, self.steps(total) - before)
        return own.step_size(taken - before, total, lr) if taken >= before else 0.0

    def left(self, taken: int, total: int | None) -> float:
        """All groups before it begins."""
        before = self._before(total)
        own = Homotopy(self.start, self.steps(total) - before)
        return own.left(taken - before, total) if taken >= before else 1.0

    def _before(self, total: int | None) -> int:
        return in_steps("begin", self.begin, total)


def _late(situation: Situation, start: float) -> dict[str, Any]:
    return {"lam": Late(start, situation.task.freeze)}


def _constant(situation: Situation, lam: float, **arguments: Any) -> dict[str, Any]:
    return {"lam": Constant(lam), "freeze": situation.task.freeze, **arguments}


def _half_space(situation: Situation, epsilon: float) -> HalfSpace:
    return HalfSpace(epsilon, situation.task.freeze / 2)


Way = Callable[[Situation, float], dict[str, Any]]


def _ours() -> dict[str, Method]:
    """Four ways to weaken groups, times two groupings, times a budget a layer or one for all."""
    ways: dict[str, tuple[str, tuple[float, ...], Way]] = {
        "homotopy": ("start", START, _homotopy),
        "paper": ("lam", PENALTY, _constant),
        "paper, half-space": (
            "lam",
            PENALTY,
            lambda s, x: _constant(s, x, half_space=_half_space(s, 0.0)),
        ),
        "unbiased": ("lam", PENALTY, lambda s, x: _constant(s, x, debias=1.0)),
    }

    def method(
        tuned: str, values: tuple[float, ...], way: Way, kind: str, scope: str, **more: Any
    ) -> Method:
        grouping = None if kind == "structure" else kind
        return Method(
            tuned, values, lambda s, x: _wgsef(s, grouping, scope, **way(s, x), **more), ours=True
        )

    methods = {
        f"{name}, {kind}, {scope}": method(tuned, values, way, kind, scope)
        for name, (tuned, values, way) in ways.items()
        for kind in ("structure", "channel")
        for scope in ("layer", "global")
    }
    for metric in ("auto", "group"):
        more = {"metric": metric}
        methods[f"homotopy, structure, layer, metric {metric}"] = method(
            "start", START, _homotopy, "structure", "layer", **more
        )
        # D is of the size of gradients, so that the same lam weighs more.
        methods[f"paper, structure, layer, metric {metric}"] = method(
            "lam", (1e-4, 1e-3, 1e-2), _constant, "structure", "layer", **more
        )
    for weights in ("uniform", "size", "sqrt_size"):
        methods[f"homotopy, structure, global, weights {weights}"] = method(
            "start", START, _homotopy, "structure", "global", weights=weights
        )
    for name, way, weights in (
        ("layer_norm", _homotopy, "layer_norm"),
        ("taylor", _homotopy, "taylor"),
        ("fisher", _homotopy, "fisher"),
        ("taylor, from 15 %", _late, "taylor"),
    ):
        more = {"costs": "flops", "weights": weights}
        methods[f"homotopy, structure, flops, {name}"] = method(
            "start", START, way, "structure", "global", **more
        )
    methods["homotopy by length, structure, layer"] = method(
        "length", (0.3, 0.5, 0.7), lambda s, x: {"lam": Homotopy(length=x)}, "structure", "layer"
    )
    return methods


def _pruned_first(situation: Situation, lr: float) -> Pruning:
    """`prune` before training, which has all epochs for what is left."""
    groups = situation.groups(scope="global", costs="flops")
    batches = islice(situation.batches, 16)
    options = {name: groups[name] for name in ("grouping", "exclude")}
    small = prune(situation.network, batches, groups["k"], **options).train()
    return Pruning(network=small, lr=lr, groups=groups)


def _lasso(situation: Situation, value: float, half_space: HalfSpace | None) -> Pruning:
    arguments = _constant(situation, value, penalty=GroupLasso(), half_space=half_space)
    return _wgsef(situation, None, "layer", **arguments)


def _hesso(situation: Situation, value: float) -> Pruning:
    from examples.benchmark.baselines.hesso import hesso

    return hesso(situation, value)


METHODS: dict[str, Method] = {
    "dense": Method("learning rate", RATES, lambda s, x: Pruning(lr=x)),
    "small from scratch": Method(
        "learning rate", RATES, lambda s, x: Pruning(network=smaller_network(s), lr=x)
    ),
    "prune, then train": Method("learning rate", RATES, _pruned_first, ours=True),
    "one-shot magnitude": Method("learning rate", RATES, magnitude_once),
    "one-shot magnitude, n:m": Method(
        "learning rate",
        RATES,
        lambda s, x: Pruning([MagnitudeOnce(s.task.freeze, **s.groups())], lr=x),
    ),
    "SR-STE": Method(
        "lambda_W", (5e-5, 2e-4, 8e-4), lambda s, x: _callback(SRSTE(x, **s.groups()))
    ),
    "gradual magnitude": Method(
        "length",
        (0.6, 0.8, 1.0),
        lambda s, x: _callback(GradualMagnitude(x, **s.groups())),
        until_freeze=True,
    ),
    "ProxSGD": Method("lam", LASSO, lambda s, x: _lasso(s, x, None)),
    "HSPG": Method("lam", LASSO, lambda s, x: _lasso(s, x, _half_space(s, 0.9))),
    "AdaHSPG+": Method(
        "lam", LASSO, lambda s, x: _callback(AdaHSPG(x, **s.groups(freeze=s.task.freeze)))
    ),
    "PAT, minimum sparsity": Method("warm-up", (0.0, 0.1, 0.25), pat_min_sparsity),
    "PAT, global": Method("warm-up", (0.0, 0.1, 0.25), pat_global),
    "PAT, group lasso": Method("lam", LASSO, pat_lasso),
    "Torch-Pruning": Method("reg", (1e-4, 1e-3, 1e-2), lambda s, x: TorchPruning(s, x).pruning()),
    "HESSO": Method("start", (0.0, 0.1, 0.25), _hesso),
    **_ours(),
}
