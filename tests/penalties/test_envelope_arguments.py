"""Bad input: a ValueError that names the argument and the value."""

import math
import re

import numpy as np
import pytest
import torch

from lightning_wgsef.penalties import envelope as envelope
from lightning_wgsef.penalties.preconditioned import prox_metric
from tests.helpers.oracles import envelope as oracle
from tests.helpers.problems import (
    FLOOR,
    TOLERANCE,
    loguniform,
    random_problems,
    random_steps,
    relative_error,
    tensor,
)

TWO = [3.0, 4.0]

BAD_BUDGETS = [(0, "0"), (-1, "-1"), (math.nan, "nan"), (torch.tensor([math.nan]), "nan")]
BAD_BUDGETS += [(torch.tensor([-2.0]), "-2"), (torch.tensor([0.0]), "0")]


@pytest.mark.parametrize(("k", "shown"), BAD_BUDGETS)
def test_bad_budgets(k, shown):
    norms = tensor(TWO)
    calls = [
        lambda: envelope.envelope_value(norms, k),
        lambda: envelope.sparsity_gap(norms, k),
        lambda: envelope.envelope_conjugate(norms, k),
        lambda: envelope.prox_multipliers(norms, 0.1, k),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"\bk\b.*{re.escape(shown)}"):
            call()


NO_TENSORS = [[3.0, 4.0], np.array(TWO), "x", torch.nn.Linear]


@pytest.mark.parametrize("given", [*NO_TENSORS, None, 3])
def test_norms_that_are_no_tensor(given):
    calls = [
        lambda: envelope.envelope_value(given, 1),
        lambda: envelope.sparsity_gap(given, 1),
        lambda: envelope.envelope_conjugate(given, 1),
        lambda: envelope.prox_multipliers(given, 0.1, 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^norms must be a tensor, got"):
            call()


@pytest.mark.parametrize("given", NO_TENSORS)
@pytest.mark.parametrize("name", ["weights", "costs", "segments"])
def test_what_groups_have_is_a_tensor(name, given):
    with pytest.raises(ValueError, match=rf"^{name} must be a tensor.*, got"):
        envelope.prox_multipliers(tensor(TWO), 0.1, 1, **{name: given})


@pytest.mark.parametrize("given", [*NO_TENSORS, None, 3])
@pytest.mark.parametrize("name", ["values", "metric", "index"])
def test_what_weights_have_is_a_tensor(name, given):
    arguments = {"values": tensor(TWO), "metric": tensor(TWO), "index": torch.arange(2)}
    with pytest.raises(ValueError, match=rf"^{name} must be a tensor.*, got"):
        prox_metric(**{**arguments, name: given}, step=0.1, k=1)


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"step": -0.25}, r"\bstep\b.*-0\.25"),
        ({"step": math.nan}, r"\bstep\b.*nan"),
        ({"step": torch.tensor([-0.25])}, r"\bstep\b.*-0\.25"),
        ({"step": torch.tensor([math.nan])}, r"\bstep\b.*nan"),
        ({"step": torch.tensor([0.1, 0.1])}, r"\bstep\b.*\(2,\)"),
        (
            {"k": torch.tensor([1.0, 1.0, 1.0]), "step": torch.tensor([0.1] * 2)},
            r"\bstep\b.*\(2,\)",
        ),
        ({"weights": torch.tensor([1.0, 0.0])}, r"\bweights\b.*0\.0"),
        ({"weights": torch.tensor([-2.5, 1.0])}, r"\bweights\b.*-2\.5"),
        ({"weights": torch.tensor([math.nan, 1.0])}, r"\bweights\b.*nan"),
        ({"weights": torch.tensor([1.0, 1.0, 1.0])}, r"\bweights\b.*\(3,\)"),
        ({"costs": torch.tensor([1.0, 0.0])}, r"\bcosts\b.*0\.0"),
        ({"costs": torch.tensor([-2.5, 1.0])}, r"\bcosts\b.*-2\.5"),
        ({"costs": torch.tensor([[1.0, 1.0]])}, r"\bcosts\b.*\(1, 2\)"),
        ({"segments": torch.tensor([0, 0, 0])}, r"\bsegments\b.*\(3,\)"),
        ({"segments": torch.tensor([0.0, 0.0])}, r"\bsegments\b.*float32"),
        ({"segments": torch.tensor([0, -1])}, r"\bsegments\b.*-1"),
        ({"segments": torch.tensor([0, 3]), "k": torch.tensor([1.0, 1.0])}, r"\bk\b.*2.*\b3\b"),
        ({"k": torch.ones(2, 2)}, r"\bk\b.*\(2, 2\)"),
        ({"debias": -0.25}, r"\bdebias\b.*-0\.25"),
        ({"debias": 1.5}, r"\bdebias\b.*1\.5"),
        ({"debias": math.nan}, r"\bdebias\b.*nan"),
        ({"debias": 1.0, "step": 2.5}, r"\bdebias\b.*\b2\.5\b"),
        ({"debias": 0.5, "weights": torch.tensor([1.0, 50.0])}, r"\bdebias\b.*\b2\.5\b"),
        ({"norms": torch.ones(2, 2)}, r"\bnorms\b.*\(2, 2\)"),
        ({"norms": torch.tensor(1.0)}, r"\bnorms\b.*\(\)"),
        ({"norms": torch.tensor([3, 4])}, r"\bnorms\b.*int64"),
        ({"norms": torch.tensor([3.0, -4.0])}, r"\bnorms\b.*-4"),
        ({"norms": torch.tensor([math.nan, 4.0])}, r"\bnorms\b.*nan"),
    ],
)
def test_bad_arguments(changed, shown):
    arguments = {"norms": tensor(TWO), "step": 0.1, "k": 1}
    assert envelope.prox_multipliers(**arguments).shape == (2,)
    with pytest.raises(ValueError, match=shown):
        envelope.prox_multipliers(**(arguments | changed))


