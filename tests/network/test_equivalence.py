"""Slim networks are compared with what they were made of; rounding alone is no difference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef import slim
from lightning_wgsef.network.equivalence import TOLERANCE, check_outputs
from tests.helpers.groups import raises_naming

EXAMPLE = torch.zeros(2, 8)


class Shifted(nn.Module):
    """The norm takes away a large mean and, in training, leaves float32's rounding of it.

    ``constant`` is a plain tensor, which stays float32 in a network that is made float64.
    """

    def __init__(self, constant: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 16)
        self.norm, self.last = nn.BatchNorm1d(16), nn.Linear(16, 4)
        nn.init.constant_(self.second.bias, 1e2)
        self.first.weight.data[::2] = 0  # constants, which are added in another order by slim
        self.constant = constant

    def forward(self, inputs: Tensor) -> Tensor:
        if self.constant is not None:
            inputs = inputs @ self.constant
        hidden = self.second(torch.relu(self.first(inputs)))
        outputs: Tensor = self.last(torch.relu(self.norm(hidden)))
        return outputs


def test_rounding_that_a_norm_makes_large_is_no_reason_to_refuse() -> None:
    network = Shifted()
    small = slim(network, EXAMPLE)
    assert small.first.out_features == 32
    evaluated, trained = small.slimming.difference
    assert evaluated <= TOLERANCE < trained, "the case that this test is about"
    exact = slim(Shifted().double(), EXAMPLE.double())
    assert max(exact.slimming.difference) < 1e-9
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}


@pytest.mark.parametrize("share", [1e-2, 1e-4])
@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_a_difference_that_is_there_in_float64_too_is_refused(mode: str, share: float) -> None:
    network = Shifted().eval()
    other = copy.deepcopy(network)
    norm = other.norm
    norm.weight.data *= 1 + share
    if mode == "training":  # the same in evaluation
        norm.running_var.add_(norm.eps).mul_((1 + share) ** 2).sub_(norm.eps)
    torch.manual_seed(1)
    with raises_naming(f"outputs of Shifted in {mode} differ by", "accepted: 1e-05", "'last'"):
        check_outputs(network, other, [EXAMPLE], torch.randn(4, 8))


def test_what_does_not_run_in_float64_stays() -> None:
    """The constants whose folding differs are not folded; what is zero goes all the same."""
    network = Shifted(constant=torch.eye(8))
    small = slim(network, EXAMPLE)
    assert 32 < small.first.out_features < network.first.out_features
    assert "folding a constant" in small.slimming.kept["first"]
    assert max(small.slimming.difference) <= TOLERANCE


def test_layers_that_the_small_network_alone_has_do_not_hide_the_reason() -> None:
    """A slim attention has dense layers where torch's has one parameter."""
    network = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    network.self_attn.out_proj.weight.data[:, :4] = 0
    other = slim(network, torch.zeros(1, 5, 16))
    assert other.self_attn.num_heads == 3
    other.linear2.weight.data *= 1.01
    with raises_naming("outputs of TransformerEncoderLayer in evaluation differ by"):
        check_outputs(network, other, [torch.randn(2, 5, 16)], torch.randn(4, 5, 16))
