"""Options of a run: every argument of the regularizer, declared, documented and checked once."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypedDict

from typing_extensions import Unpack

from lightning_wgsef.groupings.budget import DEFAULT_K, Budget, measure_of
from lightning_wgsef.groupings.costs import Costs
from lightning_wgsef.groupings.group_parameters import check_arguments, group_parameters
from lightning_wgsef.groupings.registry import DEFAULT_GROUPING, Grouping
from lightning_wgsef.groupings.weights import MEASURED, Weights
from lightning_wgsef.groupings.width_limits import Bound, Multiple
from lightning_wgsef.penalties.base import Penalty
from lightning_wgsef.penalties.envelope import Envelope
from lightning_wgsef.training.freezing import check_freeze, check_order
from lightning_wgsef.training.half_space import HalfSpace, as_half_space
from lightning_wgsef.training.proximal_step import check_step
from lightning_wgsef.training.schedules import CubicRamp, Schedule, as_schedule, resolve_debias


class PruningOptions(TypedDict, total=False):
    """Keywords of `WGSEF` beside k, lam and grouping; all of them may be left out.

    Attributes:
        scope: see `group_parameters`, as for weights, costs, example_input, overlap, include and
            exclude.
        weights: what makes a group strong; None: "taylor" where all layers compete for one size of
            the slim network in the metric "identity", else as in `group_parameters`.
        costs: what a group costs.
        example_input: for what follows a forward pass.
        overlap: what happens to a layer that claims weights of one before it.
        include: patterns of layer names; only these are grouped.
        exclude: patterns of layer names that are left out.
        multiple_of: of what number of channels the widths that stay are multiples.
        at_least: how many groups of every layer stay at least.
        at_most: how many stay at most.
        debias: the share of the ridge that is taken back from the weights that stay, in [0, 1];
            None: the schedule's own (0 for the paper's, 1 for `Homotopy`).
        metric: in which metric the step is taken: "identity"; "auto", the diagonal one that the
            optimizer steps in (Adam's square root, see `preconditioner` and `prox_metric`); or
            "group", its mean over every group.
        penalty: `Envelope` (None), or `GroupLasso` to compare with.
        half_space: a `HalfSpace`, or its epsilon: groups that turn round are projected to zero.
        freeze: when the mask is fixed: "converged" (at the end of a `Homotopy`; otherwise when the
            budget is kept and the live groups no longer change, at three quarters of training at
            the latest), a number of steps (int) or a share of training (float), or None (never).
            At a given or latest step the weights are projected onto the budget.
        masks: "from_zeros": keep the zero groups that the model already has, from the first step;
            a path: those of a checkpoint; None: find them. There is nothing to find then: k, lam,
            debias, metric, half_space and freeze are refused beside masks. Where no grouping is
            named beside it, it is the one that the checkpoint says; where none does, "channel" if
            that explains every zero, else single weights: all that are zero stay zero.
    """

    scope: Literal["layer", "global"]
    weights: Weights
    costs: Costs
    example_input: Any | None
    overlap: Literal["error", "first"]
    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    multiple_of: Multiple
    at_least: Bound
    at_most: Bound
    debias: float | None
    metric: Literal["auto", "group", "identity"]
    penalty: Penalty | None
    half_space: float | HalfSpace | None
    freeze: Literal["converged"] | int | float | None
    masks: str | Path | None


DEFAULTS: PruningOptions = {
    "scope": "layer",
    "weights": None,
    "costs": None,
    "example_input": None,
    "overlap": "error",
    "include": None,
    "exclude": None,
    "multiple_of": 1,
    "at_least": None,
    "at_most": None,
    "debias": None,
    "metric": "identity",
    "penalty": None,
    "half_space": None,
    "freeze": "converged",
    "masks": None,
}

ARGUMENTS = ("k", "lam", "grouping", *DEFAULTS)

# What `group_parameters` takes of them.
_OF_GROUPS = DEFAULTS.keys() & signature(group_parameters).parameters.keys()


class Settings:
    """The arguments of one run, with their defaults, checked as far as that needs no model.

    Attributes:
        options: every option, as it was given or by default.
        grouping: the arguments of `group_parameters`.
        is_named: was a grouping named? "channel" otherwise.
        schedule: what lam stands for.
        ramp: of the budget; None where it is the same from the start.
        debias: what debias stands for.
        penalty: what penalty stands for.
        half_space: what half_space stands for.
        importance: "taylor" or "fisher" where the weights are measured from gradients; else None.

    Raises:
        ValueError: an argument that no model could make right.
        TypeError: an option that is none.

    >>> Settings(lam=0.1, metric="auto").schedule
    Homotopy(start=None, length=None, lam=0.1)
    >>> Settings(metrik="auto")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    TypeError: WGSEF() got an unexpected keyword argument 'metrik'; its options are scope, ...
    """

    def __init__(
        self,
        k: Budget | CubicRamp = DEFAULT_K,
        lam: float | Schedule | None = None,
        grouping: Grouping | None = None,
        **given: Unpack[PruningOptions],
    ) -> None:
        for name in given.keys() - DEFAULTS.keys():
            raise TypeError(
                f"WGSEF() got an unexpected keyword argument {name!r}; its options are "
                f"{', '.join(DEFAULTS)}"
            )
        self.options: PruningOptions = {**DEFAULTS, **given}
        options = self.options
        self.ramp = k if isinstance(k, CubicRamp) else None
        self.grouping: dict[str, Any] = {name: options[name] for name in _OF_GROUPS}  # type: ignore[literal-required]
        self.is_named = grouping is not None
        grouping = DEFAULT_GROUPING if grouping is None else grouping
        self.grouping |= {"grouping": grouping, "k": k.k if isinstance(k, CubicRamp) else k}
        check_arguments(**self.grouping)
        if options["masks"] is not None:
            _check_masks_alone(k, lam, options)
            self.grouping["k"] = 1.0  # what is alive then is the budget
        check_freeze(options["freeze"])
        self.penalty = Envelope() if options["penalty"] is None else options["penalty"]
        has_budget = isinstance(self.penalty, Envelope)
        self.schedule = as_schedule(lam, options["freeze"], has_budget)
        self.debias = resolve_debias(options["debias"], self.schedule)
        check_step(options["metric"], self.penalty, self.schedule, self.debias, options["scope"])
        if _competes_for_a_size(self.grouping, options):
            self.grouping["weights"] = "taylor"
        weights = self.grouping["weights"]
        self.importance = weights if isinstance(weights, str) and weights in MEASURED else None
        if self.importance is not None and options["metric"] != "identity":
            raise ValueError(
                f"metric must be 'identity' with weights={weights!r}, which say what a squared "
                f"norm is worth, got {options['metric']!r}"
            )
        self.half_space = as_half_space(options["half_space"])
        check_order(options["freeze"], self.schedule, self.ramp, self.half_space)


def _competes_for_a_size(grouping: dict[str, Any], options: PruningOptions) -> bool:
    """Return whether layers compete for a size, and nobody says what makes them comparable."""
    if options["masks"] is not None or options["metric"] != "identity":
        return False
    sized = measure_of(grouping["k"], grouping["costs"]) is not None
    return sized and grouping["scope"] == "global" and grouping["weights"] is None


def _check_masks_alone(
    k: Budget | CubicRamp, lam: float | Schedule | None, options: PruningOptions
) -> None:
    """Raise `ValueError` for arguments by which masks are found, where they are given."""
    given = {"k": k, "lam": lam, **options}
    defaults = {"k": DEFAULT_K, "lam": None, **DEFAULTS}
    searching = ("k", "lam", "debias", "metric", "half_space", "freeze")
    idle = {name: given[name] for name in searching if given[name] != defaults[name]}
    if idle:
        named = ", ".join(f"{name}={value!r}" for name, value in idle.items())
        raise ValueError(
            f"masks={options['masks']!r} says which groups stay; {named} would not be used: leave "
            f"out {', '.join(idle)}, or masks"
        )
