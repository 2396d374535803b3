"""Proximal step on the weights of groups: norms, factors, scaling and projection."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.scope import Scope, survivors
from lightning_wgsef.penalties.base import Penalty
from lightning_wgsef.penalties.envelope import Envelope, prox_multipliers
from lightning_wgsef.penalties.preconditioned import metric_shares, tangent_shares
from lightning_wgsef.penalties.problem import Problem
from lightning_wgsef.training.group_preconditioner import LARGEST, GroupPreconditioner
from lightning_wgsef.training.preconditioners import preconditioner
from lightning_wgsef.training.schedules import Schedule

METRICS = ("auto", "group", "identity")

# The tangent that moves no share by more is the last: what it leaves is quadratic in the move, 1e-7
# or so, which is what float32 leaves, too.
_SHARE_TOLERANCE = 1e-3

_TANGENTS = 4

# A low-precision weight is moved once that moves it by several units in the last place.
_UNITS = 4


def check_step(
    metric: str, penalty: Penalty, schedule: Schedule, debias: float, scope: str
) -> None:
    """Raise `ValueError` for an unknown metric, and for what does not go together."""
    if metric not in METRICS:
        raise ValueError(f"metric must be 'auto', 'group' or 'identity', got {metric!r}")
    if isinstance(penalty, type) or not all(
        callable(getattr(penalty, name, None)) for name in ("value", "multipliers")
    ):
        raise ValueError(f"penalty must be Envelope() or GroupLasso(), got {penalty!r}")
    if metric != "identity" and scope == "global" and not schedule.homotopy:
        raise ValueError(
            f"metric must be 'identity' with scope='global' and lam={schedule}, got {metric!r}"
        )
    if isinstance(penalty, Envelope):
        return
    if schedule.homotopy:
        raise ValueError(
            f"lam must be a number or Warmup(...) with penalty={penalty}, got {schedule}, which "
            "ends with exactly the groups of a budget: only Envelope() has one"
        )
    if scope == "global":
        raise ValueError(f"scope must be 'layer' with penalty={penalty}, which has no budget")
    if metric != "identity" or debias:
        raise ValueError(
            f"metric must be 'identity' and debias 0 with penalty={penalty}, got {metric!r}, "
            f"{debias}"
        )


class ProximalStep:
    r"""Proximal step of a penalty on the groups that ``optimizer`` trains.

    Args:
        groups: the groups; their budgets are looked up at every step.
        optimizer: read for its learning rates and its metric.
        schedule: step sizes over training.
        debias: see `prox_multipliers`.
        penalty: what is stepped on.
        metric: "identity"; "auto", the diagonal D that the optimizer steps in; or "group", the mean
            of D over every group. A homotopy measures norms in the metric,
            :math:`a_j^2 = \sum_i D_i \theta_i^2`, and scales whole groups.
        total_steps: how many steps training lasts, if known.
    """

    def __init__(
        self,
        groups: Groups,
        optimizer: Optimizer,
        *,
        schedule: Schedule,
        debias: float,
        penalty: Penalty,
        metric: str,
        total_steps: int | None,
    ) -> None:
        self.groups = groups
        self.schedule = schedule
        self.debias = debias
        self.penalty = penalty
        self.total_steps = total_steps
        self.size: float | Tensor = 0.0
        self._resolution = self._lowest_resolution()
        self.remainder: Tensor | None = None  # factors that were too near to 1 to be applied
        self.shares: Tensor | None = None
        self._kind = metric
        self._averaged = metric == "group"
        self.follow(optimizer)

    def follow(self, optimizer: Optimizer) -> None:
        """Read learning rates and metric of this optimizer, as it is now, from now on."""
        self.optimizer = optimizer
        self._owner = self._param_groups_of_layers()
        self._metric: GroupPreconditioner | None = None
        self._exact = self._kind == "auto" and not self.schedule.homotopy
        if self._kind != "identity" and (adapter := preconditioner(optimizer)) is not None:
            self._metric = GroupPreconditioner(self.groups, optimizer, adapter)
            if self._exact and self._resolution:
                self._exact = False
                warnings.warn(
                    "metric='auto' scales weights one by one, which bfloat16 and float16 are too "
                    "coarse for: metric='group' is used instead (pass it to silence this)",
                    stacklevel=2,
                )

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the norm of every group as the penalty measures it, shape (m,)."""
        metric = self._metric if self.schedule.homotopy else None
        if self._metric is not None:
            self._metric.refresh()
        if metric is None:
            norms = self.groups.norms()
        elif self._averaged:
            norms = self.groups.norms() * metric.means().sqrt()
        else:
            norms = metric.norms()
        return norms if self.remainder is None else norms * self.remainder

    def take(self, norms: Tensor, taken: int, budgets: Tensor, allowed: Tensor | None) -> None:
        """Take the step, with the norms that `norms` gave.

        Args:
            norms: shape (m,).
            taken: number of steps before this one.
            budgets: K of every segment, shape (S,).
            allowed: a boolean, shape (): nothing changes where it is false; None: true.
        """
        self.groups.layout.weigh(norms)
        self.size = self._step_size(norms, taken)
        if isinstance(self.size, float) and self.size == 0:
            return
        if self._metric is not None and self._exact:
            self._take_in_metric(self._metric, norms, budgets, allowed)
            return
        scope = Scope(self.groups, norms, budgets)
        factors = self._factors(scope)
        self.scale_(factors if allowed is None else torch.where(allowed, factors, 1))
        size = self.groups.size
        if size is not None and scope.fitting is not None and self.groups.costs is not None:
            # A size is linearised at what fitted it last; a step that was not taken has no say.
            fitting = scope.fitting if allowed is None else scope.fitting | ~allowed
            self.groups.costs = size.costs(fitting)

    @torch.no_grad()
    def scale_(self, factors: Tensor) -> None:
        """Multiply every group by its factor; what low precision would lose is kept for later."""
        if self._resolution:
            remainder = factors if self.remainder is None else factors * self.remainder
            due = remainder <= 1 - self._resolution
            factors = torch.where(due, remainder, 1)
            self.remainder = torch.where(due, 1, remainder)
        self.groups.scale_(factors)

    def settle(self) -> None:
        """Apply what was kept for later, as well as the precision allows."""
        if self.remainder is not None:
            self.groups.scale_(self.remainder)
            self.remainder = None

    def survivors(self, norms: Tensor, budgets: Tensor) -> Tensor:
        """Return which groups the projection onto the budgets keeps, booleans of shape (m,)."""
        self.groups.layout.weigh(norms)
        return survivors(self.groups, norms, budgets)

    def _factors(self, scope: Scope) -> Tensor:
        groups, norms, budgets = self.groups, scope.norms, scope.budgets
        if self.schedule.homotopy:
            factors = prox_multipliers(
                self._in_metric_of_weights(norms),
                self.size,
                budgets,
                costs=groups.costs,
                segments=groups.segments,
                debias=1.0,
                anchored=True,
            )
            if scope.fitting is not None:  # whatever the order of equals is
                factors = torch.where(scope.fitting & (norms > 0), 1, factors)
            return scope.with_kept(factors, 1.0)
        if groups.is_global:
            # In the metric of the weights, which make layers comparable: they are no heavier ridge.
            factors = self.penalty.multipliers(
                self._in_metric_of_weights(norms),
                self.size,
                budgets,
                costs=groups.costs,
                segments=groups.segments,
                debias=self.debias,
            )
            size = torch.as_tensor(self.size, dtype=torch.float64, device=norms.device)
            return scope.with_kept(factors, 1 / (1 + size * (1 - self.debias)))
        if self._metric is None:
            return self.penalty.multipliers(
                norms, self.size, budgets, debias=self.debias, **groups.competition
            )
        thresholds = self._thresholds(norms)
        # With D constant in a group one tangent is exact, wherever it is taken: here at u = 0.
        means = self._metric.means().to(thresholds)
        limited = thresholds
        if self.debias > 0:
            limited = torch.minimum(thresholds, LARGEST / self.debias * means)
        reduced = means - self.debias * limited
        squares = (means * norms / limited).square() * (limited / thresholds)
        shares = tangent_shares(
            Problem(norms, budgets, **groups.competition),
            squares,
            squares * reduced / limited,
            torch.zeros_like(thresholds),
        )
        kept = means * shares  # as a sum, so that the factor of a share of 1 can be exactly 1
        factors = kept / (kept + limited * (1 - self.debias * shares))
        return torch.where(thresholds > 0, factors, 1).to(norms.dtype)

    def _take_in_metric(
        self, metric: GroupPreconditioner, norms: Tensor, budgets: Tensor, allowed: Tensor | None
    ) -> None:
        thresholds = self._thresholds(norms)
        self.shares = metric_shares(
            Problem(norms, budgets, **self.groups.competition),
            lambda shares: metric.sums(shares, thresholds, self.debias),
            torch.ones_like(thresholds) if self.shares is None else self.shares,
            thresholds,
            tolerance=_SHARE_TOLERANCE,
            rounds=_TANGENTS,
        )
        metric.scale_(self.shares, thresholds, self.debias, allowed)

    def _thresholds(self, norms: Tensor) -> Tensor:
        """Return the step size times the weight of every group, shape (m,), float64."""
        size = torch.as_tensor(self.size, dtype=torch.float64, device=norms.device)
        sizes = self.groups.segments.spread(size.expand(self.groups.segments.count))
        return sizes if self.groups.weights is None else sizes * self.groups.weights

    def _step_size(self, norms: Tensor, taken: int) -> float | Tensor:
        size = self.schedule.step_size(taken, self.total_steps, self._lr())
        if self.schedule.homotopy or self.debias == 0 or self._metric is not None:
            return size
        # Beyond this the step is no proximal step: it stops at the projection.
        weights = None if self.groups.is_global else self.groups.weights
        heaviest = 1.0 if weights is None else weights.max().double()
        step = torch.as_tensor(size, dtype=torch.float64, device=norms.device)
        return torch.minimum(step, torch.as_tensor(1 / (self.debias * heaviest)).to(step))

    def _in_metric_of_weights(self, norms: Tensor) -> Tensor:
        return norms if self.groups.weights is None else norms * self.groups.weights.sqrt()

    def _lowest_resolution(self) -> float:
        """Return the relative change that is applied at once; 0 where all have full precision."""
        kinds = {member.parameter.dtype for member in self.groups.layout.members}
        coarse = [torch.finfo(kind).eps for kind in kinds if kind.itemsize < 4]
        return _UNITS * max(coarse, default=0.0)

    def _param_groups_of_layers(self) -> list[int]:
        places = {
            id(parameter): number
            for number, param_group in enumerate(self.optimizer.param_groups)
            for parameter in param_group["params"]
        }
        # A frozen weight may be in no optimizer while the norm behind it is trained; what has left
        # the optimizer altogether goes on with the first rate there is.
        held = [
            [member.parameter for member in layer.members if id(member.parameter) in places]
            for layer in self.groups.layers
        ]
        return [places[id(max(own, key=torch.numel))] if own else 0 for own in held]

    def _lr(self) -> float | Tensor:
        """Return the learning rate, or one for every layer where they differ, shape (S,)."""
        rates = [self.optimizer.param_groups[number]["lr"] for number in self._owner]
        first: float | Tensor = rates[0]
        # Tensors are not compared: that would wait for the device they are on.
        if len(set(self._owner)) == 1 or all(
            not isinstance(r, Tensor) and r == first for r in rates
        ):
            return first
        device = self.groups.device
        stacked = torch.stack([torch.as_tensor(rate, device=device).double() for rate in rates])
        return stacked.max() if self.groups.is_global else stacked
