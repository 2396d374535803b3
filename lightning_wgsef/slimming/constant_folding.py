"""Channels that do not depend on the input, and how they are folded into what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.network.equivalence import train_without_dropout
from lightning_wgsef.network.example_input import observed, run_example
from lightning_wgsef.network.look_alikes import acts_like


def constants(
    network: nn.Module,
    modules: Mapping[str, nn.Module],
    places: Mapping[str, Sequence[int]],
    examples: Iterable[tuple[bool, Any]],
) -> dict[str, Tensor]:
    """What layers read at some of their input channels, where that is the same everywhere.

    Seen on every example, at every position.

    Args:
        network: a network that may be run in any mode: a copy.
        modules: its modules by name.
        places: input channels, by name of the layer that reads them.
        examples: whether to train, without dropout, and inputs, as `run_example` takes them.

    Returns:
        The constant of every channel, by name of the layer; NaN where it varies or is never read.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1))
    >>> _ = network[0].weight.data[0].zero_(), network[0].bias.data.zero_()
    >>> places = {"2": [0, 1]}
    >>> constants(network, dict(network.named_modules()), places, [(False, torch.randn(4, 2))])
    {'2': tensor([0.5000,    nan])}
    """
    found: dict[str, Tensor] = {}

    def look(name: str, module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(named.values()))
        axis = 1 - module.weight.dim()  # -1 for dense layers, -3 for images
        index = torch.tensor(places[name], device=given.device)
        channels = given.index_select(axis, index).movedim(axis, 0).flatten(1)
        lowest, highest = channels.amin(1), channels.amax(1)
        known = found.setdefault(name, lowest)
        same = (lowest == highest) & torch.isclose(known, lowest, rtol=1e-6, atol=0)
        found[name] = known.where(same, torch.nan)

    readers = {name: modules[name] for name in places}
    with torch.no_grad(), torch.random.fork_rng([]), observed(readers, look):
        for mode, example in examples:
            (train_without_dropout if mode else nn.Module.eval)(network)
            run_example(network, example)
    unseen = {name: torch.full((len(places[name]),), torch.nan) for name in places}
    return {**unseen, **found}


def fold(layer: Any, positions: Iterable[int], values: Tensor) -> str:
    """Move constant input channels of a layer into its bias, and zero the weights that read them.

    The layer gets a bias if it has none. Exact for dense layers, and for convolutions whose border
    shows the same constant as the rest.

    Returns:
        "" if it was done, else why it cannot be.

    >>> layer = nn.Linear(2, 1)
    >>> inputs = torch.tensor([[0.5, 3.0]])
    >>> before = layer(inputs)
    >>> fold(layer, [0], torch.tensor([0.5])), bool(torch.allclose(layer(inputs), before))
    ('', True)
    >>> layer.weight[0, 0].item()
    0.0
    >>> fold(nn.Conv2d(2, 1, 3, padding=1), [0], torch.tensor([0.5]))
    'a constant that is not zero meets the zeros of its padding'
    """
    where = list(positions)
    biased = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Linear) or (acts_like(layer) is nn.Linear and biased):
        weight = layer.weight.detach()
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
        padded = layer.padding not in ("valid", (0,) * len(layer.kernel_size))
        if padded and layer.padding_mode == "zeros":
            return "a constant that is not zero meets the zeros of its padding"
        weight = layer.weight.detach().flatten(2).sum(2)
    else:
        return f"a constant that is not zero cannot be folded into a {type(layer).__name__}"
    with torch.no_grad():
        if layer.bias is None:
            layer.bias = nn.Parameter(weight.new_zeros(len(weight)))
        layer.bias += weight[:, where] @ values.to(weight)
        layer.weight[:, where] = 0
    return ""
