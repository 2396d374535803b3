"""FLOPs of layers and of whole networks, as torch counts them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_wgsef.network.example_input import device_of, evaluation, observed, run_example
from lightning_wgsef.network.layers import weighted_layers


def layer_flops(model: nn.Module, example_input: Any) -> tuple[dict[str, int], int]:
    """FLOPs of every weighted layer that one forward pass calls, and of the whole pass.

    They are torch's own count, two a multiply-add, over all calls of a layer. The whole includes
    operations outside of layers, as in attention. Raises `ValueError` if the forward pass fails.

    >>> shared = nn.Linear(4, 4)
    >>> layer_flops(nn.Sequential(nn.Linear(3, 4), shared, shared), torch.ones(1, 3))
    ({'0': 24, '1': 64}, 88)
    """
    counter = FlopCounterMode(display=False)
    flops: dict[str, int] = {}

    def before(name: str, *_: object) -> None:
        flops[name] = flops.get(name, 0) - counter.get_total_flops()

    def after(name: str, *_: object) -> None:
        flops[name] += counter.get_total_flops()

    layers = {layer.name: layer.module for layer in weighted_layers(model)}
    # torch counts the fused attention of GPUs, but not that of CPUs.
    gpu = device_of(model).type == "cuda"
    attention = nullcontext() if gpu else sdpa_kernel(SDPBackend.MATH)
    with (
        evaluation(model),
        torch.no_grad(),
        observed(layers, before, after),
        attention,
        counter,
    ):
        run_example(model, example_input)
    return flops, counter.get_total_flops()
