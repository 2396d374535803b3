"""Make a network physically smaller: take out what is zero, and prove that the outputs agree."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_wgsef.groupings.head import head_groups
from lightning_wgsef.groupings.hidden import hidden_groups
from lightning_wgsef.groupings.unit_removal import unit_removal
from lightning_wgsef.network.dependency_graph import Graph, build_graph
from lightning_wgsef.network.equivalence import check_outputs, differing_layer
from lightning_wgsef.network.example_input import (
    accepted_variation,
    doubled,
    model_copy,
    run_example,
    seeded,
    tensors,
)
from lightning_wgsef.network.layers import canonical_name, unwrap
from lightning_wgsef.network.residual import residual_blocks
from lightning_wgsef.network.surgery import RemovalPlan, channel_removal, check_optimizer
from lightning_wgsef.slimming.dead_channels import DeadChannels, dead_channels, has_zero_channels
from lightning_wgsef.slimming.dead_units import DeadUnits, dead_units

_Candidate = TypeVar("_Candidate")


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
    """

    plans: list[RemovalPlan] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    difference: tuple[float | None, float | None] = (None, None)

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
        return "\n".join(lines + [f"kept, {name}: {why}" for name, why in self.kept.items()])


def slim(
    model: nn.Module,
    example_input: Any,
    masks: Mapping[str, Tensor] | None = None,
    *,
    inplace: bool = False,
    optimizer: Optimizer | None = None,
) -> nn.Module:
    """A network without the groups that are zero, with the same outputs.

    Taken out are residual blocks whose weights are all zero, attention heads and hidden units that
    nothing reads, and channels that nothing reads or that are zero whatever the input is. Channels
    that are another constant are folded into the biases of the layers that read them, where that is
    exact. Everything else stays, and the reason is in ``slimming.kept`` of what is returned.

    Every removal is tried on a copy: what layers and the network return on the example and on
    random inputs must agree within 1e-5 of the largest output, in evaluation mode and, where the
    network is not random in it, in training mode. Where float32 is too coarse for that (a norm may
    make its rounding large), float64 decides.

    Args:
        model: any module, with its zeros.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        masks: tensors shaped like parameters, by name: where they are zero, the weight is set to
            zero first. None: the zeros are the model's own.
        inplace: make ``model`` itself smaller. Its parameters stay the same objects.
        optimizer: with ``inplace``, its state is cut in the same way, so that training goes on.

    Returns:
        The network; its ``slimming`` says what was done.

    Raises:
        ValueError: low precision, no tensor returned, an example that does not fit, masks of
            another model, an optimizer whose state cannot be cut, or outputs that differ; ``model``
            is as it was.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> _ = network[2].weight.data[:, :6].zero_()
    >>> small = slim(network, torch.ones(1, 3, 8, 8))
    >>> small[0].out_channels, small[2].in_channels, network[0].out_channels
    (2, 2, 8)
    """
    if optimizer is not None and not inplace:
        raise ValueError("optimizer needs inplace=True: it holds the parameters of model itself")
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"model must be float32 or float64: '{name}' is {parameter.dtype}, too coarse to "
                "prove that the outputs agree; take slim(model.float(), ..)"
            )
    network = model_copy(model)
    modes = {canonical_name(name): module.training for name, module in network.named_modules()}
    _apply(network, masks)
    network.eval()
    with seeded(network):
        work = _Slimmer(network, example_input)
        before = model_copy(network)
        work.run()
        record = Slimming(
            [*getattr(model, "slimming", Slimming()).plans, *work.plans],
            work.kept,
            (_count(before), _count(network)),
            check_outputs(before, network, work.examples, work.training_example),
        )
    if inplace:
        _take_over(model, network, work.plans, optimizer)
        network = model
    for name, module in network.named_modules():
        module.training = modes.get(canonical_name(name), False)
    network.slimming = record  # type: ignore[assignment]  # plain data, no parameter
    return network


