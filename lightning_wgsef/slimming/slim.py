"""Make a network physically smaller: take out what is zero, and prove that the outputs agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_wgsef.groupings.experts import expert_groups
from lightning_wgsef.groupings.head import head_groups
from lightning_wgsef.groupings.hidden import hidden_groups
from lightning_wgsef.groupings.patterns import check_patterns, matches
from lightning_wgsef.groupings.unit_removal import unit_removal
from lightning_wgsef.groupings.width_limits import (
    Multiple,
    as_multiple,
    check_limits,
    multiple_of_groups,
)
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.network.channels import PRODUCERS, produced
from lightning_wgsef.network.dependency_graph import Graph, build_graph
from lightning_wgsef.network.equivalence import (
    OUTPUTS,
    TOLERANCE,
    Outputs,
    check_outputs,
    difference,
    is_random,
    kept_outputs,
    layers_agree_in_float64,
    outputs_of,
    trained,
)
from lightning_wgsef.network.example_input import model_copy, reason_of, run_example
from lightning_wgsef.network.experts import expert_modules
from lightning_wgsef.network.layers import canonical_name, modules_by_name, unwrap
from lightning_wgsef.network.residual import residual_blocks
from lightning_wgsef.network.surgery import RemovalPlan, channel_removal, check_optimizer
from lightning_wgsef.network.trial_inputs import TrialInputs
from lightning_wgsef.slimming.dead_channels import (
    DeadChannels,
    dead_channels,
    has_zero_channels,
    zeros_left,
)
from lightning_wgsef.slimming.dead_units import DeadUnits, dead_units
from lightning_wgsef.slimming.model_config import shapes_of, update_config
from lightning_wgsef.utils.validation import check_kind, check_model

_Candidate = TypeVar("_Candidate")

_ADVICE = "give inputs that run it with check=, or take it out of the network if nothing runs it"


@dataclass
class Slimming:
    """What `slim` did to a network.

    Attributes:
        plans: what was taken out, one round after the other.
        kept: why zero groups had to stay, by name of the layer.
        parameters: number of weights before and after.
        difference: largest difference of outputs in evaluation and in training mode, rounding
            included; None where the network does not train on the example or is random then, and
            of a loaded network.
        fixed: inputs that could not be varied, since the network refuses other values.
    """

    plans: list[RemovalPlan] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    difference: tuple[float | None, float | None] = (None, None)
    fixed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        before, after = self.parameters
        evaluated, trained = self.difference
        lines = [f"{before:,} -> {after:,} parameters ({after / max(before, 1):.1%})"]
        if evaluated is not None:
            lines.append(f"largest difference of outputs: {evaluated:.1e} in evaluation")
            lines[-1] += f", {trained:.1e} in training" if trained is not None else ""
        if before == after and not self.kept:
            lines.append(
                "nothing was taken out: no channel, head, hidden unit or block is zero as a whole; "
                "to_sparse stores single zeros, tiles and 2:4"
            )
        if self.fixed:
            lines.append(
                f"tried with the example's own values only: {', '.join(self.fixed)} (the network "
                "refuses others; check= takes more inputs)"
            )
        return "\n".join(lines + [f"kept, {name}: {why}" for name, why in self.kept.items()])


def slim(
    model: nn.Module,
    example_input: Any,
    masks: Mapping[str, Tensor] | None = None,
    *,
    check: Any = None,
    multiple_of: Multiple = 1,
    inplace: bool = False,
    optimizer: Optimizer | None = None,
) -> nn.Module:
    """A network without the groups that are zero, with the same outputs.

    Taken out are residual blocks and experts whose weights are all zero (a router goes on to choose
    among all experts, and those that are gone add nothing), attention heads and hidden units that
    nothing reads, and channels that nothing reads or that are zero whatever the input is. Channels
    that are another constant are folded into the biases of the layers that read them, where that is
    exact. Everything else stays, and the reason is in ``slimming.kept`` of what is returned.

    Every removal is tried on a copy: what layers and the network return on the example, on
    variations of it (other numbers, integers, lengths, masks, see `variations`) and on the inputs
    of ``check`` must agree within 1e-5 of the largest output, in evaluation mode and, where the
    network is not random in it, in training mode. Random numbers are the same on both sides. Where
    float32 is too coarse for that (a norm may make its rounding large), float64 decides. Layers
    that run on none of these inputs stay whole, with what they may read.

    Args:
        model: any module, with its zeros.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        masks: tensors shaped like parameters, by name: where they are zero, the weight is set to
            zero first. None: the zeros are the model's own.
        check: more inputs to try every removal on, such as a loader of batches; of a batch that
            ``forward`` does not take as a whole, its first part (without labels) is taken. The
            first 32 are used.
        multiple_of: widths that come out are multiples of this number of channels, or by patterns
            of the names of layers that make or read them: as many zero channels stay as that needs.
        inplace: make ``model`` itself smaller. Its parameters stay the same objects.
        optimizer: with ``inplace``, its state is cut in the same way, so that training goes on.

    Returns:
        The network; its ``slimming`` says what was done.

    Raises:
        ValueError: low precision, no tensor returned, an example or check that does not fit, masks
            of another model, an optimizer whose state cannot be cut, or outputs that differ;
            ``model`` is as it was.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> _ = network[2].weight.data[:, :6].zero_()
    >>> small = slim(network, torch.ones(1, 3, 8, 8))
    >>> small[0].out_channels, small[2].in_channels, network[0].out_channels
    (2, 2, 8)
    """
    check_model("model", model)
    check_limits(multiple_of, None, None)
    if optimizer is not None and not inplace:
        raise ValueError("optimizer needs inplace=True: it holds the parameters of model itself")
    check_precision(model)
    network = model_copy(model)
    if isinstance(multiple_of, Mapping):
        check_patterns("multiple_of", list(multiple_of), _names(network))
    modes = {canonical_name(name): module.training for name, module in network.named_modules()}
    _apply(network, masks)
    network.eval()
    work = _Slimmer(network, example_input, check, multiple_of)
    before, expected = model_copy(network), work.expected
    work.run()
    sized = shapes_of(before), example_input, work.plans
    if reason := update_config(network, *sized):
        work.kept["config"] = reason
    record = Slimming(
        [*getattr(model, "slimming", Slimming()).plans, *work.plans],
        work.kept,
        (_count(before), _count(network)),
        check_outputs(
            before, network, work.inputs.examples, work.inputs.training_example, expected
        ),
        work.inputs.fixed,
    )
    if inplace:
        _take_over(model, network, work.plans, optimizer)
        update_config(model, *sized)
        network = model
    for name, module in network.named_modules():
        module.training = modes.get(canonical_name(name), False)
    network.slimming = record  # type: ignore[assignment]  # plain data, no parameter
    return network


def own_multiples(model: nn.Module, multiple_of: Multiple) -> Multiple:
    """Leave out patterns of names that groups have and no layer of the model, such as "branches".

    >>> own_multiples(nn.Sequential(nn.Linear(2, 2)), {"0": 2, "branches": 4})
    {'0': 2}
    """
    if not isinstance(multiple_of, Mapping):
        return multiple_of
    names = _names(model)
    own = {x: n for x, n in multiple_of.items() if any(matches(x, name) for name in names)}
    return own or 1


def _names(model: nn.Module) -> list[str]:
    held = modules_by_name(model).items()
    return [name for name, module in held if name and any(True for _ in module.parameters())]


def check_precision(model: nn.Module) -> None:
    """Raise `ValueError` for weights that are too coarse to prove that outputs agree."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"model must be float32 or float64: '{name}' is {parameter.dtype}, too coarse to "
                "prove that the outputs agree; take model.float()"
            )