DEBIASES = (0.0, 0.4, 1.0)


def answers(env, norms, k, steps, *, costs=None, **groups):
    """Everything that the module computes, by name, the multipliers for every debias."""
    result = {
        "value": env.envelope_value(norms, k, costs=costs, **groups),
        "gap": env.sparsity_gap(norms, k, costs=costs, **groups),
        "conjugate": env.envelope_conjugate(norms, k, **groups),
    }
    for debias, step in zip(DEBIASES, steps, strict=True):
        for anchored in (False, True):
            options = {"costs": costs, "debias": debias, "anchored": anchored} | groups
            result[debias, anchored] = env.prox_multipliers(norms, step, k, **options)
    return result


def worst_difference(got, want, norms):
    """Of two sets of answers; a zero group's multiplier may be anything."""
    worst = 0.0
    for name, first in got.items():
        some = norms > 0 if isinstance(name, tuple) else slice(None)
        worst = max(worst, relative_error(first[some], want[name][some], FLOOR))
    return worst


def check_ones(env, count=300, seed=10):
    """Without weights, without costs: as with ones."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for unit_costs, unit_weights in ((True, True), (True, False), (False, True)):
        problems = random_problems(
            rng, count // 3, unit_costs=unit_costs, unit_weights=unit_weights
        )
        k, norms = tensor(problems.k), problems.flat(problems.norms)
        ones = problems.groups()
        without = dict(ones)
        if unit_costs:
            del without["costs"]
        if unit_weights:
            del without["weights"]
        # With all of debias * step * weight below 1, some at 1, and no step at all.
        steps = [rng.uniform(0, 2, len(k)) / problems.weights.max(axis=1) for _ in DEBIASES]
        steps = [step / (2 * debias or 1) for step, debias in zip(steps, DEBIASES, strict=True)]
        if unit_weights:
            for step, debias in zip(steps, DEBIASES, strict=True):
                step[rng.random(len(k)) < 0.2] = 1 / (debias or 1)
        for step in steps:
            step[rng.random(len(k)) < 0.2] = 0
        steps = [tensor(step) for step in steps]
        got, want = (answers(env, norms, k, steps, **groups) for groups in (without, ones))
        for debias, step in zip(DEBIASES, steps, strict=True):
            for anchored in (False, True):
                live = (norms > 0) & (step == 0)[problems.segments]
                assert (got[debias, anchored][live] == 1).all()
        worst = max(worst, worst_difference(got, want, norms))
        assert worst <= TOLERANCE
    return worst


def check_alone(env, _=None, seed=11):
    """Many segments at once, alike in size or not at all, sorted or not: as one after the other."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for sizes in ([3] * 7, [2, 9, 1, 4], [0, 2, 0, 3], [4, 0, 20_000, 3, 100, 3, 5, 0, 90]):
        for mixed in (False, True):
            labels = np.repeat(np.arange(len(sizes)), sizes)
            labels = tensor(rng.permutation(labels) if mixed else labels, torch.int64)
            scale = 10.0 ** rng.uniform(-3, 3, len(sizes))
            norms = tensor(np.exp(rng.normal(size=len(labels)))) * tensor(scale)[labels]
            weights, costs = (tensor(rng.uniform(0.5, 1, len(labels))) for _ in range(2))
            k = tensor(np.maximum(1, np.array(sizes)) * rng.uniform(0.1, 0.9, len(sizes)))
            steps = [tensor(rng.uniform(0, 1, len(sizes))) for _ in DEBIASES]
            groups = {"weights": weights, "costs": costs}
            together = answers(env, norms, k, steps, **groups, segments=labels)
            for number in range(len(sizes)):
                own = labels == number
                part = {name: vector[own] for name, vector in groups.items()}
                # As numbers.
                alone = [float(k[number]), [float(step[number]) for step in steps]]
                want = answers(env, norms[own], *alone, **part)
                got = {
                    name: x[own] if isinstance(name, tuple) else x[number : number + 1]
                    for name, x in together.items()
                }
                worst = max(worst, worst_difference(got, want, norms[own]))
                assert worst <= TOLERANCE, (sizes, mixed, number)
    return worst