class _Slimmer:
    """Takes out of a network what can be taken out, round by round."""

    def __init__(self, network: nn.Module, example_input: Any) -> None:
        self.network = network
        self.examples = [example_input]
        self.training_example: Any | None = None
        self.plans: list[RemovalPlan] = []
        self.kept: dict[str, str] = {}
        with torch.no_grad():
            returned = run_example(network, example_input)
            if not tensors(returned):
                raise ValueError(
                    f"model must return tensors, which can be compared, alone or in a tuple, dict "
                    f"or dataclass; {type(network).__name__} returns {type(returned).__name__}"
                )
            other = accepted_variation(network, example_input)
            self.examples += [] if other is None else [other]
            self.constants = [(False, self.examples[-1])]
            twin = model_copy(network).train()
            # Some networks cannot train on an example; graphs and sorted lengths cannot be joined.
            for example in (doubled(example_input, self.examples[-1]), *self.examples):
                with contextlib.suppress(ValueError):
                    run_example(twin, example)
                    self.training_example = example
                    self.constants.append((True, example))
                    break

    def run(self) -> None:
        """Until nothing is left that can be taken out."""
        self._blocks()
        blocks, count = self.kept, -1
        while count < len(self.plans):
            count = len(self.plans)
            self.kept = dict(blocks)  # what stays for a reason is tried again in every round
            for find in (head_groups, hidden_groups):
                groups = find(self.network, self.examples[0])
                units = {found.layer.name: found for found in dead_units(groups)}
                for widths in (False, True):
                    before = dict(self.kept)
                    for name in self._take(units, partial(_units_plan, self.network, widths)):
                        del units[name]
                        before.pop(name, None)
                    self.kept.update(before)  # the first reason is the plainer one
            if not has_zero_channels(self.network):
                continue
            try:
                graph = build_graph(self.network, self.examples[0])
            except ValueError as error:
                self.kept["channels"] = str(error)
                continue
            plain = _without_bias(self.network)
            dead, kept = dead_channels(graph, self.network, self.constants)
            self.kept.update(kept)
            if biased := plain - _without_bias(self.network):
                self.plans.append(RemovalPlan(biases=sorted(biased)))
            self._take({x.found.name: x for x in dead}, partial(_channels_plan, graph))

    def _blocks(self) -> None:
        zero = {
            canonical_name(name)
            for name, module in self.network.named_modules()
            if next(module.parameters(), None) is not None
            and not any(bool(parameter.any()) for parameter in module.parameters())
        }
        blocks = residual_blocks(self.network, self.examples[0]) if zero else []
        self._take(
            {name: name for name in blocks if name in zero},
            lambda names: RemovalPlan(skipped=list(names)),
        )

    def _take(
        self,
        candidates: Mapping[str, _Candidate],
        plan_of: Callable[[Sequence[_Candidate]], RemovalPlan],
    ) -> list[str]:
        """Take out all candidates that pass the trial, and name them."""
        good = self._passing(candidates, plan_of)
        plan = plan_of([candidates[name] for name in good])
        if plan:
            plan.apply(self.network)
            self.plans.append(plan)
        return good

    def _passing(
        self,
        candidates: Mapping[str, _Candidate],
        plan_of: Callable[[Sequence[_Candidate]], RemovalPlan],
    ) -> list[str]:
        names = list(candidates)
        failure = self._failure(plan_of(list(candidates.values()))) if names else ""
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
    def _failure(self, plan: RemovalPlan) -> str:
        smaller = copy.deepcopy(self.network)
        example = self.examples[0]
        try:
            plan.apply(smaller)
            name = differing_layer(self.network, smaller, example, plan)
        except ValueError as error:
            return f"the network does not run without its zero groups: {error.__cause__ or error}"
        return f"without its zero groups, {name} would differ" if name else ""


def _without_bias(network: nn.Module) -> set[str]:
    """Names of the layers that could have a bias, and have none."""
    return {
        canonical_name(name)
        for name, module in network.named_modules()
        if getattr(module, "weight", None) is not None and getattr(module, "bias", 0) is None
    }


def _units_plan(network: nn.Module, widths: bool, dead: Iterable[DeadUnits]) -> RemovalPlan:
    return unit_removal(network, [(x.layer, x.dead) for x in dead], widths=widths)


def _channels_plan(graph: Graph, dead: Iterable[DeadChannels]) -> RemovalPlan:
    """The plan that takes dead channels out."""
    return channel_removal(graph, [(x.found.tied, x.bundles) for x in dead])


def _apply(network: nn.Module, masks: Mapping[str, Tensor] | None) -> None:
    parameters = {canonical_name(name): p for name, p in network.named_parameters()}
    for name, mask in (masks or {}).items():
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
