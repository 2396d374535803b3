"""Whole trainings of random networks: what has to hold in every one of them.

FUZZ=500 trains more networks, other ones every time, than CI has time for.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import HealthCheck, Phase, event, given, reject, settings
from torch import Tensor

from lightning_wgsef import WGSEF, Groups, Homotopy, WGSEFCallback
from lightning_wgsef.training import freezing, pruner
from lightning_wgsef.training.proximal_step import ProximalStep
from tests.helpers.fuzzing import (
    Fuzzed,
    Run,
    Save,
    StoppedError,
    Training,
    fit,
    owners_of,
    refused,
    same,
    trainings,
)
from tests.helpers.networks.fuzz import Network

EXAMPLES = int(os.environ.get("FUZZ", "50"))
EXPECTED = (
    "lam = .* had not reached the budget",
    "training ended before the mask was frozen",
    "metric='auto' scales weights one by one",
    "all groups of .* have faded",
    ".* steps to reach the budget",
    ".* fixes the mask at step",
    ".* zero weights of .* are in no zero group",  # a row and a column are zero
    ".* zero as a whole, and kept so",
)
pytestmark = pytest.mark.filterwarnings(*(f"ignore:{message}" for message in EXPECTED))


class Watcher(pl.Callback):
    """Looks at the weights before and after everything that is done to them.

    Its hook on the optimizer is called before the callback's, which comes later in the Trainer.

    Attributes:
        steps: how many steps were taken.
        masks: what was alive at the freeze; None before it.
        frozen_at: the step of the freeze.
    """

    def __init__(self, training: Training, steps: int = 0, masks: Any = None) -> None:
        self.training = training
        self.steps = steps
        self.masks = masks
        self.frozen_at: int | None = None
        self.before: dict[str, Tensor] | None = None

    def on_train_start(self, trainer: Any, module: Fuzzed) -> None:
        callbacks = (x for x in trainer.callbacks if isinstance(x, WGSEFCallback))
        self.regularizer = next(callbacks).regularizer
        self.optimizer = trainer.optimizers[0]
        self.parameters = dict(module.named_parameters())
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.optimizer.register_step_post_hook(self.on_step)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.masks is None and self.regularizer.frozen:  # masks were given
            assert self.steps == 0
            self.frozen_at = 0
            self.masks = {name: mask.clone() for name, mask in self.regularizer.masks.items()}
            dead, _ = self.split(self.masks)
            assert all(bool((p[dead[name]] == 0).all()) for name, p in self.parameters.items())

    def on_step(self, *_: Any) -> None:
        self.steps += 1
        self.before = {name: p.detach().clone() for name, p in self.parameters.items()}

    def on_train_batch_end(self, *_: Any) -> None:
        if self.before is None:  # gradients are accumulated
            return
        regularizer = self.regularizer
        dead, grouped = self.split(regularizer.masks if regularizer.frozen else {})
        for name, parameter in self.parameters.items():
            old, new = self.before[name], parameter.detach()
            assert bool(new.isfinite().all()), name
            assert torch.equal(new[~grouped[name]], old[~grouped[name]]), name
            assert bool((new.abs() <= old.abs()).all()), name
            assert bool((new * old >= 0).all()), name
            assert new[dead[name]].count_nonzero() == 0, name
            if self.masks is not None:
                assert torch.equal(new[~dead[name]], old[~dead[name]]), name
        if self.masks is not None:
            assert regularizer.frozen
            assert same(regularizer.masks, self.masks)
        elif regularizer.frozen:
            self.masks = {name: mask.clone() for name, mask in regularizer.masks.items()}
            self.frozen_at = self.steps
            self.check_freeze(dead)
        self.before = None

    def freeze(self) -> str:
        """When the mask was fixed, in words."""
        words = {self.training.freeze_step()[0]: "frozen", 0: "frozen from the start"}
        return (words | {None: "never frozen"}).get(self.frozen_at, "converged")

    def split(self, masks: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Which weights are in a dead group, and which are in any, by parameter."""
        dead = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in self.parameters.items()}
        grouped = {name: nothing.clone() for name, nothing in dead.items()}
        for layer in self.regularizer.groups.layers:
            for name, owners in owners_of(layer, self.names):
                grouped[name] |= owners >= 0
                if layer.name in masks:
                    gone = torch.cat([~masks[layer.name], torch.tensor([False])])
                    dead[name] |= gone[owners]
        return dead, grouped

    def check_freeze(self, dead: dict[str, Tensor]) -> None:
        """The budget is kept, and the optimizer remembers nothing of dead weights."""
        last, early = self.training.freeze_step()
        at_last = self.frozen_at == last
        assert at_last or (early and self.frozen_at < last)
        live = {}
        for layer in self.regularizer.groups.layers:
            live[layer.name] = torch.zeros(layer.count + 1, dtype=torch.bool)
            for name, owners in owners_of(layer, self.names):
                live[layer.name][owners[self.before[name] != 0]] = True
            live[layer.name] = live[layer.name][:-1]
        check_budgets(self.regularizer.groups, self.masks, live, exact=at_last)
        for name, parameter in self.parameters.items():
            for moment in self.optimizer.state.get(parameter, {}).values():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                    assert moment[dead[name]].count_nonzero() == 0, name