CHECKS = [check_ones, check_alone]


@pytest.mark.parametrize("check", CHECKS)
def test_forms_agree(check, record_property):
    worst = check(envelope)
    record_property("worst_relative_error", worst)
    print(f"{check.__name__}: worst relative error {worst:.1e}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype):
    rng = np.random.default_rng(21)
    norms = tensor(np.exp(rng.normal(size=6)), dtype)
    exact = norms.double().numpy()
    rounding = torch.finfo(dtype).eps
    value = envelope.envelope_value(norms, 2)
    gap = envelope.sparsity_gap(norms, 2)
    conjugate = envelope.envelope_conjugate(norms, 2)
    multipliers = envelope.prox_multipliers(norms, 0.3, 2, debias=0.5)
    assert {x.dtype for x in (value, gap, conjugate, multipliers)} == {dtype}
    assert {x.device for x in (value, gap, conjugate, multipliers)} == {norms.device}
    # The inputs are exact in float64, so only the result is rounded, to half a unit.
    tolerance = rounding + 1e-12
    assert relative_error(value.double(), [oracle.value(exact, 2)]) <= tolerance
    assert relative_error(gap.double(), [oracle.gap(exact, 2)]) <= tolerance
    assert relative_error(conjugate.double(), [oracle.conjugate(exact, 2)]) <= tolerance
    want = oracle.prox_multipliers(exact, 0.3, 2, debias=0.5)
    assert relative_error(multipliers.double(), want, FLOOR) <= tolerance


def test_shapes():
    norms = tensor([1.0, 2.0, 3.0])
    segments = torch.tensor([1, 0, 1])
    for function in (envelope.envelope_value, envelope.sparsity_gap, envelope.envelope_conjugate):
        assert function(norms, 1).shape == (1,)
        assert function(norms, 1, segments=segments).shape == (2,)
        longer = function(norms, tensor([1.0, 1.0, 1.0, 2.0]), segments=segments)
        assert longer.shape == (4,)
        assert longer[2:].tolist() == [0, 0]  # segments without groups
    assert envelope.prox_multipliers(norms, 0.1, 1).shape == (3,)
    assert envelope.prox_multipliers(tensor([]), 0.1, 1).shape == (0,)
    assert envelope.envelope_value(tensor([]), 1).tolist() == [0]
    gaps = torch.tensor([4, 0, 4])  # nothing in segments 1 to 3
    sparse = envelope.prox_multipliers(norms, 0.1, 1, segments=gaps, debias=1.0, anchored=True)
    dense = envelope.prox_multipliers(norms, 0.1, 1, segments=segments, debias=1.0, anchored=True)
    assert torch.equal(sparse, dense)


def test_numbers_and_tensors_say_the_same():
    rng = np.random.default_rng(22)
    norms = tensor(np.exp(rng.normal(size=9)))
    segments = torch.tensor([0, 1, 2] * 3)
    ones = torch.ones(9, dtype=torch.float64)
    want = envelope.prox_multipliers(norms, 0.2, 2, segments=segments, debias=0.5)
    for step, k in ((0.2, tensor([2.0] * 3)), (tensor([0.2] * 3), 2), (tensor(0.2), tensor(2.0))):
        got = envelope.prox_multipliers(norms, step, k, segments=segments, debias=0.5)
        assert torch.equal(got, want)
    got = envelope.prox_multipliers(
        norms, 0.2, 2, weights=ones, costs=ones, segments=segments.int(), debias=0.5
    )
    assert torch.equal(got, want)


def test_inputs_are_left_alone():
    norms, weights = tensor([3.0, 0.0, 1.0]), tensor([1.0, 2.0, 3.0])
    before = norms.clone(), weights.clone()
    envelope.envelope_value(norms, 1, weights=weights)
    envelope.prox_multipliers(norms, 0.3, 1, weights=weights, debias=1.0, anchored=True).zero_()
    envelope.prox_multipliers(norms, 0, 1, weights=weights).zero_()
    assert torch.equal(norms, before[0])
    assert torch.equal(weights, before[1])


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("debias", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("step", [0.0, 1e-12, 1e-3, 0.5, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("k", [0.5, 1, 2, 3, 100])
def test_zero_groups_are_never_nan(k, step, debias, anchored):
    for norms in ([0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 0.0, 3.0], [0.0, 1.0, 1.0], [0.0]):
        got = envelope.prox_multipliers(tensor(norms), step, k, debias=debias, anchored=anchored)
        assert ((got >= 0) & (got <= 1)).all()  # false for a NaN
        for function in (
            envelope.envelope_value,
            envelope.sparsity_gap,
            envelope.envelope_conjugate,
        ):
            assert torch.isfinite(function(tensor(norms), k)).all()
    assert envelope.envelope_value(tensor([0.0, 0.0]), k).item() == 0


@pytest.mark.parametrize("anchored", [False, True])
def test_ten_thousand_segments_in_one_call(anchored):
    """Equal to the oracle for all of them and to separate calls for every tenth."""
    rng = np.random.default_rng(23)
    problems = random_problems(rng, 10_000, groups=4)
    step = random_steps(rng, problems.weights, 1.0)
    got = problems.multipliers(envelope, tensor(step), debias=1.0, anchored=anchored)
    if not anchored:
        want = problems.exact_multipliers(step, 1.0)
        live = problems.norms > 0
        assert relative_error(got[live], want[live], FLOOR) <= TOLERANCE
    values = envelope.envelope_value(
        problems.flat(problems.norms), tensor(problems.k), **problems.groups()
    )
    for norms, k, weights, costs, row in list(problems)[::10]:
        groups = {"weights": tensor(weights), "costs": tensor(costs)}
        alone = envelope.prox_multipliers(
            tensor(norms), step[row], k, debias=1.0, anchored=anchored, **groups
        )
        np.testing.assert_allclose(got[row, : len(norms)], alone, rtol=1e-9, atol=1e-14)
        alone = envelope.envelope_value(tensor(norms), k, **groups).item()
        assert values[row].item() == pytest.approx(alone, rel=1e-12)


def test_a_segment_does_not_feel_its_neighbours_magnitudes():
    """A running sum over all segments would carry rounding from the large to the small."""
    rng = np.random.default_rng(24)
    large, small = 500, 8
    norms = np.concatenate([1e20 * rng.uniform(1, 2, large), 1e-20 * np.arange(8, 0, -1)])
    costs = np.concatenate([1e9 * rng.uniform(1, 2, large), np.full(small, 1 / 3)])
    segments = torch.tensor([0] * large + [1] * small)
    k = tensor([costs[:large].sum() / 3, 4 / 3])
    arguments = {"costs": tensor(costs), "segments": segments}
    projected = envelope.prox_multipliers(tensor(norms), 1.0, k, debias=1.0, **arguments)
    assert projected[large:].tolist() == [1] * 4 + [0] * 4
    for anchored in (False, True):
        got = envelope.prox_multipliers(
            tensor(norms), 0.3, k, debias=1.0, anchored=anchored, **arguments
        )
        alone = envelope.prox_multipliers(
            tensor(norms[large:]),
            0.3,
            4 / 3,
            costs=tensor(costs[large:]),
            debias=1.0,
            anchored=anchored,
        )
        np.testing.assert_allclose(got[large:], alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("debias", [0.0, 0.5, 1.0])
def test_extreme_scales_in_one_segment(dtype, debias):
    rng = np.random.default_rng(25)
    for _ in range(100):
        norms = tensor(10.0 ** rng.uniform(-30, 30, 6), dtype)
        exact = norms.double().numpy()
        k = rng.choice([1, 2, 3, 4.5, 5.999, 6])
        step = loguniform(rng, 1e-6, 0.999, 1)[0]
        want = oracle.prox_multipliers(exact, step, k, debias=debias)
        got = envelope.prox_multipliers(norms, step, k, debias=debias)
        assert relative_error(got.double(), want, FLOOR) <= TOLERANCE
        kept = oracle.project(exact, k)
        projected = envelope.prox_multipliers(norms, 1.0, k, debias=1.0, anchored=True)
        assert (projected.numpy() == kept).all()
        if dtype == torch.float64:
            value = envelope.envelope_value(norms, k)
            assert relative_error(value, [oracle.value(exact, k)]) <= TOLERANCE
