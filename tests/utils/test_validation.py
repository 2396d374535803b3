"""Checks of arguments by themselves: what passes, and what an error names.

The `check_*` function takes the module under test, so that `test_mutants` can give it a
broken one.
"""

import math

import pytest
import torch

from lightning_wgsef.utils import validation as checks
from tests.helpers.groups import raises_naming

LIKE = torch.empty(0, dtype=torch.float64)


def refused(call, *words):
    """AssertionError (`pytest.raises` has its own) unless it raises a ValueError of these words."""
    caught = None
    try:
        call()
    except Exception as error:
        caught = error
    assert type(caught) is ValueError, caught
    missing = [word for word in words if word not in str(caught)]
    assert missing == [], str(caught)


def check_arguments(module, _=None):
    """Numbers and tensors by segment and by group; what is refused names itself."""
    for value in (2.5, 0, torch.tensor(2.5), torch.tensor(3)):
        got = module.per_segment("step", value, 3, LIKE)
        assert (got.dtype, got.shape) == (torch.float64, (3,))
        assert (got == float(value)).all()
    got = module.per_segment("step", torch.tensor([1.0, 0.0, 0.5]), 3, LIKE)
    assert got.tolist() == [1, 0, 0.5]
    assert module.per_segment("k", torch.empty(0), 0, LIKE, positive=True).shape == (0,)
    assert module.per_group("w", torch.tensor([1.5, 2]), LIKE.new_ones(2)).tolist() == [1.5, 2]
    for bad in (-0.5, math.nan, math.inf):
        for value in (bad, torch.tensor(bad), torch.tensor([1, bad, 1])):
            refused(lambda v=value: module.per_segment("step", v, 3, LIKE), "step", f"{bad}")
        vector = torch.tensor([1.0, bad])
        refused(lambda v=vector: module.per_group("w", v, LIKE.new_ones(2)), "w", f"{bad}")
    for value in (0, torch.tensor(0.0), torch.tensor([1.0, 0, 2])):
        module.per_segment("step", value, 3, LIKE)
        refused(lambda v=value: module.per_segment("k", v, 3, LIKE, positive=True), "k", "0")
    refused(lambda: module.per_segment("k", torch.ones(2), 3, LIKE), "k", "(3,)", "(2,)")
    refused(lambda: module.per_segment("k", torch.ones(3, 1), 3, LIKE), "k", "(3, 1)")
    refused(lambda: module.per_group("w", torch.ones(2), LIKE.new_ones(3)), "w", "(3,)", "(2,)")
    refused(lambda: module.per_group("w", torch.zeros(2), LIKE.new_ones(2)), "w", "0.0")
    module.check_number("debias", 1.0, highest=1.0)
    refused(lambda: module.check_number("debias", 1.25, highest=1.0), "debias", "1.25", "at most 1")
    return 0.0


def test_arguments():
    check_arguments(checks)


@pytest.mark.parametrize("value", ["1", None, True, [1.0], 1 + 0j, torch.nn.Identity()])
def test_what_is_no_number(value):
    with raises_naming("k", "number", repr(value)):
        checks.check_number("k", value)
    with raises_naming("k", "groups", repr(value)):
        checks.check_count_or_share("k", value, "groups")


@pytest.mark.parametrize("value", [1, 7, 0.25, 1.0, 1e-9])
def test_counts_and_shares(value):
    checks.check_count_or_share("k", value, "groups")


@pytest.mark.parametrize("value", [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf])
def test_what_is_no_count_and_no_share(value):
    with raises_naming("k", "groups", repr(value)):
        checks.check_count_or_share("k", value, "groups")


def test_an_error_names_the_first_place():
    with raises_naming("w", "-1.0", "index 1"):
        checks.check_values("w", torch.tensor([1.0, -1.0, -2.0]), "at least 0")
    checks.check_values("w", torch.tensor([]), "at least 0")


def test_nothing_is_looked_at_on_an_accelerator():
    values = torch.full((2,), -1.0, device="meta")
    checks.check_values("w", values, "at least 0")
    assert checks.per_group("w", values, values).device.type == "meta"
    assert checks.per_segment("k", values, 2, values, positive=True).shape == (2,)
    assert checks.shape_of(values) == "(2,)"
