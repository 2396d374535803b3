"""A network of transformers that has sizes for which its configuration has no names.

This file is copied into the folders that need it, by `save_slim` and by ``save_pretrained``, and
``from_pretrained(folder, trust_remote_code=True)`` runs it there. It needs torch and transformers,
and nothing else of the package.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn


class SlimModel:
    """What ``auto_map`` of a configuration names; makes a subclass of the network's own class.

    ``config.slim`` says which that is ("class"), what modules say of their sizes ("sizes"), and the
    shapes of their parameters and buffers ("shapes").
    """

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any, **named: Any) -> Any:
        """Load a network of this configuration from a folder."""
        return cls.of(config).from_pretrained(folder, *args, config=config, **named)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing is to be done: what is loaded knows that this file belongs to it."""

    @staticmethod
    def of(config: Any) -> Any:
        """The class of a network of this configuration."""
        base = getattr(transformers, config.slim["class"])

        def make(self: Any, config: Any, *args: Any, **named: Any) -> None:
            base.__init__(self, config, *args, **named)
            resize(self, config.slim["sizes"], config.slim["shapes"])

        content = {"__init__": make, "__module__": __name__, "_auto_class": "AutoModel"}
        return type("SlimModel", (base,), content)


def resize(
    network: nn.Module, sizes: dict[str, dict[str, Any]], shapes: dict[str, list[int]]
) -> None:
    """Give modules other sizes and empty tensors of other shapes.

    Args:
        network: is changed.
        sizes: values of attributes, by name of the module.
        shapes: of parameters and buffers, by name.

    >>> network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> sizes = {"0": {"out_features": 1}, "1": {"in_features": 1}}
    >>> resize(network, sizes, {"0.weight": [1, 4], "0.bias": [1], "1.weight": [2, 1]})
    >>> network[0].weight.shape, network[1]
    (torch.Size([1, 4]), Linear(in_features=1, out_features=2, bias=True))
    """
    for path, own in sizes.items():
        for name, size in own.items():
            setattr(
                network.get_submodule(path), name, tuple(size) if isinstance(size, list) else size
            )
    like = next(network.parameters())
    for path, shape in shapes.items():
        parent, _, name = path.rpartition(".")
        module = network.get_submodule(parent)
        before = getattr(module, name)
        empty = torch.empty(shape, dtype=like.dtype, device=like.device)
        if before is None or isinstance(before, nn.Parameter):
            setattr(module, name, nn.Parameter(empty))
        else:
            setattr(module, name, empty.to(before.dtype))
