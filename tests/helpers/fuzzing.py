"""Whole trainings drawn by hypothesis: what can vary, and how one is run."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_wgsef import Constant, CubicRamp, Homotopy, Warmup, WGSEFCallback
from lightning_wgsef.penalties.group_lasso import GroupLasso
from lightning_wgsef.training.half_space import HalfSpace
from tests.helpers.networks.fuzz import OPTIMIZERS, Network, fitting, groupings, named, networks
from tests.helpers.trainers import make_trainer

ARGUMENTS = set(inspect.signature(WGSEFCallback).parameters)
# Known: torch loads a number of NAdam's state in the precision of the weights, and the fused SGD
# of torch 2.13 on a CPU reads uninitialised memory at the first step in bfloat16.
BROKEN = {"nadam": ("64-true", "bf16-true"), "sgd fused": ("bf16-true",)}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true")


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        arguments: those of the callback.
        optimizer: a key of `OPTIMIZERS`.
        rates: learning rates; of two, one is that of the vectors.
        decays: does the learning rate fall at every step?
        clip: the norm that gradients are clipped to.
        batches, epochs: how long it is.
        log_every: batches between two logs.
        interrupt: the step after which a checkpoint is saved.
        stops: does the run that saved it end there?
    """

    network: Network = field(default_factory=lambda: Network("conv"))
    arguments: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "sgd"
    rates: tuple[float, ...] = (0.03,)
    decays: bool = False
    precision: str = "32-true"
    accumulate: int = 1
    clip: float | None = None
    batches: int = 4
    epochs: int = 2
    log_every: int = 1
    interrupt: int | None = None
    stops: bool = False

    @property
    def steps(self) -> int:
        """How many steps the optimizer takes."""
        return self.epochs * math.ceil(self.batches / self.accumulate)

    def freeze_step(self) -> tuple[int | None, bool]:
        """The step that fixes the mask (None: none does), and whether it may come earlier."""
        if "masks" in self.arguments:
            return 0, False
        freeze = self.arguments.get("freeze", "converged")
        lam = self.arguments.get("lam")
        early = freeze == "converged" and isinstance(lam, Constant | Warmup)
        if freeze is None:
            return None, early
        step = last_step(freeze, lam, self.steps)
        return (None if step > self.steps else step), early


def last_step(freeze: Any, lam: Any, steps: int) -> int:
    """The step at which the mask is fixed at the latest, or what leads up to it has ended."""
    if freeze is None:
        return steps
    if freeze == "converged":
        homotopy = lam if isinstance(lam, Homotopy) else Homotopy()
        freeze = 0.75 if isinstance(lam, Constant | Warmup) else homotopy.end
    return max(1, math.floor(freeze * steps + 0.5)) if isinstance(freeze, float) else freeze