class _Slimmer:
    """Takes out of a network what can be taken out, round by round."""

    def __init__(
        self, network: nn.Module, example_input: Any, check: Any, multiple_of: Multiple
    ) -> None:
        self.network = network
        self.multiple_of = multiple_of
        self.plans: list[RemovalPlan] = []
        self.kept: dict[str, str] = {}
        self.inputs = TrialInputs(network, example_input, check)
        self.expected = self.inputs.outputs
        if not self.expected[0][OUTPUTS]:
            raise ValueError(
                f"model must return tensors, which can be compared, alone or in a tuple, dict or "
                f"dataclass; {type(network).__name__} returns "
                f"{type(run_example(network, example_input)).__name__}"
            )
        self._last: tuple[str, tuple[str, list[Outputs]]] = ("", ("", []))

    def run(self) -> None:
        """Until nothing is left that can be taken out."""
        self._blocks()
        before = dict(self.kept)
        for part in self.inputs.idle:
            before[part] = f"it ran on no input and stays as it is; {_ADVICE}"
        graph, count = None, -1
        while count < len(self.plans):
            count = len(self.plans)
            self.kept = dict(before)  # what stays for a reason is tried again in every round
            self._units(expert_groups(self.network))
            for find in (head_groups, hidden_groups):
                self._units(find(self.network, self.inputs.examples[0]))
            if not has_zero_channels(self.network):
                continue
            try:
                graph = build_graph(self.network, self.inputs.examples[0])
            except ValueError as error:
                self.kept["channels"] = str(error)
                continue
            self._channels(graph)
        for experts in expert_modules(self.network):
            rows = experts.router and next(experts.router[1].parameters())
            if experts.router and rows is not None and not bool(rows.any(1).all()):
                self.kept[experts.router[0]] = (
                    "it goes on to choose among all experts: its zero rows, for those that are "
                    "gone, stay"
                )
        if has_zero_channels(self.network) and graph is not None:
            for name, reason in zeros_left(graph, self.network).items():
                self.kept.setdefault(name, reason)

    def _blocks(self) -> None:
        zero = {
            canonical_name(name)
            for name, module in self.network.named_modules()
            if next(module.parameters(), None) is not None
            and not any(bool(parameter.any()) for parameter in module.parameters())
        }
        try:
            blocks = residual_blocks(self.network, self.inputs.examples[0]) if zero else []
        except Exception as error:  # blocks run alone, on what they were given
            self.kept["blocks"] = f"residual blocks cannot be run alone: {error}"
            return
        self._take(
            {name: name for name in blocks if name in zero},
            lambda names: RemovalPlan(skipped=list(names)),
        )

    def _units(self, groups: Groups) -> None:
        idle = {name for own in self.inputs.idle.values() for name in own}
        candidates = {}
        for found in dead_units(groups):
            layers = {member.name.rpartition(".")[0] for member in found.layer.members}
            if found.layer.obstacle:
                self.kept[found.layer.name] = found.layer.obstacle
            elif not layers & idle:
                step = multiple_of_groups(found.layer, self.multiple_of)
                dead = found.dead.nonzero().flatten().tolist()
                stay = self._staying(found.layer.name, dead, found.layer.count, step)
                found.dead[stay] = False
                if len(stay) < len(dead):
                    layer = replace(found.layer, multiple=step)
                    candidates[found.layer.name] = replace(found, layer=layer)
        self._take_twice(candidates, partial(_units_plan, self.network))

    def _channels(self, graph: Graph) -> None:
        examples = [(False, example) for example in self.inputs.examples]
        if self.inputs.training_example is not None:
            examples.append((True, self.inputs.training_example))
        folded = model_copy(self.network)
        dead, kept = dead_channels(graph, folded, examples)
        if not _same_weights(self.network, folded):
            outputs = self._outputs(folded)
            if self._differing(outputs, folded, RemovalPlan()):
                dead, kept = dead_channels(graph, self.network, examples, folding=False)
            else:
                self._fold(folded, outputs)
        self.kept.update(kept)
        candidates = {}
        for found in dead:
            if part := self.inputs.idle_user(graph, found.found.tied):
                self.kept[found.found.name] = (
                    f"'{part}', which ran on no input, may read its channels; {_ADVICE}"
                )
            else:
                step = self._multiple(graph, found)
                gone, count = sorted(found.bundles), found.found.tied.count
                stay = self._staying(found.found.name, gone, count, step)
                if len(stay) < len(gone):
                    found = replace(found, bundles=found.bundles - set(stay))
                    candidates[found.found.name] = found
        if graph.compared:
            self._take_twice(candidates, partial(_channels_plan, graph))
        else:
            self._take(candidates, partial(_channels_plan, graph, False))

    def _take_twice(
        self,
        candidates: dict[str, _Candidate],
        plan_of: Callable[[bool, Sequence[_Candidate]], RemovalPlan],
    ) -> None:
        """Take out what can be, and then what can be where modules are told other widths."""
        for widths in (False, True):
            before = dict(self.kept)
            for name in self._take(candidates, partial(plan_of, widths)):
                del candidates[name]
                before.pop(name, None)
            self.kept.update(before)  # the first reason is the plainer one

    def _staying(self, name: str, dead: list[int], count: int, step: int) -> list[int]:
        """Return which of the dead have to stay, so that the width is a multiple."""
        more = as_multiple(count - len(dead), count, step) - (count - len(dead))
        if step > 1 and more:
            self.kept[name] = f"{more} zero groups stay, to keep multiple_of = {self.multiple_of}"
        return dead[:more] if step > 1 else []

    def _multiple(self, graph: Graph, found: DeadChannels) -> int:
        """Return of how many bundles of channels the set keeps multiples."""
        asked = self.multiple_of
        tied = found.found.tied
        if isinstance(asked, Mapping):
            makers = [graph.names[module] for module, _ in produced(graph, tied)]
            readers = [
                graph.names[side[0].module]
                for side in tied.positions
                if side[0].type in PRODUCERS and not graph.outward(side)
            ]
            asked = next(
                (
                    number
                    for names in ([found.found.name, *makers], readers)
                    for pattern, number in asked.items()
                    if any(matches(pattern, name) for name in names)
                ),
                1,
            )
        return int(asked) // math.gcd(int(asked), len(tied.bundle) // tied.count)

    def _fold(self, folded: nn.Module, outputs: list[Outputs]) -> None:
        """Take over the weights of a copy in which constants are folded."""
        biased = _without_bias(self.network) - _without_bias(folded)
        if biased:
            plan = RemovalPlan(biases=sorted(biased))
            plan.apply(self.network)
            self.plans.append(plan)
        values = dict(folded.named_parameters())
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(values[name])
        self.expected, self._last = outputs, ("", ("", []))

    def _take(
        self,
        candidates: Mapping[str, _Candidate],
        plan_of: Callable[[Sequence[_Candidate]], RemovalPlan],
    ) -> list[str]:
        """Take out all candidates that pass the trial, and name them."""
        good = self._passing(candidates, plan_of)
        plan = plan_of([candidates[name] for name in good])
        if not plan:
            return []
        failure, outputs = self._trial(plan)
        if failure:  # each passes alone, and all of them do not
            alone, good = good, []
            for name in alone:
                more = plan_of([candidates[other] for other in (*good, name)])
                failure, tried = self._trial(more)
                if failure:
                    self.kept[name] = failure
                else:
                    good, plan, outputs = [*good, name], more, tried
            if not plan:
                return []
        plan.apply(self.network)
        self.plans.append(plan)
        self.expected, self._last = outputs, ("", ("", []))
        return good

    def _passing(
        self,
        candidates: Mapping[str, _Candidate],
        plan_of: Callable[[Sequence[_Candidate]], RemovalPlan],
    ) -> list[str]:
        names = list(candidates)
        failure = self._trial(plan_of(list(candidates.values())))[0] if names else ""
        if not failure:
            return names
        if len(names) == 1:
            self.kept[names[0]] = failure
            return []
        middle = len(names) // 2
        halves = names[:middle], names[middle:]
        return [
            name
            for half in halves
            for name in self._passing({n: candidates[n] for n in half}, plan_of)
        ]

    @torch.no_grad()
    def _trial(self, plan: RemovalPlan) -> tuple[str, list[Outputs]]:
        """Say how the outputs differ without what the plan takes out; and what they are then."""
        key = repr(plan)
        if self._last[0] != key:
            smaller = model_copy(self.network)
            try:
                plan.apply(smaller)
                outputs = self._outputs(smaller)
                failure = self._differing(outputs, smaller, plan)
            except Exception as error:  # a cut that does not fit may end in anything
                failure = f"the network does not run without them: {reason_of(error)}"
                outputs = []
            self._last = key, (failure, outputs)
        return self._last[1]

    def _outputs(self, network: nn.Module) -> list[Outputs]:
        return outputs_of(network, self.inputs.examples, self.inputs.training_example)

    @torch.no_grad()
    def _differing(self, found: list[Outputs], smaller: nn.Module, plan: RemovalPlan) -> str:
        """Name what differs from the network as it is, and where; "" where nothing does."""
        for place, (outputs, own) in enumerate(zip(found, self.expected, strict=True)):
            expected = kept_outputs(own, self.network, plan)
            name = difference(outputs, expected, TOLERANCE)
            if not name:
                continue
            networks = (self.network, smaller)
            if place < len(self.inputs.examples):
                example, where = self.inputs.examples[place], " for other inputs" if place else ""
            else:
                networks = trained(self.network), trained(smaller)
                example, where = self.inputs.training_example, " in training"
            if where == " in training" and is_random(networks[0], example, own):
                continue  # other numbers are drawn than before
            if not layers_agree_in_float64(*networks, example, plan):
                return f"without its zero groups, {name} would differ{where}"
        return ""


