"""HESSO of OTO 3.0 (Chen et al., 2024), fitted to the protocol, in an environment of its own.

The published package was written for an older torch and for GPUs. What it misses is given to it
here: internals of torch that have moved, a mask that stays where the weights are, and a state that
checkpoints can hold.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.onnx._internal.torchscript_exporter import _globals, utils
from torch.optim import Optimizer

from examples.benchmark.method_api import Pruning, Situation
from lightning_wgsef import Groups, group_parameters

sys.modules["torch.onnx._globals"] = _globals
torch.onnx._optimize_graph = utils._optimize_graph
sys.modules.setdefault("imp", ModuleType("imp"))  # imported there, unused; Python 3.12 has none
try:
    from only_train_once import OTO
    from only_train_once.optimizer import HESSO
except ModuleNotFoundError as error:
    if error.name != "only_train_once":
        raise
    raise ModuleNotFoundError(
        "HESSO needs the package only_train_once: 'make oto-environment' makes .venv-oto, and "
        "'.venv-oto/bin/python -m examples.benchmark' runs suites with it",
        name=error.name,
    ) from error

PERIODS = 10
"""Rounds of choosing and shrinking groups, as in the examples of OTO."""


class ResumableHESSO(HESSO):
    """HESSO that checkpoints hold, that runs on any device, and that meets its budget.

    It keeps one group of a layer that would lose all, and ends above its budget by as many. What is
    above is cut after the last round, by its own scores.

    Args:
        params: the groups of `ordered`. They come in the same order in every process, so that a
            state, which numbers them, fits the optimizer of a resumed run.
        settings: of HESSO.
    """

    KEPT = (
        "num_steps",
        "curr_pruning_period",
        "pruned_group_idxes",
        "pruned_idxes",
        "active_redundant_idxes",
        "first_moment_grads",
        "second_moment_grads",
    )

    def __init__(self, params: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(params, **settings)
        self.last_step = self.start_pruning_step + self.pruning_steps - 1
        self.redundant = self.target_num_redundant_groups  # it lowers its own target

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """As published, then the cut, if it is time."""
        super().step(closure)
        excess = self.redundant - self.curr_num_zero_groups
        if self.num_steps == self.last_step and excess > 0:
            self._cut(excess)

    def _cut(self, excess: int) -> None:
        """Take the weakest groups; every layer keeps its strongest."""
        self.compute_importance_scores()
        weakest = []
        for group in self.param_groups:
            if group["is_prunable"]:
                scores = group["importance_scores"]["overall"].tolist()
                alive = sorted(self.important_idxes[group["id"]], key=scores.__getitem__)
                weakest += [(scores[index], group["id"], index) for index in alive[:-1]]
        for _, layer, index in sorted(weakest)[:excess]:
            self.active_redundant_idxes[layer].append(index)
        self.commit_redundant_idxes()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data[self.pruned_idxes[group["id"]]] = 0

    def identify_redundant_groups(self) -> None:
        """As published, but what it sends to a GPU goes where the weights are."""
        device = self.param_groups[0]["params"][0].device
        with patch.object(Tensor, "cuda", lambda tensor: tensor.to(device)):
            super().identify_redundant_groups()

    def state_dict(self) -> dict[str, Any]:
        """What it cannot work out again: counters, chosen groups and moments."""
        shrinking = [group.get("active_redundant_bool") for group in self.param_groups]
        return {"shrinking": shrinking, **{key: getattr(self, key) for key in self.KEPT}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        device = self.param_groups[0]["params"][0].device
        state = move_data_to_device(state_dict, device)
        for key in self.KEPT:
            setattr(self, key, state[key])
        for group, mask in zip(self.param_groups, state["shrinking"], strict=True):
            group["active_redundant_bool"] = mask


def hesso(situation: Situation, start: float) -> Pruning:
    """HESSO: all channels compete; the weakest shrink to zero in rounds.

    Args:
        situation: network, task and example.
        start: share of training before the first round.
    """
    arguments = situation.groups(scope="global")

    def wrap(optimizer: Optimizer, network: nn.Module, steps: int) -> Optimizer:
        groups = group_parameters(network, **arguments)
        (own,) = optimizer.param_groups
        kind = situation.task.optimizer
        redundant = len(groups) - float(groups.budgets.sum())
        last = int(situation.task.freeze * steps + 0.5)
        left = last + 1 - int(start * steps)
        periods = max(min(PERIODS, left // 3), 1)  # shorter rounds would not shrink, but cut
        duration = max(left // periods, 1)
        # It takes views of weights, which those of other memory formats do not have.
        network.to(memory_format=torch.contiguous_format)
        with redirect_stdout(io.StringIO()):
            return ResumableHESSO(
                ordered(network, groups, situation.example),
                variant=kind,
                lr=own["lr"],
                first_momentum=own["momentum"] if kind == "sgd" else own["betas"][0],
                second_momentum=None if kind == "sgd" else own["betas"][1],
                weight_decay=own["weight_decay"],
                target_group_sparsity=(redundant + 0.5) / len(groups),  # it rounds down
                # The last step of a round is one before the first of the next.
                start_pruning_step=last + 1 - periods * duration,
                pruning_steps=periods * duration,
                pruning_periods=periods,
            )

    return Pruning(wrap=wrap, groups=arguments)


def ordered(network: nn.Module, groups: Groups, example: Tensor) -> list[dict[str, Any]]:
    """OTO's groups of parameters by name; it can prune those that are ours, too.

    Its own order follows the addresses of objects.

    Raises:
        ValueError: it finds other groups than ours, or not all parameters.
    """
    training = network.training
    device = next(network.parameters()).device
    found = list(OTO(network, example.to(device))._graph.get_param_groups())
    network.train(training)  # it leaves the network in evaluation mode
    for group in found:
        order = sorted(range(len(group["p_names"])), key=group["p_names"].__getitem__)
        for key in ("p_names", "params", "op_names", "p_transform"):
            group[key] = [group[key][i] for i in order]
        group["id"] = group["p_names"][0]
    found.sort(key=lambda group: group["id"])
    ours = {
        (layer.count, *sorted((member.name, member.axes) for member in layer.members))
        for layer in groups.layers
    }
    pruned = set()
    for group in found:
        described = (group["num_groups"], *((name, (0,)) for name in group["p_names"]))
        group["is_prunable"] &= described in ours
        if group["is_prunable"]:
            pruned.add(described)
    if pruned != ours:
        raise ValueError(f"OTO finds no such groups: {sorted(ours - pruned)}")
    names = {name for group in found for name in group["p_names"]}
    missing = {name for name, _ in network.named_parameters()} - names
    if missing:
        raise ValueError(f"OTO does not train {sorted(missing)}")
    return found
