"""Pruner of the groups that one optimizer trains: proximal steps, and later the mask."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.importance import Importance
from lightning_wgsef.groups.scope import value_and_gap
from lightning_wgsef.penalties.envelope import Envelope
from lightning_wgsef.training.checkpointing import check_state, pruner_state, restore
from lightning_wgsef.training.freezing import FreezeRule, check_order
from lightning_wgsef.training.half_space import HalfSpace, inside_half_space
from lightning_wgsef.training.masks import Masks, apply_masks, clear_moments, unmasked
from lightning_wgsef.training.optimizer_hooks import holds, trains
from lightning_wgsef.training.proximal_step import ProximalStep
from lightning_wgsef.training.schedules import CubicRamp

# Steps between two checks that need numbers on the host: convergence, collapse, finite weights.
CHECK_EVERY = 50

# Share of all groups beyond which a cut at the freeze is reported, whatever led to it.
_LARGE_CUT = 0.1

# Share of its norm at the start at which a layer has collapsed.
_COLLAPSED = 1e-3


class Pruner:
    """Pruner of the groups that one optimizer trains, from the first step to the mask.

    Args:
        step: the proximal step, with the groups and the optimizer that trains all their members.
        freeze: "converged", a number of steps, a share of training, or None (never).
        ramp: how the budgets fall to those of the groups; None: they are those from the start.
        half_space: the projection that follows the step; None: none does.
        masks: masks to keep from the start.
        importance: "taylor" or "fisher": penalty weights are measured from gradients; None: not.

    Raises:
        ValueError: a share of training of unknown length.
    """

    def __init__(
        self,
        step: ProximalStep,
        *,
        freeze: str | int | float | None,
        ramp: CubicRamp | None,
        half_space: HalfSpace | None,
        masks: Masks | None,
        importance: str | None = None,
    ) -> None:
        self.step = step
        self.groups = step.groups
        self.optimizer = step.optimizer
        self.total_steps = step.total_steps
        self.taken = 0
        self.masks = masks
        self.importance = importance
        self.freeze_rule = FreezeRule(freeze, step.schedule, step.total_steps)
        self.start_norms: Tensor | None = None
        self.collapse_reported = False
        self._ramp = ramp
        self._half_space = half_space
        self._half_space_from = 0
        # Other optimizers that stepped since this one did; None: none has stepped yet.
        self._others: set[int] | None = None
        self._before: dict[str, Tensor] = {}
        self._alive: Tensor | None = None
        self._importance: Importance | None = None
        if importance is not None and masks is None:
            self._importance = Importance(self.groups, importance)
        self._all_finite: Tensor | None = None
        if masks is not None:
            apply_masks(self.groups, masks)
            return
        # An unknown length of training is an error now, not in the run.
        step.schedule.steps(self.total_steps)
        self.budgets()
        if half_space is not None:
            fixed = self.freeze_rule.step
            self._half_space_from = half_space.first_step(fixed, self.total_steps)
        check_order(self.freeze_rule.freeze, step.schedule, ramp, half_space, self.total_steps)
        self.freeze_rule.due(self.taken)

    @property
    def frozen(self) -> bool:
        """Whether the mask is fixed."""
        return self.masks is not None

    @property
    def step_size(self) -> float | Tensor:
        """Step size of the last step; 0 once the mask is fixed."""
        return 0.0 if self.frozen else self.step.size

    def budgets(self) -> Tensor:
        """Return the budgets of the next step, shape (S,)."""
        groups = self.groups
        ramp = self._ramp or self.step.schedule
        left = ramp.left(self.taken, self.total_steps)
        return groups.budgets + (groups.totals - groups.budgets) * left if left else groups.budgets

    def follows(self, optimizer: Optimizer) -> bool:
        """Return whether `after_step` is due after a step of ``optimizer``.

        Groups compete once for a step of the one whose turn it is; another takes its place by
        stepping first, or twice while it does not.
        """
        if optimizer is self.optimizer:
            self._others = set()
            return True
        if self.frozen:
            return any(holds(optimizer, layer) for layer in self.groups.layers)
        if not all(trains(optimizer, layer) for layer in self.groups.layers):
            return False
        if self._others is not None and id(optimizer) not in self._others:
            self._others.add(id(optimizer))
            return False
        self._others = set()
        self.optimizer = optimizer
        self.step.follow(optimizer)
        return True

    def replan(self, left: int) -> bool:
        """Stretch what the schedule has before it over the steps that are left; return: was it?

        Of ``total`` steps ``taken`` were taken; with f the ratio of ``left`` to what was left of
        them, the run goes on as one of f total steps of which f taken were taken, at the same point
        of its schedule. Where anything is a number of steps, it stays where it is.
        """
        total = self.total_steps
        schedule = self.step.schedule
        fixed = [self.freeze_rule.freeze, getattr(self._half_space, "start", None)]
        fixed += [getattr(schedule, name, None) for name in ("length", "end")]
        fixed.append(getattr(self._ramp, "length", None))
        if self.frozen or total is None or total <= self.taken:
            return False
        if any(isinstance(x, int) for x in fixed):
            return False
        self.taken = round(self.taken * left / (total - self.taken))
        total = self.taken + left
        self.total_steps = self.step.total_steps = self.freeze_rule.total_steps = total
        if self._half_space is not None:
            self._half_space_from = self._half_space.first_step(self.freeze_rule.step, total)
        return True

    def before_step(self) -> None:
        """Remember the weights where the half-space step will ask for them."""
        if self.masks is None and self._importance is not None:
            self._importance.remember()
        if self.masks is None and self._in_half_space_stage():
            parameters = {m.name: m.parameter for m in self.groups.layout.members}
            self._before = {name: p.detach().clone() for name, p in parameters.items()}

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
        if self._importance is not None:
            self._importance.measure(self.taken, self._allowed())
        if self.start_norms is None:
            self.start_norms = self._layer_norms(self.groups.norms())
        if self.freeze_rule.due(self.taken):
            alive = self.step.survivors(norms, self.groups.budgets)
            self.taken += 1
            self._warn_of_cut(alive)
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
        if self.freeze_rule.due(self.taken):
            self._alive = self.groups.norms() > 0  # the optimizer moves dead groups, too

    def progress(self) -> tuple[int, int]:
        """Return how many groups have died, and how many more a freeze would cut now."""
        weights = self.groups.weights
        survivors = self.step.survivors(self.step.norms(), self.groups.budgets)
        self.groups.weights = weights  # those of the last step, which a checkpoint has
        alive = self.groups.norms() > 0
        return int((~alive).sum()), int((alive & ~survivors).sum())

    def freeze(self, alive: Tensor) -> None:
        """Fix the mask: ``alive`` is a boolean for every group, shape (m,)."""
        self.check_finite()
        self.masks = self.groups.split(alive)
        self.step.settle()
        self.groups.layout.scale_statistics_(alive.to(self.groups.dtype))
        apply_masks(self.groups, self.masks)
        clear_moments(self.groups, self.masks, self.optimizer)

    def keep_mask(self) -> list[str]:
        """Apply the fixed mask where weights differ from it; return the names of these layers."""
        assert self.masks is not None
        lost = self.lost()
        if lost:
            groups = self._groups_where_they_are()
            apply_masks(groups, self.masks)
            clear_moments(groups, self.masks, self.optimizer)
        return lost

    def lost(self) -> list[str]:
        """Return the layers with weights that the fixed mask says are zero, and are not."""
        assert self.masks is not None
        return unmasked(self._groups_where_they_are(), self.masks)

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
        """Return everything that a resumed run needs, in plain types and tensors."""
        return pruner_state(self, self.groups, self.total_steps)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, with the penalty weights and budgets of that run.

        Raises:
            ValueError: the state is damaged, or of other groups.
        """
        check_state(state, self.state_dict(), self.groups)
        # Costs may have been measured, masks given: then k is not what budgets come from.
        compared = self.groups.costs is None and self.masks is None
        asked = self.groups.budgets
        restore(self, state, self.groups.device)
        if compared and not torch.equal(asked, self.groups.budgets):
            warnings.warn(
                f"k stands for {float(asked.sum()):g} groups now, but the saved run goes on with "
                f"its own {float(self.groups.budgets.sum()):g}. For another k start a new fit from "
                "the checkpoint's weights, without ckpt_path",
                stacklevel=2,
            )

    def _check_progress(self) -> None:
        """Find non-finite weights, convergence and collapse; waits for an accelerator."""
        self.check_finite()
        groups, norms = self.groups, self.groups.norms()
        if self.freeze_rule.waits:
            value, gap = value_and_gap(groups, norms, groups.budgets)
            if self.freeze_rule.update(norms > 0, gap, value):
                # Groups beyond the budget may be too weak to count in the gap.
                self.freeze(self.step.survivors(self.step.norms(), groups.budgets))
        self._warn_of_collapse(norms)

    def _warn_of_cut(self, alive: Tensor) -> None:
        """Say how many groups of every layer the budget cuts that had not faded by themselves."""
        if self._alive is None:
            return
        dying = self._alive & ~alive
        cut = {name: int(part.sum()) for name, part in self.groups.split(dying).items()}
        if sum(cut.values()) > (0 if self.freeze_rule.waits else max(1, _LARGE_CUT * len(alive))):
            latest = ", three quarters of training" if self.freeze_rule.waits else ""
            warnings.warn(
                f"lam = {self.step.schedule} had not reached the budget by step {self.taken}"
                f"{latest}: the weakest groups were cut to keep it {cut}. {self._advice()}",
                stacklevel=2,
            )

    def _advice(self) -> str:
        """Say what reaches the budget before the mask is fixed."""
        if not self._has_budget:
            return "Try a larger lam"
        if self.step.schedule.homotopy:
            return "Give the ramp more steps: train longer, or take a later freeze= or length="
        return "Take a number for lam or None: either arrives at the budget without a jump"

    def _warn_of_collapse(self, norms: Tensor) -> None:
        """Say once which layers fade as a whole."""
        if self.start_norms is None or self.collapse_reported:
            return
        fallen = self._layer_norms(norms) < _COLLAPSED * self.start_norms
        names = [x.name for x, bad in zip(self.groups.layers, fallen, strict=True) if bad]
        if names:
            self.collapse_reported = True
            others = ", debias=1.0 or lam=Homotopy()" if self._has_budget else ""
            warnings.warn(
                f"all groups of {', '.join(names)} have faded to less than a thousandth of their "
                f"norm at the start under lam = {self.step.schedule}: nothing holds them up "
                f"against the penalty (common behind a norm). Try a smaller lam{others}",
                stacklevel=2,
            )

    def _groups_where_they_are(self) -> Groups:
        """Return the groups; Lightning moves the weights to the CPU when training is over."""
        device = next(m.parameter.device for x in self.groups.layers for m in x.members)
        return self.groups if device == self.groups.device else Groups(self.groups.layers)

    @property
    def _has_budget(self) -> bool:
        return isinstance(self.step.penalty, Envelope)  # the group lasso knows none

    def _guard(self, norms: Tensor) -> None:
        finite = torch.isfinite(norms).all()
        self._all_finite = finite if self._all_finite is None else self._all_finite & finite
        if norms.device.type == "cpu":
            self.check_finite()

    def _allowed(self) -> Tensor | None:
        """Return whether the step was taken and is finite; None: yes. Waits for no accelerator."""
        found_inf = getattr(self.optimizer, "found_inf", None)  # a fused step under a grad scaler
        allowed = None if self.groups.device.type == "cpu" else self._all_finite
        if isinstance(found_inf, Tensor):
            taken = found_inf.to(self.groups.device) == 0
            allowed = taken if allowed is None else allowed & taken
        return allowed

    def _in_half_space_stage(self) -> bool:
        return self._half_space is not None and self.taken >= self._half_space_from

    def _has_gradients(self) -> bool:
        return any(member.parameter.grad is not None for member in self.groups.layout.members)

    def _layer_norms(self, norms: Tensor) -> Tensor:
        parts = self.groups.split(norms).values()
        return torch.stack([torch.linalg.vector_norm(part) for part in parts])
