"""What happens after every step of one optimizer: the proximal step, and later the mask."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_wgsef.penalties.base import Penalty
from lightning_wgsef.penalties.envelope import Envelope
from lightning_wgsef.training.checkpointing import check_state
from lightning_wgsef.training.freezing import Convergence
from lightning_wgsef.training.half_space import HalfSpace, inside_half_space
from lightning_wgsef.training.masks import Masks, apply_masks, clear_moments
from lightning_wgsef.training.proximal_step import ProximalStep
from lightning_wgsef.training.schedules import CubicRamp, Schedule, in_steps
from lightning_wgsef.training.scope import value_and_gap


def warn_of_cut(cut: Mapping[str, int], taken: int, penalty: Penalty, schedule: Schedule) -> None:
    """Say how many groups of every layer were cut to keep the budget, if any."""
    if any(cut.values()):
        homotopy = _with_budget(penalty, ", lam=Homotopy(), which arrives without a jump,")
        warnings.warn(
            f"lam = {schedule} had not reached the budget by step {taken}, three quarters of "
            f"training: the weakest groups were cut to keep it {dict(cut)}. Try a larger lam"
            f"{homotopy} or an earlier freeze=",
            stacklevel=3,
        )


def warn_of_collapse(names: Sequence[str], penalty: Penalty, schedule: Schedule) -> None:
    """Say which layers fade as a whole."""
    others = _with_budget(penalty, ", debias=1.0 or lam=Homotopy()")
    warnings.warn(
        f"all groups of {', '.join(names)} have faded to less than a thousandth of their norm at "
        f"the start under lam = {schedule}: nothing holds them up against the penalty (common "
        f"behind a norm). Try a smaller lam{others}",
        stacklevel=3,
    )


def warn_of_other_budget(asked: float, saved: float) -> None:
    """Say that a run that is resumed keeps the budgets that it had."""
    warnings.warn(
        f"k stands for {asked:g} groups now, but the saved run goes on with its own {saved:g}. For "
        "another k start a new fit from the checkpoint's weights, without ckpt_path",
        stacklevel=3,
    )


def _with_budget(penalty: Penalty, advice: str) -> str:
    """Advice that the group lasso, which knows no budget, cannot follow."""
    return advice if isinstance(penalty, Envelope) else ""


# Steps between two checks that need numbers on the host: convergence, collapse, finite weights.
CHECK_EVERY = 50

_LATEST = 0.75
"""Share of training at which a mask that has not converged is fixed: the budget is a promise."""

_COLLAPSED = 1e-3

_MEASURED = ("weights", "costs", "budgets")


class Pruner:
    """The groups that one optimizer trains, and where they are on their way to the budget.

    Args:
        step: the proximal step, with the groups and the optimizer that trains all their members.
        freeze: "converged", a number of steps, a share of training, or None (never).
        ramp: how the budgets fall to those of the groups; None: they are those from the start.
        half_space: the projection that follows the step; None: none does.
        masks: masks to keep from the start.

    Raises:
        ValueError: a share of training of unknown length.
    """

    def __init__(
        self,
        step: ProximalStep,
        *,
        freeze: str | int | float | None,
        ramp: CubicRamp | None = None,
        half_space: HalfSpace | None = None,
        masks: Masks | None = None,
    ) -> None:
        self.step = step
        self.groups = step.groups
        self.optimizer = step.optimizer
        self.total_steps = step.total_steps
        self.taken = 0
        self.masks = masks
        self._waits = freeze == "converged" and not step.schedule.homotopy
        self._freeze_at: int | None = None
        self._ramp = ramp
        self._half_space = half_space
        self._half_space_from = 0
        self._before: dict[str, Tensor] = {}
        self._alive: Tensor | None = None
        self._convergence = Convergence()
        self._start_norms: Tensor | None = None
        self._collapse_reported = False
        self._all_finite: Tensor | None = None
        if masks is not None:
            apply_masks(self.groups, masks)
            return
        step.schedule.steps(self.total_steps)  # an unknown length is an error now, not in the run
        self.budgets()
        if half_space is not None:
            self._half_space_from = in_steps("start", half_space.start, self.total_steps)
        self._freeze_at = self._freeze_step(freeze)

    @property
    def frozen(self) -> bool:
        """Is the mask fixed?"""
        return self.masks is not None

    @property
    def step_size(self) -> float | Tensor:
        """The step size of the last step; 0 once the mask is fixed."""
        return 0.0 if self.frozen else self.step.size

    def budgets(self) -> Tensor:
        """The budgets of the next step, shape (S,)."""
        groups = self.groups
        if self._ramp is None:
            return groups.budgets
        left = self._ramp.left(self.taken, self.total_steps)
        budgets = groups.budgets + (groups.totals - groups.budgets) * left
        return budgets if groups.costs is not None else budgets.ceil()

    def before_step(self) -> None:
        """Remember the weights where the half-space step will ask for them."""
        if self.masks is None and self._in_half_space_stage():
            self._before = {m.name: m.weights.clone() for m in self.groups.members}

    @torch.no_grad()
    def after_step(self) -> None:
        """Apply the proximal step, or the mask once it is frozen.

        Raises:
            FloatingPointError: a weight is NaN or infinite; nothing was changed.
        """
        if self.masks is not None:
            apply_masks(self.groups, self.masks)
            return
        if not self._has_gradients():
            return
        norms = self.step.norms()
        self._guard(norms)
        if self._start_norms is None:
            self._start_norms = self._layer_norms(self.groups.norms())
        if self._freezes_next():
            alive = self.step.survivors(norms, self.groups.budgets)
            self.taken += 1
            if self._alive is not None:
                parts = self.groups.split(self._alive & ~alive)
                cut = {name: int(part.sum()) for name, part in parts.items()}
                warn_of_cut(cut, self.taken, self.step.penalty, self.step.schedule)
            self.freeze(alive)
            return
        self.step.take(norms, self.taken, self.budgets(), self._allowed())
        if self._before:
            epsilon = self._half_space.epsilon if self._half_space is not None else 0.0
            self.step.scale_(inside_half_space(self.groups, self._before, epsilon))
            self._before = {}
        self.taken += 1
        if self.taken % CHECK_EVERY == 0:
            self._check_progress()
        if self._waits and self._freezes_next():
            self._alive = self.groups.norms() > 0  # the optimizer moves dead groups, too

    def _freezes_next(self) -> bool:
        return (
            self.masks is None and self._freeze_at is not None and self.taken + 1 >= self._freeze_at
        )

    def freeze(self, alive: Tensor) -> None:
        """Fix the mask: ``alive`` is a boolean for every group, shape (m,)."""
        self.check_finite()
        self.masks = self.groups.split(alive)
        self.step.settle()
        apply_masks(self.groups, self.masks)
        clear_moments(self.groups, self.masks, self.optimizer)

    def check_finite(self) -> None:
        """Raise for weights that were found NaN or infinite; waits for an accelerator.

        Raises:
            FloatingPointError: names the layers.
        """
        if self._all_finite is None or bool(self._all_finite):
            return
        norms = self.groups.split(self.groups.norms())
        names = [name for name, part in norms.items() if not bool(torch.isfinite(part).all())]
        raise FloatingPointError(
            f"weights of {', '.join(names)} are NaN or infinite after the optimizer's step: the "
            "proximal step was not applied; try a smaller learning rate or gradient clipping"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, in plain types and tensors."""
        return {
            "layers": dict(zip(map(_name, self.groups.layers), self.groups.counts, strict=True)),
            "taken": self.taken,
            "total_steps": self.total_steps,
            "masks": None if self.masks is None else {n: m.clone() for n, m in self.masks.items()},
            "start_norms": self._start_norms,
            "unchanged": self._convergence.unchanged,
            "alive": self._convergence.alive,
            "collapse_reported": self._collapse_reported,
            **self.step.state_dict(),
            **{name: getattr(self.groups, name) for name in _MEASURED},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: the state is damaged, or of other groups.
        """
        check_state(state, self.state_dict(), self.groups)
        device = self.groups.device
        # Costs may have been measured, masks given: then k is not what budgets come from.
        compared = self.groups.costs is None and self.masks is None
        asked = self.groups.budgets if compared else None

        def here(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        self.taken = state["taken"]
        masks = state["masks"]
        self.masks = None if masks is None else {n: m.to(device) for n, m in masks.items()}
        self._start_norms = here(state["start_norms"])
        self._convergence.unchanged = state["unchanged"]
        self._convergence.alive = here(state["alive"])
        self._collapse_reported = state["collapse_reported"]
        self.step.load_state_dict(state)
        for name in _MEASURED:  # at the start of the run: the weights have changed since then
            setattr(self.groups, name, here(state[name]))
        if asked is not None and not torch.equal(asked, self.groups.budgets):
            warn_of_other_budget(float(asked.sum()), float(self.groups.budgets.sum()))

    def _check_progress(self) -> None:
        self.check_finite()
        groups, norms = self.groups, self.groups.norms()
        if self._waits:
            alive = norms > 0
            value, gap = value_and_gap(groups, norms, groups.budgets)
            if self._convergence.update(alive, gap, value):
                # Groups beyond the budget may be too weak to count in the gap.
                self.freeze(self.step.survivors(self.step.norms(), groups.budgets))
        if self._start_norms is not None and not self._collapse_reported:
            fallen = self._layer_norms(norms) < _COLLAPSED * self._start_norms
            names = [n for n, bad in zip(map(_name, groups.layers), fallen, strict=True) if bad]
            if names:
                self._collapse_reported = True
                warn_of_collapse(names, self.step.penalty, self.step.schedule)

    def _guard(self, norms: Tensor) -> None:
        finite = torch.isfinite(norms).all()
        self._all_finite = finite if self._all_finite is None else self._all_finite & finite
        if norms.device.type == "cpu":
            self.check_finite()

    def _allowed(self) -> Tensor | None:
        """Was the step taken, and can it be followed? Without waiting for an accelerator."""
        found_inf = getattr(self.optimizer, "found_inf", None)  # a fused step under a grad scaler
        allowed = None if self.groups.device.type == "cpu" else self._all_finite
        if isinstance(found_inf, Tensor):
            taken = found_inf.to(self.groups.device) == 0
            allowed = taken if allowed is None else allowed & taken
        return allowed

    def _in_half_space_stage(self) -> bool:
        return self._half_space is not None and self.taken >= self._half_space_from

    def _has_gradients(self) -> bool:
        return any(member.parameter.grad is not None for member in self.groups.members)

    def _layer_norms(self, norms: Tensor) -> Tensor:
        parts = self.groups.split(norms).values()
        return torch.stack([torch.linalg.vector_norm(part) for part in parts])

    def _freeze_step(self, freeze: str | int | float | None) -> int | None:
        if freeze is None or (self._waits and self.total_steps is None):
            return None
        if self._waits:
            return in_steps("freeze", _LATEST, self.total_steps)
        if isinstance(freeze, str):
            return self.step.schedule.steps(self.total_steps)
        return in_steps("freeze", freeze, self.total_steps)


def _name(layer: Any) -> str:
    return str(layer.name)
