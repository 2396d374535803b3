"""What happens after every step of one optimizer: the proximal step, and later the mask."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_wgsef.envelope import envelope_value, prox_multipliers, sparsity_gap
from lightning_wgsef.groups import Groups
from lightning_wgsef.masks import Convergence, Masks, apply_masks, clear_moments
from lightning_wgsef.schedules import Schedule, in_steps

LOOK_EVERY = 50
"""Steps between two looks at the numbers on the host: convergence, collapse, finite weights."""
_LATEST = 0.75
"""Share of training at which a mask that has not converged is fixed: the budget is a promise."""
_COLLAPSED = 1e-3


class Attachment:
    """The groups that one optimizer trains, and where they are on their way to the budget.

    Args:
        groups: groups all of whose members ``optimizer`` trains.
        optimizer: read for its learning rates; its moments are cleared at the freeze.
        schedule: step sizes over training.
        debias: the share of the ridge that is taken back, see `prox_multipliers`.
        freeze: "converged", a number of steps, a share of training, or None (never).
        total_steps: how many steps training lasts, if known.
        masks: masks to keep from the start.

    Raises:
        ValueError: a share of training of unknown length.
    """

    def __init__(
        self,
        groups: Groups,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        debias: float,
        freeze: str | int | float | None,
        total_steps: int | None,
        masks: Masks | None = None,
    ) -> None:
        self.groups = groups
        self.optimizer = optimizer
        self.schedule = schedule
        self.debias = debias
        self.total_steps = total_steps
        self.taken = 0
        self.masks = masks
        self.step_size: float | Tensor = 0.0
        self._waits = freeze == "converged" and not schedule.homotopy
        self._freeze_at: int | None = None
        self._convergence = Convergence()
        self._start_norms: Tensor | None = None
        self._collapse_reported = False
        self._all_finite: Tensor | None = None
        self._heaviest = 1.0 if groups.weights is None else float(groups.weights.max())
        self._owner = self._param_groups_of_layers()
        if masks is not None:
            apply_masks(groups, masks)
        else:
            schedule.steps(total_steps)  # an unknown length is an error now, not at the first step
            self._freeze_at = self._freeze_step(freeze)

    @property
    def frozen(self) -> bool:
        """Is the mask fixed?"""
        return self.masks is not None

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
        norms = self.groups.norms()
        self._guard(norms)
        if self._start_norms is None:
            self._start_norms = self._layer_norms(norms)
        freeze_now = self._freeze_at is not None and self.taken + 1 >= self._freeze_at
        multipliers = self._project(norms) if freeze_now else self._multipliers(norms)
        self.taken += 1
        if freeze_now:
            alive = (multipliers > 0) & (norms > 0)
            if self._waits:
                self._report_cut(norms > 0, alive)
            self.freeze(alive)
            return
        self.groups.scale_(self._unless_skipped(multipliers))
        if self.taken % LOOK_EVERY == 0:
            self._look(norms * multipliers)

    def freeze(self, alive: Tensor) -> None:
        """Fix the mask: ``alive`` is a boolean for every group, shape (m,)."""
        self.check_finite()
        self.masks = self.groups.split(alive)
        self.step_size = 0.0
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
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        device = self.groups.segments.device

        def here(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        self.taken = state["taken"]
        masks = state["masks"]
        self.masks = None if masks is None else {n: m.to(device) for n, m in masks.items()}
        self._start_norms = here(state["start_norms"])
        self._convergence.unchanged = state["unchanged"]
        self._convergence.alive = here(state["alive"])
        self._collapse_reported = state["collapse_reported"]

    def _multipliers(self, norms: Tensor) -> Tensor:
        groups = self.groups
        self.step_size = self.schedule.step_size(self.taken, self.total_steps, self._lr())
        if self.schedule.homotopy:
            return prox_multipliers(
                self._in_metric_of_weights(norms),
                self.step_size,
                groups.budgets,
                costs=groups.costs,
                segments=groups.segments,
                debias=1.0,
                anchored=True,
            )
        if self.debias > 0:  # beyond this the step is no proximal step: it stops at the projection
            limit = 1 / (self.debias * self._heaviest)
            step = torch.as_tensor(self.step_size, dtype=torch.float64, device=norms.device)
            self.step_size = step.clamp(max=limit)
        return prox_multipliers(
            norms, self.step_size, groups.budgets, debias=self.debias, **groups.competition
        )

    def _project(self, norms: Tensor) -> Tensor:
        groups = self.groups
        strengths = self._in_metric_of_weights(norms)
        return prox_multipliers(
            strengths, 1.0, groups.budgets, costs=groups.costs, segments=groups.segments, debias=1.0
        )

    def _in_metric_of_weights(self, norms: Tensor) -> Tensor:
        return norms if self.groups.weights is None else norms * self.groups.weights.sqrt()

    def _look(self, norms: Tensor) -> None:
        self.check_finite()
        groups = self.groups
        if self._waits:
            alive = norms > 0
            value = envelope_value(norms, groups.budgets, **groups.competition)
            gap = sparsity_gap(norms, groups.budgets, **groups.competition)
            if self._convergence.look(alive, gap, value):
                self.freeze(alive)
        if self._start_norms is not None and not self._collapse_reported:
            fallen = self._layer_norms(norms) < _COLLAPSED * self._start_norms
            names = [n for n, bad in zip(map(_name, groups.layers), fallen, strict=True) if bad]
            if names:
                self._collapse_reported = True
                warnings.warn(
                    f"all groups of {', '.join(names)} have faded to less than a thousandth of "
                    f"their norm at the start under lam = {self.schedule}: nothing holds them up "
                    "against the penalty (common behind a norm). Try a smaller lam, debias=1.0, or "
                    "lam=Homotopy()",
                    stacklevel=2,
                )

    def _report_cut(self, before: Tensor, after: Tensor) -> None:
        cut = {name: int(part.sum()) for name, part in self.groups.split(before & ~after).items()}
        if any(cut.values()):
            warnings.warn(
                f"lam = {self.schedule} had not reached the budget by step {self.taken}, three "
                f"quarters of training: the weakest groups were cut to keep it {cut}. Try a larger "
                "lam, lam=Homotopy(), which arrives without a jump, or an earlier freeze=",
                stacklevel=2,
            )

    def _guard(self, norms: Tensor) -> None:
        finite = torch.isfinite(norms).all()
        self._all_finite = finite if self._all_finite is None else self._all_finite & finite
        if norms.device.type == "cpu":
            self.check_finite()

    def _unless_skipped(self, multipliers: Tensor) -> Tensor:
        """1 where the step was not taken or cannot be: without waiting for an accelerator."""
        found_inf = getattr(self.optimizer, "found_inf", None)  # a fused step under a grad scaler
        if isinstance(found_inf, Tensor):
            multipliers = torch.where(found_inf.to(multipliers.device) > 0, 1, multipliers)
        assert self._all_finite is not None
        return torch.where(self._all_finite, multipliers, 1)

    def _has_gradients(self) -> bool:
        members = (member for layer in self.groups.layers for member in layer.members)
        return any(member.parameter.grad is not None for member in members)

    def _layer_norms(self, norms: Tensor) -> Tensor:
        parts = self.groups.split(norms).values()
        return torch.stack([torch.linalg.vector_norm(part) for part in parts])

    def _param_groups_of_layers(self) -> list[int]:
        places = {
            id(parameter): number
            for number, param_group in enumerate(self.optimizer.param_groups)
            for parameter in param_group["params"]
        }
        return [places[id(layer.largest_member.parameter)] for layer in self.groups.layers]

    def _lr(self) -> float | Tensor:
        """Learning rate: one number, or one for every layer where they differ, shape (S,)."""
        rates = [self.optimizer.param_groups[number]["lr"] for number in self._owner]
        first: float | Tensor = rates[0]
        # Tensors are not compared: that would wait for the device they are on.
        if len(set(self._owner)) == 1 or all(
            not isinstance(r, Tensor) and r == first for r in rates
        ):
            return first
        device = self.groups.segments.device
        return torch.stack([torch.as_tensor(rate, device=device).double() for rate in rates])

    def _freeze_step(self, freeze: str | int | float | None) -> int | None:
        if freeze is None or (self._waits and self.total_steps is None):
            return None
        if self._waits:
            return in_steps("freeze", _LATEST, self.total_steps)
        if isinstance(freeze, str):
            return self.schedule.steps(self.total_steps)
        return in_steps("freeze", freeze, self.total_steps)


def trained_by(groups: Groups, optimizer: Optimizer) -> Iterator[str]:
    """Names of the layers whose members ``optimizer`` trains.

    Members without a gradient (a frozen norm's scale) may be in no optimizer.

    Raises:
        ValueError: some members of a group are in this optimizer and some trainable ones are not.
    """
    inside = {id(p) for param_group in optimizer.param_groups for p in param_group["params"]}
    for layer in groups.layers:
        trainable = [member for member in layer.members if member.parameter.requires_grad]
        mine = [member.name for member in trainable if id(member.parameter) in inside]
        others = [member.name for member in trainable if id(member.parameter) not in inside]
        if mine and others:
            raise ValueError(
                f"the groups of layer '{layer.name}' are spread over optimizers: "
                f"{', '.join(mine)} are in one, {', '.join(others)} are not in it; put them "
                "into one optimizer (any of its param_groups), or leave the layer out"
            )
        if mine:
            yield layer.name


def _name(layer: Any) -> str:
    return str(layer.name)