def _without_bias(network: nn.Module) -> set[str]:
    """Names of the layers that could have a bias, and have none."""
    return {
        canonical_name(name)
        for name, module in network.named_modules()
        if getattr(module, "weight", None) is not None and getattr(module, "bias", 0) is None
    }


def _units_plan(network: nn.Module, widths: bool, dead: Iterable[DeadUnits]) -> RemovalPlan:
    return unit_removal(network, [(x.layer, x.dead) for x in dead], widths=widths)


def _channels_plan(graph: Graph, widths: bool, dead: Iterable[DeadChannels]) -> RemovalPlan:
    return channel_removal(graph, [(x.found.tied, x.bundles) for x in dead], widths=widths)


def _apply(network: nn.Module, masks: Mapping[str, Tensor] | None) -> None:
    parameters = {canonical_name(name): p for name, p in network.named_parameters()}
    masks = {} if masks is None else masks
    check_kind("masks", masks, Mapping, "a mapping from names of parameters to tensors")
    for name, mask in masks.items():
        check_kind(f"masks[{name!r}]", mask, Tensor, "a tensor of the parameter's shape")
        parameter = parameters.get(canonical_name(name))
        if parameter is None:
            raise ValueError(
                f"masks: {type(network).__name__} has no parameter {name!r}; its parameters are "
                f"{', '.join(parameters)}"
            )
        if mask.shape != parameter.shape:
            raise ValueError(
                f"masks: {name!r} must have the shape of the parameter, {tuple(parameter.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        parameter.detach().masked_fill_(mask.to(parameter.device) == 0, 0)


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=False)
    return _without_bias(one) == _without_bias(other) and all(torch.equal(a, b) for a, b in pairs)


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _take_over(
    model: nn.Module, slimmed: nn.Module, plans: list[RemovalPlan], optimizer: Optimizer | None
) -> None:
    """Do to the model what was done to its copy, with the values of the copy."""
    inner = unwrap(model)
    if optimizer is not None:
        check_optimizer(inner, optimizer)
    for plan in plans:
        plan.apply(inner, optimizer)
    values = {canonical_name(name): p for name, p in slimmed.named_parameters()}
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            parameter.copy_(values[canonical_name(name)])