class Fuzzed(pl.LightningModule):
    """A classifier of noise; remembers what was logged."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.net = training.network.build()
        if training.precision == "64-true":
            # Known: Lightning loads checkpoints before it converts the module, through float32.
            self.net.double()
        self.drawn = training
        self.logged: dict[int, dict[str, float]] = {}
        self.example_input_array = torch.ones(2, *training.network.shape)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def log(self, name: str, value: Any, *arguments: Any, **more: Any) -> None:
        step = self.trainer.fit_loop.total_batch_idx
        self.logged.setdefault(step, {})[name] = float(value)
        super().log(name, value, *arguments, **more)

    def configure_optimizers(self) -> Any:
        kind, settings = OPTIMIZERS[self.drawn.optimizer]
        parts = [list(self.parameters())]
        if len(self.drawn.rates) > 1:
            parts = [[p for p in parts[0] if (p.dim() > 1) is matrix] for matrix in (True, False)]
        rates = zip(parts, self.drawn.rates, strict=True)
        optimizer = kind([{"params": part, "lr": rate} for part, rate in rates], **settings)
        falling = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        schedule = {"scheduler": falling, "interval": "step"}
        return {"optimizer": optimizer} | ({"lr_scheduler": schedule} if self.drawn.decays else {})


class StoppedError(Exception):
    """A training is interrupted."""


class Save(pl.Callback):
    """Saves a checkpoint after some step, and may stop there."""

    def __init__(self, step: int, path: Path, stops: bool) -> None:
        self.step = step
        self.path = path
        self.stops = stops

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)
            if self.stops:
                raise StoppedError


@dataclass
class Run:
    """A training that ended."""

    model: Fuzzed
    trainer: Any
    callback: WGSEFCallback


def fit(training: Training, extra: Iterable[pl.Callback] = (), resume: Path | None = None) -> Run:
    """Train from the start, or from a checkpoint; raises what training raises."""
    model = Fuzzed(training)
    callback = WGSEFCallback(**training.arguments)
    trainer = make_trainer(
        [*extra, callback],
        max_epochs=training.epochs,
        precision=training.precision,
        accumulate_grad_batches=training.accumulate,
        gradient_clip_val=training.clip,
        log_every_n_steps=training.log_every,
    )
    trainer.fit(model, training.network.data(training.batches), ckpt_path=resume, weights_only=True)
    return Run(model, trainer, callback)


def shares() -> st.SearchStrategy[float]:
    return st.sampled_from((0.5, 0.25, 0.75, 0.1, 1.0)) | st.floats(0.01, 1)


def schedules(steps: int) -> st.SearchStrategy[Any]:
    lengths = st.integers(1, steps + 1) | shares()
    lams = st.sampled_from((1.0, 100.0, 10.0, 0.1, 0.0))
    return st.one_of(
        st.none(),
        st.builds(Homotopy, st.sampled_from((None, 1e-4, 0.1, 1.0)), lengths | st.none()),
        lams,
        st.builds(Constant, lams),
        st.builds(Warmup, lams, lengths),
    )


@st.composite
def callbacks(draw: Any, network: Network, steps: int) -> dict[str, Any]:
    """Arguments of the callback; what does not go together is drawn once in a while."""
    careless = draw(st.integers(0, 19)) == 13  # not at an end, which is drawn more often
    lam = draw(schedules(steps))
    homotopy = not isinstance(lam, Constant | Warmup)
    freezes = st.sampled_from(("converged", "converged", "converged", None))
    freeze = draw(freezes | st.integers(1, steps + 1) | shares())
    end = last_step(freeze, lam, steps)
    if not careless and isinstance(freeze, int | float) and isinstance(lam, Homotopy | Warmup):
        # Nothing ends after the mask is fixed.
        lam = replace(lam, length=1 if isinstance(lam, Warmup) else None)
    scope = draw(st.sampled_from(("layer", "layer", "layer", "global")))
    costs = draw(st.sampled_from((None, None, None, "params", "flops")))
    grouping = draw(groupings(network))
    # In n:m every few weights have a budget of their own; what stays in place has no size.
    if (costs or scope == "global") and not careless:
        stays = ("element", "filter_shape", "block") if costs else ()
        grouping = {
            name: "structure" if x.startswith(stays) and stays else "filter" if ":" in x else x
            for name, x in named(grouping).items()
        }
    budgets: st.SearchStrategy[Any] = st.floats(0.5, 1) if costs and not careless else shares()
    if careless or (scope == "layer" and not costs):
        budgets |= st.integers(1, 4 if careless else 1)
    if scope == "global" and not careless:
        budgets = st.floats(0.7, 1)
    elif careless or scope == "layer":
        budgets |= st.fixed_dictionaries({"*": budgets})
    lengths = st.integers(1, steps) | shares() if careless else st.integers(1, end)
    budgets |= st.builds(CubicRamp, budgets, lengths)
    metric = draw(st.sampled_from(("identity", "auto", "group")))
    if scope == "global" and not homotopy and not careless:
        metric = "identity"
    penalty = None
    if careless or (metric == "identity" and scope == "layer" and not homotopy):
        penalty = draw(st.sampled_from((None, None, GroupLasso())))
    debias = None
    if careless or (not homotopy and penalty is None):
        debias = draw(st.sampled_from((None, 1.0, 0.5, 0.0)))
    starts = st.integers(1, steps) | shares() if careless else st.integers(1, max(1, end - 1))
    half_space = st.builds(HalfSpace, st.sampled_from((0.0, 0.5)), starts)
    drawn = {
        "k": draw(budgets),
        "lam": lam,
        "grouping": grouping,
        "scope": scope,
        "weights": draw(st.sampled_from((None, "uniform", "size", "sqrt_size", "layer_norm"))),
        "costs": costs,
        "overlap": "error" if careless else "first",
        "debias": debias,
        "metric": metric,
        "penalty": penalty,
        "half_space": draw(st.none() | st.none() | half_space) if careless or end > 1 else None,
        "masks": draw(st.sampled_from((None, None, "from_zeros"))) if network.zeros else None,
        "freeze": freeze,
    }
    if drawn["masks"] and not careless:  # nothing is left to find
        idle = ("k", "lam", "debias", "metric", "penalty", "half_space")
        drawn |= {**dict.fromkeys(idle), "freeze": "converged"}
    if all(re.fullmatch(r"\d+:\d+", str(x)) for x in named(grouping).values()) and not careless:
        drawn["k"] = None  # the name says it
    return {name: value for name, value in drawn.items() if value is not None or name == "freeze"}


@st.composite
def trainings(draw: Any) -> Training:
    """Any training."""
    network = draw(networks())
    rates = st.sampled_from((0.03, 0.003, 0.1))
    precision = draw(st.sampled_from(PRECISIONS))
    optimizer = draw(st.sampled_from(tuple(OPTIMIZERS)))
    if precision in BROKEN.get(optimizer, ()):
        precision = "32-true"
    # Lightning refuses to clip where a fused step unscales gradients by itself.
    clips = not (precision == "bf16-mixed" and "fused" in optimizer)
    shape = {
        "accumulate": draw(st.integers(1, 3)),
        "batches": draw(st.integers(1, 9)),
        "epochs": draw(st.integers(1, 4)),
    }
    steps = Training(**shape).steps
    arguments = draw(callbacks(network, steps))
    return Training(
        network=draw(st.sampled_from((*[fitting(network, arguments)] * 3, network))),
        arguments=arguments,
        optimizer=optimizer,
        rates=draw(st.tuples(rates) | st.tuples(rates, rates)),
        decays=draw(st.booleans()),
        precision=precision,
        clip=draw(st.sampled_from((None, 0.1))) if clips else None,
        log_every=draw(st.integers(1, 3)),
        interrupt=draw(st.none() | st.integers(1, steps)),
        stops=draw(st.booleans()),
        **shape,
    )


def owners_of(layer: Any, names: dict[int, str]) -> Iterator[tuple[str, Tensor]]:
    """For every parameter of the layer the group of each of its weights, -1 for none."""
    for member in layer.members:
        numbers = member.along(torch.arange(layer.count), -1)
        shape = member.parameter.shape
        yield names[id(member.parameter)], numbers.expand(member.extent).reshape(shape)


def same(first: Any, second: Any) -> bool:
    """The same numbers, bit for bit, in the same places."""
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[x], second[x]) for x in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)


def refused(training: Training, error: ValueError, steps: int) -> str:
    """What of a message that names an argument stays the same; nothing was trained before."""
    assert type(error) is ValueError
    assert steps == 0
    named = {x for x in ARGUMENTS if re.search(rf"\b{x}\b", str(error))}
    assert named & ({"include", "exclude", "k"} | set(training.arguments)), str(error)
    return f"refused: {re.sub('[^a-z ]+', '*', str(error).splitlines()[0])[:70]}"
