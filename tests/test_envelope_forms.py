"""One problem said in different ways: no weights or ones, one call or many, numbers or tensors.

The `check_*` functions take the module under test, so that `test_planted_faults` can give them a
broken one. What `test_envelope_oracle` checks is always given with weights, costs and segments.
"""

import numpy as np
import pytest
import torch
from envelope_problems import FLOOR, TOLERANCE, random_problems, relative_error, tensor

from lightning_wgsef import envelope

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