def check_budgets(
    groups: Groups, masks: dict[str, Tensor], live: dict[str, Tensor], *, exact: bool
) -> None:
    """Only live groups stay, no more than the budget, and if ``exact`` no fewer."""
    for name, was in live.items():
        assert not bool((masks[name] & ~was).any())
        assert not exact or bool(masks[name].any()) == bool(was.any())
    if groups.is_global and groups.size is not None:
        mask = torch.cat([masks[x.name] for x in groups.layers])
        assert float(groups.size.of(mask)) <= float(groups.budgets) * (1 + 1e-9)
        return
    parts = [(x.budget, x.costs, x.m or x.count, [x.name]) for x in groups.layers]
    if groups.is_global:
        parts = [(float(groups.budgets), groups.costs, len(groups), list(live))]
    for budget, costs, row, names in parts:
        kept, was = (torch.cat([of[x] for x in names]).view(-1, row) for of in (masks, live))
        spent = (kept if costs is None else costs * kept).sum(1)
        assert bool((spent <= budget * (1 + 1e-6)).all())
        if exact and costs is None:
            # The strongest group of every layer has its place, even if it is zero.
            places = int(budget) - sum(not bool(live[name].any()) for name in names)
            assert torch.equal(spent, was.sum(1).clamp(max=places))


def check_end(run: Run, watcher: Watcher) -> None:
    training = watcher.training
    assert watcher.steps == training.steps == run.trainer.global_step
    assert list(run.model.state_dict()) == list(Fuzzed(training).state_dict())
    assert (watcher.masks is None) == (training.freeze_step()[0] is None)
    names = {frozenset(numbers) for numbers in run.model.logged.values()}
    assert len(names) == 1, names
    assert {"wgsef/sparsity", "wgsef/value", "wgsef/gap", "wgsef/frozen"} < next(iter(names))
    assert all(math.isfinite(x) for numbers in run.model.logged.values() for x in numbers.values())


def check_resumed(run: Run, whole: Run) -> None:
    assert same(run.model.state_dict(), whole.model.state_dict())
    optimizer, expected = (x.trainer.optimizers[0].state_dict() for x in (run, whole))
    assert same(optimizer, expected)
    assert same(run.callback.state_dict(), whole.callback.state_dict())


def check(training: Training) -> str:
    """Train, interrupt, resume; returns what became of it."""
    watcher = Watcher(training)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.ckpt"
        saves = training.interrupt is not None and not training.stops
        save = [Save(training.interrupt, path, False)] if saves else []
        try:
            whole = fit(training, [watcher, *save])
        except ValueError as error:
            return refused(training, error, watcher.steps)
        check_end(whole, watcher)
        outcome = "trained, " + watcher.freeze()
        if training.interrupt is None:
            return outcome
        if training.stops:
            with pytest.raises(StoppedError):
                fit(training, [Watcher(training), Save(training.interrupt, path, True)])
        saved = torch.load(path, weights_only=True)
        assert list(saved["state_dict"]) == list(whole.model.state_dict())
        was_frozen = watcher.frozen_at is not None and training.interrupt >= watcher.frozen_at
        masks = watcher.masks if was_frozen else None
        resumed_watcher = Watcher(training, training.interrupt, masks)
        resumed = fit(training, [resumed_watcher], resume=path)
    check_resumed(resumed, whole)
    if training.interrupt < training.steps:
        check_end(resumed, resumed_watcher)
    return f"{outcome}, resumed {'after' if was_frozen else 'before'} it"


@pytest.fixture(autouse=True)
def _looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of the convergence are 50 steps apart, which is longer than these trainings."""
    monkeypatch.setattr(pruner, "CHECK_EVERY", 2)
    monkeypatch.setattr(freezing, "PATIENCE", 1)


def test_whole_trainings(capsys: Any) -> None:
    counts: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="FUZZ" not in os.environ,
        phases=set(Phase) - {Phase.explain},
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(trainings())
    def run(training: Training) -> None:
        outcome = check(training)
        event(outcome)
        counts[outcome] += 1
        if outcome.startswith("refused"):
            reject()  # no example, so that none is drawn like it

    run()
    trained = sum(count for outcome, count in counts.items() if outcome.startswith("trained"))
    if "FUZZ" in os.environ:
        with capsys.disabled():
            print(f"\n{trained} of {counts.total()} were trained")
            print(*(f"{count:5} {outcome}" for outcome, count in counts.most_common()), sep="\n")
    assert trained >= EXAMPLES, counts


SOUND = Training(
    Network("conv", 6, 6, "batch"),
    {"k": 0.5, "lam": Homotopy(1e-4)},
    "adam",
    precision="bf16-true",
    interrupt=2,
)
FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any], str]] = {
    "moments are kept": (pruner, "clear_moments", lambda _: lambda *_: None, "check_freeze"),
    "the dead live": (pruner, "apply_masks", lambda _: lambda *_: None, "on_train_batch_end"),
    "live weights are touched": (
        pruner,
        "apply_masks",
        lambda _: lambda groups, masks: groups.scale_(torch.cat([*masks.values()]) * 0.9),
        "on_train_batch_end",
    ),
    "one group too many is kept": (
        ProximalStep,
        "survivors",
        lambda right: lambda step, norms, budgets: right(step, norms, budgets + 1),
        "check_budgets",
    ),
    "a resumed run counts from 0": (
        pruner.Pruner,
        "load_state_dict",
        lambda right: lambda part, state: right(part, {**state, "taken": 0}),
        "check_freeze",
    ),
    "a resumed run forgets shrinkage below the precision": (
        pruner.Pruner,
        "load_state_dict",
        lambda right: lambda part, state: right(part, {**state, "remainder": None}),
        "check_resumed",
    ),
    "names of metrics change": (
        WGSEF,
        "metrics",
        lambda right: lambda x: {**right(x), f"frozen is {x.frozen}": torch.zeros(())},
        "check_end",
    ),
}
"""What is replaced by what, and which check finds it."""


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, finder = FAULTS[fault]
    assert check(SOUND) == "trained, frozen, resumed before it"
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    with pytest.raises(AssertionError) as caught:
        check(SOUND)
    assert caught.traceback[-1].name == finder
