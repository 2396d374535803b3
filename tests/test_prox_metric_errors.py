"""Bad input of `prox_metric`: a ValueError that names the argument and the value."""

import math

import pytest
import torch
from helpers import raises_naming

from lightning_wgsef import prox_metric

ONES = torch.ones(3)
INDEX = torch.tensor([0, 1, 1])


def call(**changed):
    arguments = {"values": torch.tensor([1.0, -2.0, 3.0]), "metric": ONES, "index": INDEX}
    return prox_metric(**(arguments | {"step": 0.5, "k": 1} | changed))


def entry(value, like=ONES):
    """The last is another."""
    return torch.cat([like[:-1], torch.as_tensor([value], dtype=like.dtype)])


def test_what_the_errors_change_is_accepted():
    assert call().shape == (3,)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (-2.5, "-2.5"), (math.nan, "nan"), (math.inf, "inf")]
)
def test_a_metric_that_is_not_positive_and_finite(value, shown):
    with raises_naming("metric", shown):
        call(metric=entry(value))
    with raises_naming("metric", shown):
        call(metric=entry(value).double(), values=torch.zeros(3).double(), step=0.0)


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        ({"debias": 1.0}, 0.25),
        ({"debias": 1.0}, 0.5),  # equal is too small
        ({"debias": 0.5}, 0.25),
        ({"debias": 0.5, "weights": torch.tensor([1.0, 3.0])}, 0.75),
        ({"debias": 1.0, "step": torch.tensor([0.5])}, 0.375),
        (
            {
                "debias": 1.0,
                "step": torch.tensor([0.1, 0.5]),
                "k": torch.tensor([1.0, 1.0]),
                "segments": torch.tensor([0, 1]),
            },
            0.25,
        ),
    ],
)
def test_a_metric_that_the_debias_leaves_nothing_of(changed, value):
    assert call(**changed, metric=entry(2.5)).shape == (3,)
    with raises_naming("metric", "debias"):
        call(**changed, metric=entry(value))
    # The other group has a smaller weight, another segment, or none of the debias.
    assert call(**changed | {"debias": 0.0}, metric=entry(value)).shape == (3,)


def test_the_metric_is_compared_with_the_step_of_its_own_group():
    weights, small = torch.tensor([0.1, 1.0]), torch.tensor([0.2, 1.0, 1.0])
    assert call(debias=1.0, weights=weights, metric=small).shape == (3,)
    with raises_naming("metric"):
        call(debias=1.0, weights=weights.flip(0), metric=small)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"metric": torch.ones(2)}, ("metric", "(2,)", "(3,)")),
        ({"metric": torch.ones(4)}, ("metric", "(4,)", "(3,)")),
        ({"metric": torch.ones(3, 1)}, ("metric", "(3, 1)")),
        ({"metric": torch.tensor(1.0)}, ("metric", "()")),
        ({"index": INDEX[:2]}, ("index", "(2,)", "(3,)")),
        ({"index": INDEX[None]}, ("index", "(1, 3)")),
        ({"index": INDEX.float()}, ("index", "float32")),
        ({"index": entry(-1, INDEX)}, ("index", "-1")),
        ({"values": torch.tensor([1, 2, 3])}, ("values", "int64")),
        ({"values": torch.ones(3, 1)}, ("values", "(3, 1)")),
        ({"values": torch.tensor(1.0)}, ("values", "()")),
        ({"k": 0}, ("k", "0")),
        ({"k": math.nan}, ("k", "nan")),
        ({"step": -0.25}, ("step", "-0.25")),
        ({"step": math.nan}, ("step", "nan")),
        ({"weights": torch.tensor([1.0, -2.5])}, ("weights", "-2.5")),
        ({"costs": torch.tensor([-2.5, 1.0])}, ("costs", "-2.5")),
        ({"segments": torch.tensor([0, -1])}, ("segments", "-1")),
        ({"segments": torch.tensor([0.0, 0.0])}, ("segments", "float32")),
        ({"debias": -0.25}, ("debias", "-0.25")),
        ({"debias": 1.5}, ("debias", "1.5")),
        ({"debias": math.nan}, ("debias", "nan")),
    ],
)
def test_bad_arguments(changed, words):
    with raises_naming(*words):
        call(**changed)


@pytest.mark.parametrize("name", ["weights", "costs", "segments"])
def test_an_index_beyond_the_groups(name):
    one = torch.zeros(1, dtype=torch.int64) if name == "segments" else torch.ones(1)
    with raises_naming("1"):
        call(**{name: one})
