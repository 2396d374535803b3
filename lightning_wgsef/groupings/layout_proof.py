"""Proof of layouts: whether weights that are taken for one head or hidden unit are that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.members import Member
from lightning_wgsef.network.equivalence import TOLERANCE, relative_difference
from lightning_wgsef.network.example_input import (
    observed,
    perturbed,
    run_example,
    seeded,
    tensors,
)
from lightning_wgsef.network.experts import EveryExpert
from lightning_wgsef.network.layers import canonical_name, modules_by_name


@torch.no_grad()
def proved_layouts(
    model: nn.Module, example_input: Any, candidates: Mapping[str, list[GroupedLayer]]
) -> tuple[dict[str, GroupedLayer], dict[str, str]]:
    """Find which layouts of units are right: heads of attention, or hidden units.

    Of a unit the last member reads what the others make. With that at zero for half of the units of
    a layer the others may be anything: outputs are compared with weights as they are and drawn. A
    layout that puts weights into a wrong unit does not pass.

    Args:
        model: any module; it is copied, not touched.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        candidates: layouts by name of the layer, in the order in which they are tried.

    Returns:
        The layouts that pass, and the names of the layers of which none does, with what the network
        said where it did not run, "" elsewhere.

    >>> from lightning_wgsef.groups.members import Member
    >>> network = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    >>> up, down = (layer.weight for layer in network)
    >>> order = torch.tensor([1, 0, 3, 2])
    >>> right, wrong = (
    ...     GroupedLayer("0", "hidden", 4, (Member("0.weight", up, (0,), index), reader))
    ...     for reader in [Member("1.weight", down, (1,))]
    ...     for index in (None, order)
    ... )
    >>> found, failed = proved_layouts(network, torch.ones(1, 2), {"0": [wrong, right]})
    >>> found["0"] is right, failed
    (True, {})
    """
    network = perturbed(model)
    found: dict[str, GroupedLayer] = {}
    failed: dict[str, str] = {}
    pending = {name: list(layouts) for name, layouts in candidates.items()}
    while pending:
        tried = [layouts.pop(0) for layouts in pending.values()]
        wrong = _wrong(network, example_input, tried)
        found.update({layer.name: layer for layer in tried if layer.name not in wrong})
        failed.update({name: wrong[name] for name in wrong if not pending[name]})
        pending = {name: x for name, x in pending.items() if x and name in wrong}
    return found, failed


def _wrong(network: nn.Module, example_input: Any, layers: list[GroupedLayer]) -> dict[str, str]:
    """Find the layers whose groups are no units: all at once, and by halves where that fails."""
    try:
        if _are_units(network, example_input, layers):
            return {}
        reason = ""
    except ValueError as error:
        reason = f"not known: {error}"
    if len(layers) == 1:
        return {layers[0].name: reason}
    middle = len(layers) // 2
    halves = layers[:middle], layers[middle:]
    wrong = {n: why for half in halves for n, why in _wrong(network, example_input, half).items()}
    return wrong or {layer.name: reason for layer in layers}


def _are_units(network: nn.Module, example_input: Any, layers: list[GroupedLayer]) -> bool:
    """Compare outputs, without what reads some of the units, with these as they are and redrawn.

    In turn those units go whose number, from 1 on, has a bit set: each goes once, and any two are
    told apart by one of them, so that a layout which exchanges weights of two units does not pass.
    """
    named = network.named_parameters(remove_duplicate=False)  # a shared layer has several names
    parameters = {canonical_name(name): p for name, p in named}
    first, second = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    # The weights of the network itself may be zero, which would let any layout pass.
    members = [member for layer in layers for member in layer.members]
    drawn, others = (
        {x.name: _drawn(x, generator).to(parameters[x.name]) for x in members}
        for generator in (first, second)
    )
    others.update({layer.members[-1].name: torch.zeros(()) for layer in layers})
    readers = [layer.members[-1].name.rpartition(".")[0] for layer in layers]
    for bit in range(max(layer.count.bit_length() for layer in layers)):
        outputs = []
        for redrawn in (False, True):
            for name, values in drawn.items():
                parameters[name].copy_(values)
            for layer in layers:
                dead = (torch.arange(1, layer.count + 1) >> bit) % 2 == 1
                for member in layer.members if redrawn else layer.members[-1:]:
                    values = parameters[member.name]
                    gone = member.along(dead.to(values.device), False)
                    values.copy_(torch.where(gone, others[member.name].to(values), values))
            outputs.append(_outputs(network, example_input, readers))
        finite = all(bool(x.isfinite().any()) for x in outputs[0] if x.numel())
        if not finite or not relative_difference(outputs[1], outputs[0], 1.0) <= TOLERANCE:
            return False
    return True


def _outputs(network: nn.Module, example_input: Any, readers: list[str]) -> list[Tensor]:
    """Return what some layers make, and the network itself."""
    modules = modules_by_name(network)
    seen: list[Tensor] = []

    def note(_: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        seen.extend(x.clone() for x in tensors(output))

    every = EveryExpert(network)
    watched = observed({name: modules[name] for name in readers}, after=note)
    with seeded(network), watched, every.watching():
        found = tensors(run_example(network, example_input))
        others = every.others(lambda: run_example(network, example_input))
    return seen + found + [x for outputs in others.values() for x in outputs]


def _drawn(member: Member, generator: torch.Generator) -> Tensor:
    """Draw weights like those of a member, of which every output is about 1."""
    noise = torch.randn(member.parameter.shape, generator=generator)
    scale: float = (member.slice_size if member.parameter.dim() > 1 else 1) ** -0.5
    return noise * scale
