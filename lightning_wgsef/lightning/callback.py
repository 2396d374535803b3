"""Lightning callback: hooks of a few lines each around the regularizer."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_wgsef.groupings.budget import Budget, measure_of
from lightning_wgsef.groupings.costs import Costs, KnownLatency
from lightning_wgsef.groupings.group_parameters import ASSUMED
from lightning_wgsef.groupings.registry import Grouping, grouping_at_ends, grouping_name
from lightning_wgsef.groupings.weights import Weights
from lightning_wgsef.groupings.width_limits import Bound, Multiple
from lightning_wgsef.lightning.batch_norm_update import BatchNormUpdate, check_batches, silent
from lightning_wgsef.lightning.model_checkpoints import dense_checkpoints, offer_pruned_metrics
from lightning_wgsef.lightning.private import (
    average_models,
    hold_back_hparams,
    logged_step,
    logs_are_due,
    release_hparams,
    steps_left,
)
from lightning_wgsef.lightning.strategies import check_strategy, restores_later
from lightning_wgsef.lightning.summary import PruningSummary
from lightning_wgsef.lightning.tensorboard import write_hparams, write_layout
from lightning_wgsef.network.interface import Interface, interface_of_batch
from lightning_wgsef.network.sharding import unsharded_copy
from lightning_wgsef.penalties.base import Penalty
from lightning_wgsef.reports.networks import network_report
from lightning_wgsef.slimming.files import check_slim_path, save_slim
from lightning_wgsef.slimming.slim import check_precision, own_multiples, slim
from lightning_wgsef.training.checkpointing import saved_latency
from lightning_wgsef.training.half_space import HalfSpace
from lightning_wgsef.training.masks import Twin, apply_masks_to, twins
from lightning_wgsef.training.options import ARGUMENTS, Settings
from lightning_wgsef.training.regularizer import WGSEF
from lightning_wgsef.training.saved_grouping import saved_grouping
from lightning_wgsef.training.schedules import CubicRamp, Schedule

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def write_slim(
    model: nn.Module, example_input: Any, path: str | os.PathLike[str], multiple_of: Multiple = 1
) -> str:
    """Make a network smaller, and write it and a report.

    Args:
        model: any module, with its zeros; it is not changed.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        path: the file of `save_slim`; the report goes beside it, as JSON of the same name.
        multiple_of: see `slim`; patterns that match no layer are passed over.

    Returns:
        What was taken out, and what both networks need, as text.

    Raises:
        ValueError: `slim` refuses, or a path that cannot be written.
    """
    small = slim(model, example_input, multiple_of=own_multiples(model, multiple_of))
    report = network_report({"before": model, "slim": small}, example_input)
    save_slim(small, path)
    report.save_json(Path(path).with_suffix(".json"))
    return f"{small.slimming}\n{report}"


if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    # pytorch_lightning and lightning.pytorch are two class hierarchies; a Trainer of one rejects a
    # callback of the other. One class that inherits from both works in both.
    _packages = [name for name in ("pytorch_lightning", "lightning") if find_spec(name)]
    _modules = {"pytorch_lightning": "pytorch_lightning", "lightning": "lightning.pytorch"}
    _bases = tuple(import_module(_modules[name]).Callback for name in _packages)
    Callback = type("Callback", _bases, {})

__all__ = ["Callback"]


class WGSEFCallback(Callback):
    r"""Prune a network while it trains: groups of weights compete for a budget named beforehand.

    Arguments up to ``masks`` are those of `WGSEF`; its default schedule, `Homotopy`, reaches the
    budget at half of the training run, freezes the mask and fine-tunes in the second half. Works
    under ``pytorch_lightning`` and ``lightning.pytorch``.

    Logged at Lightning's own intervals, under names that never change over a run:
    ``wgsef/<layer>/group_sparsity`` (share of zero groups), ``wgsef/<layer>/value``,
    ``wgsef/<layer>/gap``, and over all layers ``wgsef/sparsity`` (share of the grouped weights that
    are zero), ``wgsef/value``, ``wgsef/gap``, ``wgsef/step`` (the step size) and ``wgsef/frozen``.

    A ``ModelCheckpoint`` that is to keep the best of the pruned network monitors
    ``wgsef/pruned/<metric>``: the module's own metric, from the freeze on.

    Args:
        k: the budget of every layer: a number of groups (int), a share (float in (0, 1]), or a
            mapping from patterns of layer names to either; or the size of the slim network, such as
            "120 MFLOPs", "4 MB", "800 kparams" or "5 ms"; or a `CubicRamp` down to one of these.
        lam: how hard groups compete: a number, with which the paper's step starts and from which it
            rises until the budget is reached; None: chosen by the length of training; or a
            schedule, such as `Homotopy`, or `Constant`, the paper's step all the way.
        grouping: a name ("channel", "filter", "structure", "head", "hidden", "layer", "2:4",
            "block:16x16", "element", ...), a function from a module to `Groups`, or a mapping from
            patterns of layer names to these. None: "channel", or with ``masks`` what was pruned.
        scope: "layer", or "global": all layers compete for one budget.
        weights: what makes a group strong: "uniform", "size", "sqrt_size", "layer_norm", "taylor"
            or "fisher" (by the loss), or tensors; None: norms, or "taylor" where all share a size.
        costs: what a group costs: None (1), "params", "flops" or "latency" (measured when the fit
            starts; with ``scope="global"`` k is then the share of the slim network), or tensors.
        example_input: for what follows a forward pass ("structure", "layer", sizes and costs);
            None: the module's ``example_input_array``.
        overlap: "error", or "first": leave a layer out that claims weights of one before it.
        include: patterns of layer names; only these are grouped.
        exclude: patterns of layer names that are left out.
        multiple_of: widths that stay are multiples of this number of channels, such as 8, or by
            patterns of layer names.
        at_least: how many groups of every layer stay at least: a number, a share, or by patterns;
            None: one.
        at_most: how many stay at most; None: all.
        debias: share of the ridge that is taken back from the weights that stay; None: the
            schedule's own.
        metric: "identity", "auto" (the optimizer's, such as Adam's) or "group" (its group means).
        penalty: `Envelope` (None), or `GroupLasso` to compare with.
        half_space: a `HalfSpace`, or its epsilon.
        freeze: when the mask is fixed: "converged" (at three quarters of training at the latest),
            a number of steps, a share of training, or None (never).
        masks: "from_zeros" keeps the zeros of the model's weights, a path those of a checkpoint:
            for fine-tuning a pruned network. Arguments that find groups are refused beside it.
        slim_to: where the network without its zero groups is written when the fit ends with a
            frozen mask, as a file of `save_slim` (.safetensors), with a report as JSON beside it;
            its folder is made. Needs an example input.
        update_bn: number of training batches whose inputs are remembered while groups disappear, as
            far as 256 MiB hold them. BatchNorm's running statistics lag behind weights that shrink
            fast; they are estimated anew from these for every validation until the mask has been
            frozen for as many batches. What is trained, and so what checkpoints keep, is the same
            with and without it. 0: not done.
        dashboard: show more in TensorBoard: charts of all layers together, histograms of norms and
            pictures of which groups live (a few times a run), the report, and hparams.
        name: put into the logged names, and into the key of the saved state; needed for each of
            several callbacks in one Trainer.

    Attributes:
        regularizer: the `WGSEF` at work; None before training.

    Raises:
        ValueError: an argument out of its range, on construction where the model is not needed to
            see it, else when the fit starts.

    >>> callback = WGSEFCallback(k=0.25, lam=1e-2, grouping="channel")
    >>> callback.regularizer is None
    True
    """

    def __init__(
        self,
        k: CubicRamp | Budget = 0.5,  # a command line tries these in turn: a ramp is a mapping
        lam: float | Schedule | None = None,
        grouping: Grouping | None = None,
        *,
        scope: Literal["layer", "global"] = "layer",
        weights: Weights = None,
        costs: Costs = None,
        example_input: Any | None = None,
        overlap: Literal["error", "first"] = "error",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        multiple_of: Multiple = 1,
        at_least: Bound = None,
        at_most: Bound = None,
        debias: float | None = None,
        metric: Literal["auto", "group", "identity"] = "identity",
        penalty: Penalty | None = None,
        half_space: float | HalfSpace | None = None,
        freeze: Literal["converged"] | int | float | None = "converged",
        masks: str | Path | None = None,
        slim_to: str | Path | None = None,
        update_bn: int = 10,
        dashboard: bool = False,
        name: str | None = None,
    ) -> None:
        given = locals()  # before there are others than the arguments
        self.arguments: dict[str, Any] = {argument: given[argument] for argument in ARGUMENTS}
        super().__init__()
        Settings(**self.arguments)  # what is wrong with them is an error now, not in the fit
        check_batches(update_bn)
        self.slim_to = slim_to
        self.update_bn = update_bn
        self.dashboard = dashboard
        self.name = name
        self.regularizer: WGSEF | None = None
        self._state: Mapping[str, Any] = {}
        self._averages_masked = False
        self._summary: PruningSummary | None = None
        self._held_back: list[Any] = []
        self._statistics: BatchNormUpdate | None = None
        self._batches_frozen = 0
        self._is_set_up = False
        self._saving: RemovableHandle | None = None
        self._said_lost = False
        self._said_idle = False
        self._said_thawed = False
        self._twins: list[Twin] = []
        self._waiting: list[str] = []
        self._taken: list[int] = []
        self._fixed_at: float | None = None
        self._assumed = ""

    @property
    def prefix(self) -> str:
        """Prefix of the logged names."""
        return "wgsef" if self.name is None else f"wgsef/{self.name}"

    @property
    def state_key(self) -> str:
        """Key of the callback's state in checkpoints.

        A Trainer refuses equal keys as soon as it is made, in words of its own; until `setup` has
        said what to do about it every callback has another.
        """
        key = "WGSEFCallback" if self.name is None else f"WGSEFCallback[{self.name}]"
        return key if self._is_set_up else f"{key} at {id(self)}"

    def state_dict(self) -> dict[str, Any]:
        """Return counters and masks, see `WGSEF.state_dict`."""
        if self._state or self.regularizer is None:  # loaded, and no training since
            return dict(self._state)
        return self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the next fit."""
        self._state = state_dict
        self.regularizer = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state of another model's fit out: a finder saves and restores before a fit."""
        if self.regularizer is not None and self.regularizer.model is not pl_module:
            checkpoint.get("callbacks", {}).pop(self.state_key, None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse equal names, and strategies under which the weights cannot be edited."""
        if stage == "fit":
            check_strategy(trainer)
        self._check_names(trainer)
        self._is_set_up = True
        if stage == "fit":
            self._held_back = hold_back_hparams(trainer) if self.dashboard else []

    def _check_names(self, trainer: Trainer) -> None:
        """Raise `ValueError` unless every callback of the Trainer has a name of its own."""
        callbacks = [x for x in trainer.callbacks if isinstance(x, WGSEFCallback)]  # type: ignore[attr-defined]  # set by a connector
        same = [x for x in callbacks if x.name == self.name]
        if len(same) > 1:
            groupings = " and ".join(repr(grouping_name(x.arguments["grouping"])) for x in same)
            raise ValueError(
                f"{len(same)} callbacks of one Trainer (grouping {groupings}) have name="
                f"{self.name!r}: give each its own, such as name='first', under which it logs and "
                "is saved"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Group the weights, with everything that can be wrong about them, before training."""
        if not restores_later(trainer):
            self._group(trainer, pl_module)

    def _group(self, trainer: Trainer, pl_module: LightningModule) -> None:
        earlier = self.regularizer
        if earlier is not None and earlier.model is not pl_module:
            self._state = {}
        elif earlier is not None and earlier.pruners:
            self._state = earlier.state_dict()  # a second fit goes on where the first one ended
        arguments = {**self.arguments, "example_input": self._example_input(trainer, pl_module)}
        if self.slim_to is not None:
            check_slim_path(self.slim_to, "slim_to", make_folder=True)
            if arguments["example_input"] is None:
                raise ValueError(
                    "slim_to needs an example_input: an argument of WGSEFCallback, or the module's "
                    "example_input_array"
                )
            try:
                check_precision(pl_module)
            except ValueError as error:
                raise ValueError(f"slim_to: {error} or precision='bf16-mixed'") from error
        # A damaged state is refused when it is restored.
        saved = self._state.get("grouping") if isinstance(self._state, Mapping) else None
        saved = saved if isinstance(saved, Mapping) else {}
        if self._state and arguments["masks"] is not None:
            arguments["masks"] = "from_zeros"  # by now in the weights; the file may be gone
            if arguments["grouping"] is None and saved:
                arguments["grouping"] = saved_grouping([saved])
        known, k = saved_latency(self._state), arguments["k"]
        measure = measure_of(k.k if isinstance(k, CubicRamp) else k, arguments["costs"])
        if known is not None and measure == "latency":
            arguments["costs"] = KnownLatency(known)
        self._assumed = ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.regularizer = WGSEF(pl_module, **arguments)
        for one in caught:
            if ASSUMED in str(one.message):  # the first batch will show
                self._assumed = str(one.message)
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        layers = saved.get("layers") if self._assumed else None
        if isinstance(layers, Mapping):  # it has shown
            self._assumed = ""
            self._regroup(pl_module, arguments, layers.keys())
        self._check_disjoint(trainer)

    def _check_disjoint(self, trainer: Trainer) -> None:
        assert self.regularizer is not None
        for other in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            if isinstance(other, WGSEFCallback) and other is not self and other.regularizer:
                self.regularizer.groups.check_disjoint(other.regularizer.groups)

    def _regroup(
        self,
        pl_module: LightningModule,
        arguments: Mapping[str, Any],
        interface: Interface | Collection[str],
    ) -> bool:
        """Group anew by what is known of inputs and outputs; return: are these other groups?"""
        assert self.regularizer is not None
        earlier = self.regularizer
        grouping = grouping_at_ends(arguments["grouping"], interface)
        regularizer = WGSEF(pl_module, **{**arguments, "grouping": grouping})
        if [x.name for x in regularizer.groups.layers] == [x.name for x in earlier.groups.layers]:
            return False
        earlier.detach()
        regularizer.total_steps = earlier.total_steps
        self.regularizer = regularizer
        return True

    def _look_at(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Find inputs and outputs of the network on the first batch, before the first step."""
        words, self._assumed = self._assumed, ""
        with trainer.precision_plugin.forward_context(), silent(pl_module):
            interface = interface_of_batch(pl_module, trainer.precision_plugin.convert_input(batch))
        if interface.unseen:
            warnings.warn(words, stacklevel=2)
            return
        arguments = {**self.arguments, "example_input": self._example_input(trainer, pl_module)}
        if self._regroup(pl_module, arguments, interface):
            self._check_disjoint(trainer)
            trainer.print(
                f"{self.prefix}: the first batch shows what reads the network's inputs and makes "
                "its outputs; the groups are now"
            )
            self._attach(trainer, pl_module)
            assert self.regularizer is not None
            self._taken = [pruner.taken for pruner in self.regularizer.pruners]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to this fit's optimizers and continue from the saved state, if any."""
        release_hparams(self._held_back)
        if restores_later(trainer):
            self._group(trainer, pl_module)
        assert self.regularizer is not None
        self._averages_masked, self._fixed_at = False, None
        steps = trainer.estimated_stepping_batches
        self.regularizer.total_steps = int(steps) if 0 < steps < math.inf else None
        done = logged_step(trainer)
        if done and not self._state and self.regularizer.total_steps is not None:
            # Resumed from a run without this callback: the schedule has the steps that are left.
            to_come = steps_left(trainer) or self.regularizer.total_steps - done
            self.regularizer.total_steps = max(to_come, 1)
            trainer.print(
                f"{self.prefix}: {done} steps were trained without pruning; the schedule runs over "
                f"the {self.regularizer.total_steps} that are left"
            )

        def before_saving(module: nn.Module, *_: Any) -> None:  # of a copy it stays as it is
            if module is pl_module:
                self._keep_masks("before the weights were saved")

        self._saving = pl_module.register_state_dict_pre_hook(before_saving)  # type: ignore[no-untyped-call]  # torch gives none
        self._said_lost = self._said_idle = self._said_thawed = False
        self._attach(trainer, pl_module)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.regularizer is not None
        done = logged_step(trainer)
        self.regularizer.attach(*trainer.optimizers)
        self.regularizer.watch()
        self._twins = list(twins(pl_module, self.regularizer.groups))
        if self._state:
            self.regularizer.load_state_dict(self._state)
            self._state = {}
            left = steps_left(trainer)
            if left is not None and (words := self.regularizer.replan(left, done)):
                trainer.print(f"{self.prefix}: {words}")
        self._waiting = self.regularizer.waiting()
        if self._waiting:
            warnings.warn(
                f"{', '.join(self._waiting)}: no optimizer trains these layers; they keep all "
                "their groups until one does (leave them out with exclude to silence this)",
                stacklevel=2,
            )
        self._summary = PruningSummary(trainer, self.regularizer, self.prefix, self.dashboard)
        write_layout(trainer, self)
        self._forget_batches()
        if self.update_bn and not self.regularizer.frozen:
            self._statistics = BatchNormUpdate(pl_module, self.update_bn)
            self._batches_frozen = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what the training step gives to the network."""
        if self._assumed:
            self._look_at(trainer, pl_module, batch)
        if self._statistics is not None:
            self._statistics.start()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Remember nothing of a backward pass, in which checkpointed modules are called again."""
        if self._statistics is not None:
            self._statistics.pause()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on remembering: there may be several losses."""
        if self._statistics is not None:
            self._statistics.resume()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate BatchNorm's running statistics anew, as long as groups disappear."""
        self._update_bn(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what is due; from the freeze on, keep averages of the weights sparse, too."""
        assert self.regularizer is not None
        assert self._summary is not None
        if self._statistics is not None:
            self._statistics.pause()
            self._batches_frozen += self.regularizer.frozen
            if self._batches_frozen > self.update_bn:
                self._forget_batches()
        if self.regularizer.frozen and not self._averages_masked:
            self._averages_masked = True  # an average of zeros stays zero
            if not self._summary.announced:  # by an earlier run
                self._fixed_at = time.time()
            self._summary.freeze(trainer)
            for average in average_models(trainer):
                apply_masks_to(average, self.regularizer.groups, self.regularizer.masks)
            for twin in self._twins:
                twin.mask(self.regularizer.groups, self.regularizer.masks)
        if not self.regularizer.frozen:
            self._summary.foretell(trainer)
        # With the last batch monitors find the metrics at the end of every epoch.
        due = logs_are_due(trainer) or trainer.is_last_batch
        if due and not trainer.barebones:
            self.regularizer.check_finite()
            for key, value in self.regularizer.metrics().items():
                pl_module.log(f"{self.prefix}/{key}", value, prog_bar=key in ("sparsity", "gap"))
            self._summary.log(trainer)
        self._offer_metrics(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count proximal steps."""
        assert self.regularizer is not None
        self._taken = [pruner.taken for pruner in self.regularizer.pruners]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so, once, if a whole epoch passed without a proximal step on some layers."""
        assert self.regularizer is not None
        self._offer_metrics(trainer)
        self._say_what_thawed(trainer)
        idle = [
            layer.name
            for before, pruner in zip(self._taken, self.regularizer.pruners, strict=False)
            if pruner.taken == before and not pruner.frozen
            for layer in pruner.groups.layers
        ]
        if idle and not self._said_idle:
            self._said_idle = True
            warnings.warn(
                f"no proximal step was taken on {', '.join(idle)} in epoch "
                f"{trainer.current_epoch}: no optimizer that trains them called step() with "
                "gradients, so that their groups do not compete and no mask is fixed. Step with "
                "optimizer.step() (a wrapper has to call that of the optimizer inside it), "
                "or leave these layers out with exclude=",
                stacklevel=2,
            )

    def _say_what_thawed(self, trainer: Trainer) -> None:
        assert self.regularizer is not None
        waiting = self.regularizer.waiting()
        if joined := [name for name in self._waiting if name not in waiting]:
            pruner = self.regularizer.pruners[-1]
            trainer.print(
                f"{self.prefix}: {', '.join(joined)} began to train in epoch "
                f"{trainer.current_epoch}; their schedule runs over the {pruner.total_steps} steps "
                "that were left then"
            )
        self._waiting = waiting
        thawed = self.regularizer.thawed()
        if thawed and not self._said_thawed:
            self._said_thawed = True
            # Layers that share one budget begin together, in one optimizer.
            alone = "with scope='layer' " if self.regularizer.groups.is_global else ""
            warnings.warn(
                f"{', '.join(thawed)}: frozen when the fit began, trained now, and in no group: "
                f"they stay dense. {alone}include={thawed} groups frozen layers from the start; "
                "they compete as soon as they train",
                stacklevel=2,
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Offer what was measured to checkpoints that wait for the freeze.

        Training goes on with the statistics as they were: a resumed run has no batches to look at.
        """
        if self._statistics is not None:
            self._statistics.restore()
        if self._saving is not None:  # within a fit
            self._offer_metrics(trainer)

    def _offer_metrics(self, trainer: Trainer) -> None:
        offer_pruned_metrics(trainer, self.prefix, frozen=self._kept_its_promise())

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Validate the network that the mask stands for, whatever was written before."""
        if batch_idx == 0 and self._saving is not None:  # within a fit
            self._keep_masks("before validation")

    def _keep_masks(self, when: str) -> None:
        assert self.regularizer is not None
        changed = self.regularizer.keep_masks()
        if changed and not self._said_lost:
            self._said_lost = True
            warnings.warn(
                f"{', '.join(changed)}: groups that the mask holds at zero were not zero {when}: "
                "something wrote weights after the optimizer's step (a hook, loaded weights, an "
                "average, or an optimizer with a second copy of them). They were set to zero "
                "again, and will be before every validation, in every checkpoint and at the end",
                stacklevel=2,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizers; say so if the budget was not reached."""
        assert self.regularizer is not None
        self.regularizer.check_finite()
        self._keep_masks("at the end of training")
        self.regularizer.detach()
        self._forget_batches()
        if self._summary is not None and not trainer.interrupted:
            example = self._example_input(trainer, pl_module)
            measured = self.regularizer.groups.latency is not None
            slims = (self.slim_to is None or measured) and self.regularizer.frozen
            self._summary.end(trainer, pl_module, example, slims=slims)
            write_hparams(trainer, self)
        if not self._kept_its_promise():
            alive = {name: int(mask.sum()) for name, mask in self.regularizer.masks.items()}
            steps = [x.freeze_rule.step for x in self.regularizer.pruners]
            due = f", due at step {steps[0]}" if steps and steps[0] is not None else ""
            unwritten = f" slim_to: {self.slim_to} was not written." if self.slim_to else ""
            warnings.warn(
                f"training ended before the mask was frozen{due}; groups alive: {alive}."
                f"{unwritten} Train longer, name a smaller max_epochs where something else ends "
                "training (early stopping), or take freeze= with a number of steps that it reaches",
                stacklevel=2,
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the network without its zero groups; training is not lost if that fails.

        Weights that the module loaded in its own ``on_train_end`` get the mask, too.
        """
        self._said_lost = False
        assert self.regularizer is not None
        if self.regularizer.frozen and trainer.is_global_zero:
            for words in dense_checkpoints(
                trainer, self.prefix, self.state_key, self.regularizer, self._fixed_at
            ):
                warnings.warn(words, stacklevel=2)
        try:
            self._keep_masks("after training (on_train_end)")
        except ValueError as error:
            nothing = "" if self.slim_to is None else "slim_to: nothing was written: "
            warnings.warn(f"{nothing}{error}", stacklevel=2)
            return
        finally:
            self._stop_watching()
        if self.slim_to is None or not self._kept_its_promise():
            return
        try:
            model = unsharded_copy(pl_module)  # of sharded weights every process has a part
            if not trainer.is_global_zero:
                return
            example = self._example_input(trainer, pl_module)
            report = write_slim(model, example, self.slim_to, self.arguments["multiple_of"])
        except Exception as error:  # whatever the network does on the way, training is over
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            warnings.warn(
                f"slim_to: nothing was written: {kind}{error}; to try again with the trained "
                "model, call slim and save_slim",
                stacklevel=2,
            )
        else:
            trainer.print(f"{self.slim_to}\n{report}")

    def _kept_its_promise(self) -> bool:
        """Return whether the mask is fixed, unless it never was to be."""
        never = self.arguments["freeze"] is None
        return never or (self.regularizer is not None and self.regularizer.frozen)

    def _example_input(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        given = self.arguments["example_input"]
        example = getattr(pl_module, "example_input_array", None) if given is None else given
        return None if example is None else trainer.precision_plugin.convert_input(example)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the optimizers."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        self._detach()

    def _forget_batches(self) -> None:
        if self._statistics is not None:
            self._statistics.remove()
            self._statistics = None

    def _update_bn(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._statistics is None:
            return
        try:
            with silent(pl_module), trainer.precision_plugin.forward_context():
                self._statistics.update()
        except Exception as error:  # whatever the network does when it is called once more
            self._forget_batches()
            warnings.warn(
                f"update_bn={self.update_bn}: BatchNorm's running statistics stay as they were "
                f"trained, for the network could not be called once more with what the training "
                f"step gave it ({type(error).__name__}: {error}). update_bn=0 silences this",
                stacklevel=2,
            )

    def _stop_watching(self) -> None:
        if self._saving is not None:
            self._saving.remove()
            self._saving = None

    def _detach(self) -> None:
        self._stop_watching()
        release_hparams(self._held_back)
        if self._statistics is not None:
            self._statistics.restore()
        self._forget_batches()
        if self.regularizer is not None:
            self.regularizer.detach()
