"""Regularizer of a model: its groups compete for budgets while optimizers train them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack

from lightning_wgsef.groupings.budget import Budget
from lightning_wgsef.groupings.group_parameters import group_parameters
from lightning_wgsef.groupings.registry import Grouping
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.scope import value_and_gap
from lightning_wgsef.network.layers import canonical_name, tensors_by_name
from lightning_wgsef.network.sharding import is_sharded
from lightning_wgsef.penalties.envelope import Envelope
from lightning_wgsef.training.checkpointing import pruner_states
from lightning_wgsef.training.logged_metrics import logged_metrics
from lightning_wgsef.training.masks import Masks, given_masks, pruned_grouping, within_masks
from lightning_wgsef.training.optimizer_hooks import (
    StepHooks,
    WholeSteps,
    holds,
    inner,
    nested,
    trained_by,
    trains,
)
from lightning_wgsef.training.options import PruningOptions, Settings
from lightning_wgsef.training.proximal_step import ProximalStep
from lightning_wgsef.training.pruner import Pruner
from lightning_wgsef.training.saved_grouping import check_same_grouping, grouping_state
from lightning_wgsef.training.schedules import CubicRamp, Schedule
from lightning_wgsef.utils.validation import check_model


class WGSEF:
    r"""Weighted group sparse envelope regularization of a model, for any training loop.

    After every step of an attached optimizer the weights are replaced by the proximal step of the
    envelope (see `prox_multipliers`); once the mask is frozen, dead groups are set to zero instead.

    Args:
        model: the network.
        k: the budget of every layer: a number of groups (int), a share (float in (0, 1]), or a
            mapping from patterns of layer names to either; the size of the slim network, such as
            "120 MFLOPs"; or a `CubicRamp` down to one of these.
            Ignored with ``masks``.
        lam: how strongly groups compete: a number, the paper's :math:`\lambda`, with which a
            `Homotopy` starts (step size learning rate times lam); None, chosen by the length of
            training; or a schedule. All but `Constant` and `Warmup` arrive at the budget by
            themselves, without a jump.
        grouping: what a group is, see `group_parameters`; None: "channel", or with ``masks`` what
            was pruned.
        total_steps: how many steps training lasts; needed where a schedule or ``freeze`` is a
            share of training.
        options: see `PruningOptions`.

    Attributes:
        groups: the groups, with budgets; ``print(regularizer.groups)`` shows them.

    Raises:
        ValueError: an argument out of its range; the message names it, its value and what would
            be accepted.
        TypeError: an option that is none.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> from lightning_wgsef.training.schedules import Homotopy
    >>> regularizer = WGSEF(model, k=2, lam=Homotopy(length=20)).attach(optimizer)
    >>> inputs = torch.randn(16, 4)
    >>> for _ in range(30):
    ...     optimizer.zero_grad()
    ...     loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    ...     loss.backward()
    ...     _ = optimizer.step()  # the proximal step follows by itself
    >>> regularizer.frozen, int((model[2].weight != 0).sum())
    (True, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        k: Budget | CubicRamp = 0.5,
        lam: float | Schedule | None = None,
        grouping: Grouping | None = None,
        *,
        total_steps: int | None = None,
        **options: Unpack[PruningOptions],
    ) -> None:
        check_model("model", model)
        settings = Settings(k, lam, grouping, **options)
        self.schedule, self.debias = settings.schedule, settings.debias
        self.penalty, self.metric = settings.penalty, settings.options["metric"]
        self.ramp, self.half_space = settings.ramp, settings.half_space
        self.freeze = settings.options["freeze"]
        self.importance = settings.importance
        self.multiple_of = settings.options["multiple_of"]
        if total_steps is not None and not (isinstance(total_steps, Integral) and total_steps >= 1):
            raise ValueError(f"total_steps must be a number of steps >= 1, got {total_steps!r}")
        self.total_steps: int | None = total_steps
        self.model = model
        self.pruners: list[Pruner] = []
        self._given_masks: Masks | None = None
        self.grouping, self.k = settings.grouping["grouping"], k
        masks = settings.options["masks"]
        if masks is not None and not settings.is_named:
            self.grouping = pruned_grouping(model, masks, settings.grouping)
        self.groups = group_parameters(model, **{**settings.grouping, "grouping": self.grouping})
        if masks is not None:
            self._given_masks = given_masks(model, self.groups, masks, self.grouping)
            self.groups = within_masks(self.groups, self._given_masks)
        self._steps = WholeSteps(self.before_step, self.step)
        self._hooks: list[StepHooks] = []
        self._watch: RemovableHandle | None = None
        self._lost: list[str] = []

    @property
    def frozen(self) -> bool:
        """Whether the masks of all trained layers are fixed, and were when last compared."""
        return not self._lost and bool(self.pruners) and all(x.frozen for x in self.pruners)

    @property
    def masks(self) -> Masks:
        """Masks of all layers, a boolean for every group: frozen ones, else where norms live."""
        masks: Masks = {}
        for pruner in self.pruners:
            masks.update(pruner.masks or {})
        masks = {name: mask for name, mask in masks.items() if name not in self._lost}
        if len(masks) < len(self.groups.layers):
            masks = {**self.groups.split(self.groups.norms() > 0), **masks}
        return {layer.name: masks[layer.name] for layer in self.groups.layers}

    def attach(self, *optimizers: Optimizer) -> WGSEF:
        """Act after every step of ``optimizers`` from now on; return the regularizer.

        Of optimizers that train the same layer, the groups compete after the steps of one: the
        first that steps, until it stops and another goes on. A mask is applied after the steps of
        all of them. Optimizers inside others (Lookahead's, SAM's) are followed, too.

        Layers whose parameters enter an optimizer later (``add_param_group``) join then.

        Raises:
            ValueError: no optimizer trains a layer that is grouped, a layer is spread over
                optimizers, or a share of training is asked for and ``total_steps`` is not known.
        """
        found = [part for optimizer in optimizers for part in nested(optimizer)]
        for optimizer in optimizers:
            self._adopt(inner(optimizer), found)
        if not self.pruners:
            raise ValueError(
                "no optimizer trains any of the grouped layers "
                f"{', '.join(x.name for x in self.groups.layers)}; give their parameters to one"
            )
        self._hooks += [StepHooks(optimizer, self._steps) for optimizer in found]
        return self

    def watch(self) -> None:
        """Follow optimizers that nobody attached, too, as soon as they step; until `detach`."""

        def meet(optimizer: Optimizer, *_: Any) -> None:
            known = any(hooks.optimizer is optimizer for hooks in self._hooks)
            if not known and any(holds(optimizer, layer) for layer in self.groups.layers):
                self._adopt(inner(optimizer), [hooks.optimizer for hooks in self._hooks])
                self._hooks.append(StepHooks(optimizer, self._steps))

        self._watch = register_optimizer_step_pre_hook(meet)

    def waiting(self) -> list[str]:
        """Return the names of the grouped layers that no attached optimizer trains yet."""
        attached = {layer.name for pruner in self.pruners for layer in pruner.groups.layers}
        return [layer.name for layer in self.groups.layers if layer.name not in attached]

    def thawed(self) -> list[str]:
        """Return the layers that were left out as frozen and have a gradient by now."""
        own = tensors_by_name(self.model)
        frozen = {
            layer: why.removeprefix("frozen: ").partition(" ")[0]
            for layer, why in self.groups.left_out.items()
            if why.startswith("frozen: ")
        }
        return [x for x, name in frozen.items() if name in own and own[name].requires_grad]

    def detach(self) -> None:
        """Leave all optimizers alone; masks, counters and groups stay readable."""
        while self._hooks:
            self._hooks.pop().remove()  # the last first: wrapped steps are put back in turn
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def keep_masks(self) -> list[str]:
        """Set weights of dead groups that were written since the last step to zero again.

        An optimizer with a second copy of the weights, a hook or loaded weights bring them back
        unseen. Call it where they may have: before validation, and before weights are saved. Waits
        for an accelerator.

        Returns:
            The layers that had such weights.

        Raises:
            ValueError: weights that cannot be set; the message names their layers.
        """
        own = {canonical_name(name): p for name, p in self.model.named_parameters()}
        changed: list[str] = []
        self._lost = []
        for pruner in self.pruners:
            if pruner.masks is None:
                continue
            changed += pruner.keep_mask()
            self._lost += pruner.lost()
            self._lost += [
                layer.name
                for layer in pruner.groups.layers
                if any(
                    own.get(m.name, m.parameter) is not m.parameter
                    for m in layer.members
                    if not is_sharded(m.parameter)  # the whole parameter may stand for its parts
                )
            ]
        if self._lost:
            raise ValueError(
                f"{', '.join(self._lost)}: the mask is lost: other parameters than those that were "
                "grouped are in the model now, or weights that were set to zero did not stay so. "
                "Change weights in place (load_state_dict, copy_), and start a new fit after a "
                "layer was replaced"
            )
        return changed

    def step(self, optimizer: Optimizer) -> None:
        """Follow a step of ``optimizer``, as `attach` does after every one.

        Raises:
            FloatingPointError: a weight is NaN or infinite; nothing was changed.
        """
        for hooks in self._hooks:
            if hooks.optimizer is optimizer and hooks.grown():
                for pruner in self.pruners:  # parts of their layers may have joined
                    if pruner.optimizer is inner(optimizer):
                        pruner.step.follow(pruner.optimizer)
                self._adopt(inner(optimizer), [x.optimizer for x in self._hooks])
        for pruner in self.pruners:
            if pruner.follows(inner(optimizer)):
                pruner.after_step()

    def replan(self, left: int, done: int) -> str:
        """Let the schedules of a restored run go on over the steps that are left; say so.

        Args:
            left: number of steps to come.
            done: number of steps that the training loop has taken.

        Returns:
            What changed; "" where so many steps were to come, up to one.
        """
        restored = [x for x in self.pruners if x.taken and x.total_steps is not None]
        planned = [(x.total_steps or 0) - n for x in restored[:1] for n in (x.taken, done)]
        if not restored or left < 1 or any(abs(left - steps) <= 1 for steps in planned):
            return ""
        stretched = [pruner.replan(left) for pruner in restored]
        if not any(stretched):
            return ""
        fixed = restored[0].freeze_rule.step
        when = (
            "" if fixed is None else f"; the mask is fixed after {fixed - restored[0].taken} more"
        )
        return (
            f"{planned[0]} steps were to come when the run was saved, {left} are now (other "
            f"epochs, batches or batch size): the schedule goes on over those{when}"
        )

    def before_step(self, optimizer: Optimizer) -> None:
        """Prepare a step of ``optimizer``, as `attach` does; needed where there is a half space."""
        for pruner in self.pruners:
            if pruner.optimizer is inner(optimizer):
                pruner.before_step()

    def value(self) -> Tensor:
        """Return the penalty of every layer, shape (S,); with a global scope of all, (1,)."""
        return self._value_and_gap(self.groups.norms())[0]

    def gap(self) -> Tensor:
        """Return the sparsity gap, shaped like `value`; 0 where the budget is kept."""
        return self._value_and_gap(self.groups.norms())[1]

    def check_finite(self) -> None:
        """Raise for NaN or infinite weights met on an accelerator, where steps do not wait.

        Raises:
            FloatingPointError: names the layers.
        """
        for pruner in self.pruners:
            pruner.check_finite()

    def metrics(self) -> dict[str, Tensor]:
        """Return numbers to log, always under the same names, on the model's device."""
        norms = self.groups.norms()
        values, gaps = self._value_and_gap(norms)
        steps = [pruner.step_size for pruner in self.pruners]
        return logged_metrics(self.groups, norms, values, gaps, steps, frozen=self.frozen)

    def state_dict(self) -> dict[str, Any]:
        """Return counters and masks, in plain types (loads under ``weights_only=True``)."""
        return {
            "attachments": [pruner.state_dict() for pruner in self.pruners],
            "grouping": grouping_state(self.groups, self.grouping, self.k),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, after the optimizers were attached.

        Raises:
            ValueError: the state is damaged, of other layers or groups, or no optimizer trains
                them.
        """
        # A layer that waits for its gradient in an optimizer is one of this optimizer, too.
        optimizers = {
            layer.name: inner(hooks.optimizer)
            for check in (holds, trains)  # the first that trains all of it counts
            for hooks in reversed(self._hooks)
            for layer in self.groups.layers
            if check(hooks.optimizer, layer)
        }
        counts = dict(zip((x.name for x in self.groups.layers), self.groups.counts, strict=True))
        parts = list(pruner_states(state, counts, optimizers))
        if "grouping" in state:
            check_same_grouping(state["grouping"], self.state_dict()["grouping"])
        # Nothing is refused from here on but by a pruner, before it takes anything over. One of all
        # layers shares its groups with this object; where there are several each has its own.
        restored = []
        for saved in parts:
            layers = saved["layers"]
            pruner = self._pruner(
                self.groups.only(layers), optimizers[next(iter(layers))], saved["total_steps"]
            )
            pruner.load_state_dict(saved)
            restored.append(pruner)
        known = {name for saved in state["attachments"] for name in saved["layers"]}
        fresh = [p for p in self.pruners if known.isdisjoint(x.name for x in p.groups.layers)]
        self.pruners = restored + fresh

    def _value_and_gap(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.groups
        value, gap = value_and_gap(groups, norms, groups.budgets)
        if not isinstance(self.penalty, Envelope):
            value = self.penalty.value(norms, groups.budgets, **groups.competition)
        return value, gap

    def _adopt(self, optimizer: Optimizer, others: Sequence[Optimizer]) -> None:
        """Take on the layers that the optimizer trains and that are not attached yet."""
        waiting = self.waiting()
        names = [name for name in trained_by(self.groups, optimizer, others) if name in waiting]
        if names:
            taken = max((p.taken for p in self.pruners if p.optimizer is optimizer), default=0)
            left = None if self.total_steps is None else max(self.total_steps - taken, 1)
            self.pruners.append(self._pruner(self.groups.only(names), optimizer, left))

    def _pruner(self, groups: Groups, optimizer: Optimizer, total: int | None) -> Pruner:
        masks = self._given_masks
        step = ProximalStep(
            groups,
            optimizer,
            schedule=self.schedule,
            debias=self.debias,
            penalty=self.penalty,
            metric=self.metric,
            total_steps=total,
        )
        return Pruner(
            step,
            freeze=self.freeze,
            ramp=self.ramp,
            half_space=self.half_space,
            masks=None if masks is None else {x.name: masks[x.name] for x in groups.layers},
            importance=self.importance,
        )
