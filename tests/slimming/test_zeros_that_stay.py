"""Zero input channels that nobody can take out: each with its cause, and none called no zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_wgsef import slim

ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
STEPS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.branch, self.reader = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.make(rows)
        outputs: Tensor = self.reader(x + self.branch(self.norm(x)))
        return outputs


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.reader = nn.Linear(6, 16), nn.Linear(8, 2)

    def forward(self, rows: Tensor) -> Tensor:
        gate, value = self.make(rows).chunk(2, -1)
        outputs: Tensor = self.reader(gate.softmax(-1) * value)
        return outputs


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.reader = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, steps: Tensor) -> Tensor:
        outputs: Tensor = self.reader(self.make(steps)[0])
        return outputs


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.reader = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, rows: Tensor) -> Tensor:
        outputs: Tensor = self.reader(torch.fft.fft(self.make(rows)).real)
        return outputs


def chain(*before: nn.Module, reader: nn.Module) -> nn.Module:
    network = nn.Sequential(*before)
    network.add_module("reader", reader)
    return network


NORMED = parametrizations.weight_norm(nn.Linear(6, 8))
CASES = {
    "residual stream": (Stream(), ROWS, "'branch' reads these channels, too (made by 'make')"),
    "gate": (Gate(), ROWS, "may be moved or mixed by SoftmaxBackward0 (made by 'make')"),
    "recurrent": (Recurrent(), STEPS, "'make' reads these channels, too (made by 'make')"),
    "mixed": (Spectrum(), ROWS, "no convolution or dense layer makes its input channels alone"),
    "parametrised": (
        chain(NORMED, nn.ReLU(), reader=nn.Linear(8, 2)),
        ROWS,
        "'0': its weight is computed from other tensors (a parametrisation)",
    ),
    "the input": (
        chain(reader=nn.Linear(6, 2)),
        ROWS,
        "no convolution or dense layer makes its input channels alone",
    ),
    "shuffled": (
        chain(nn.Conv2d(3, 32, 3), nn.PixelShuffle(2), reader=nn.Conv2d(8, 4, 1)),
        IMAGES,
        "no convolution or dense layer makes its input channels alone",
    ),
    "looked up": (
        chain(nn.Embedding(9, 8), reader=nn.Linear(8, 2)),
        torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(0)),
        "no convolution or dense layer makes its input channels alone",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_stays_has_a_cause(name: str) -> None:
    network, example, cause = CASES[name]
    network.reader.weight.data[:, ::2] = 0
    small = slim(network.eval(), example)
    assert small.slimming.kept["reader"].startswith("zero input channels: ")
    assert cause in small.slimming.kept["reader"]
    assert "kept, reader: zero input channels" in str(small.slimming)
    assert "no channel, head" not in str(small.slimming)
    assert small.slimming.parameters[0] == small.slimming.parameters[1]
