"""Everything about arguments that can be checked before there is a model."""

from __future__ import annotations

from typing import Any

from lightning_wgsef.groupings.budget import check_budget
from lightning_wgsef.groupings.costs import check_costs
from lightning_wgsef.groupings.group_parameters import check_overlap
from lightning_wgsef.groupings.registry import check_grouping
from lightning_wgsef.groupings.weights import check_weights
from lightning_wgsef.penalties.envelope import Envelope
from lightning_wgsef.training.freezing import check_freeze
from lightning_wgsef.training.half_space import as_half_space
from lightning_wgsef.training.proximal_step import check_step
from lightning_wgsef.training.schedules import CubicRamp, as_schedule, resolve_debias


def check_arguments(**arguments: Any) -> None:
    """Raise `ValueError` for an argument of `WGSEF` that no model could make right."""
    k, scope, penalty = arguments["k"], arguments["scope"], arguments["penalty"]
    check_budget(k.k if isinstance(k, CubicRamp) else k, scope)
    check_grouping(arguments["grouping"])
    check_weights(arguments["weights"])
    check_overlap(arguments["overlap"])
    check_costs(arguments["costs"])
    check_freeze(arguments["freeze"])
    schedule = as_schedule(arguments["lam"])
    debias = resolve_debias(arguments["debias"], schedule)
    penalty = Envelope() if penalty is None else penalty
    check_step(arguments["metric"], penalty, schedule, debias, scope)
    as_half_space(arguments["half_space"])
