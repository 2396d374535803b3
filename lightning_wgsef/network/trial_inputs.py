"""Trial inputs: what a removal is tried on, and the parts of a network that run on none of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.network.dependency_graph import CoupledChannels, Graph
from lightning_wgsef.network.equivalence import Outputs, layer_outputs, trained
from lightning_wgsef.network.example_input import accepted_variation, doubled
from lightning_wgsef.network.interface import InterfaceObserver, idle_parts
from lightning_wgsef.network.layers import weighted_layers
from lightning_wgsef.network.variations import variations

_MOST_CHECKS = 32


class TrialInputs:
    """Inputs that a removal is tried on: an example, its variations, others, and one to train on.

    Args:
        network: in evaluation mode; it is run, and copies of it in training mode.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        check: more inputs, such as a loader of batches; of one that ``forward`` does not take as a
            whole, its first part (without labels) is taken. The first 32 are used.

    Attributes:
        examples: the inputs for evaluation mode, ``example_input`` first.
        training_example: an input for training mode; None where the network runs on none.
        outputs: what the network returns on each of them, that for training last.
        fixed: names or places of tensors of the example that could not be varied.
        idle: the largest modules of which no layer ran on any of them, by name, with their layers.

    Raises:
        ValueError: inputs on which the network does not run.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> network.unused = nn.Linear(3, 3)
    >>> network.forward = lambda x: network[1](network[0](x))
    >>> inputs = TrialInputs(network.eval(), torch.ones(1, 2))
    >>> len(inputs.examples), inputs.idle
    (4, {'unused': ['unused']})
    """

    def __init__(self, network: nn.Module, example_input: Any, check: Any = None) -> None:
        self.network = network
        self.examples: list[Any] = []
        self.training_example: Any | None = None
        self.outputs: list[Outputs] = []
        self._ran: set[str] = set()
        self._add(example_input)
        _, self.fixed = variations(example_input, self._runs)
        if self.fixed:
            other = accepted_variation(network, example_input)
            if other is not None:
                self._add(other)
        self._check(check)
        # Some networks cannot train on an example; graphs and sorted lengths cannot be joined.
        for example in (doubled(example_input, self.examples[-1]), *self.examples):
            if self._trains(example):
                break
        layers = {layer.name: layer for layer in weighted_layers(network) if not layer.problem}
        self.idle = dict(idle_parts(list(layers), self._ran))
        idle = [name for own in self.idle.values() for name in own]
        # As they stay: what did not run is not cut.
        self._widths = {name: (layers[name].inputs, layers[name].outputs) for name in idle}

    def _run(self, network: nn.Module, example: Any) -> Outputs:
        """Run the network or a copy on an input, and note the layers that run."""
        observer = InterfaceObserver(network)
        with torch.no_grad(), observer.watching():
            outputs = layer_outputs(network, example)
        self._ran |= observer.ran
        return outputs

    def _add(self, example: Any) -> None:
        self.outputs.append(self._run(self.network, example))
        self.examples.append(example)

    def _runs(self, example: Any) -> bool:
        try:
            self._add(example)
        except ValueError:
            return False
        return True

    def _trains(self, example: Any) -> bool:
        """Try removals in training mode, too, if the network runs in it."""
        try:
            self.outputs.append(self._run(trained(self.network), example))
        except ValueError:
            return False
        self.training_example = example
        return True

    def _check(self, check: Any) -> None:
        """Run the inputs of ``check``, as the network takes them."""
        if check is None:
            return
        if isinstance(check, Tensor | tuple | Mapping):
            check = [check]
        if not isinstance(check, Iterable):
            raise ValueError(f"check must be inputs, or a loader of them, got {check!r}")
        for number, batch in enumerate(islice(check, _MOST_CHECKS)):
            example = tuple(batch) if isinstance(batch, list) else batch
            refused = None
            while True:
                try:
                    self._add(example)
                except ValueError as error:
                    refused = refused or error
                    if not isinstance(example, tuple) or len(example) < 2:
                        message = str(refused).replace("example_input", f"check[{number}]", 1)
                        raise ValueError(message) from error
                    example = example[:-1]  # labels, which forward does not take
                else:
                    break

    def idle_user(self, graph: Graph, tied: CoupledChannels) -> str:
        """Name an idle part that could be given some channels, or could stand in for their maker.

        Which it would be given is not known. But it is called by a module around it, out of what
        that has at hand; and it reads or makes so many channels, or reads several flattened.

        Args:
            graph: of the network.
            tied: the channels.

        Returns:
            The name; "" where there is no such part.
        """
        if not self.idle:
            return ""
        widths = {graph.width(side) for side in tied.positions} - {None, 0, 1}
        parts: dict[tuple[str, str], list[str]] = {}
        for name in self._widths:
            owner = next((x for x in _around(name) if x in graph.results), "")
            child = name.removeprefix(f"{owner}.").partition(".")[0]
            parts.setdefault((owner, f"{owner}.{child}".lstrip(".")), []).append(name)
        for (owner, part), own in parts.items():
            read, made = self._widths[own[0]][0], self._widths[own[-1]][1]
            fits = any(read % width == 0 or made == width for width in widths if width)
            if fits and graph.has_at_hand(owner, tied):
                return part
        return ""


def _around(part: str) -> Iterator[str]:
    """Yield the names of the modules around a part, from the inmost to the network, ""."""
    while part:
        part = part.rpartition(".")[0]
        yield part
