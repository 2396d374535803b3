"""Faults in the source of the metric step must turn the checkers of `test_preconditioned` red."""

import inspect

import pytest

from tests.helpers.mutants import Fault, load, solver
from tests.penalties.test_preconditioned import (
    CHECKS,
    check_euclidean,
    check_float32,
    check_optimality,
    check_oracle,
    check_order,
    check_ridge,
    check_segments,
    check_squared_lasso,
    check_unchanged,
)

SOURCES = solver("penalties.preconditioned")
PART = 6  # of the problems that the checkers take of themselves

SQUARES = "(diagonal * v / x).square()"
LABELS = "steps[problem.segments.labels().to(steps.device)]"
PROBLEM = "Problem(magnitudes.sqrt(), k, weights, costs, segments)"
FACTORS = "diagonal * shares / (reduced * shares + thresholds[index])"
SLOPES = "squares * reduced / x)"

FAULTS = [
    Fault("D once instead of squared", SQUARES, "diagonal * (v / x).square()", check_oracle),
    Fault("D once: optimality", SQUARES, "diagonal * (v / x).square()", check_optimality),
    Fault("D once: one group lives", SQUARES, "diagonal * (v / x).square()", check_squared_lasso),
    Fault("D dropped from the norms", SQUARES, "(v / x).square()", check_oracle),
    Fault(
        "debias dropped from x",
        "reduced * shares[index] +",
        "diagonal * shares[index] +",
        check_optimality,
    ),
    Fault(
        "debias dropped from D",
        "reduced = diagonal - debias *",
        "reduced = diagonal - 0 *",
        check_ridge,
    ),
    Fault(
        "debias dropped from the factors",
        FACTORS,
        FACTORS.replace("reduced", "diagonal"),
        check_ridge,
    ),
    Fault(
        "debias twice",
        "reduced = diagonal - debias *",
        "reduced = diagonal - debias**2 *",
        check_euclidean,
    ),
    Fault(
        "threshold dropped from x",
        "reduced * shares[index] + thresholds[index]",
        "reduced * shares[index] + 1e-3 * thresholds[index]",
        check_oracle,
    ),
    Fault("D dropped from the factors", FACTORS, FACTORS.removeprefix("diagonal * "), check_ridge),
    Fault("threshold dropped from the factors", f"{FACTORS}, 0.0", "shares**0, 0.0", check_ridge),
    Fault(
        "weights dropped from the threshold",
        "thresholds * problem.weights",
        "thresholds",
        check_ridge,
    ),
    Fault(
        "weights dropped from the strength",
        "metric_shares(problem, sums",
        "metric_shares(Problem(magnitudes, k, None, costs, segments), sums",
        check_oracle,
    ),
    Fault("costs dropped", PROBLEM, PROBLEM.replace("costs", "None"), check_oracle),
    Fault("costs dropped: optimality", PROBLEM, PROBLEM.replace("costs", "None"), check_optimality),
    Fault("the first step for all segments", LABELS, f"{LABELS} * 0 + steps[0]", check_ridge),
    Fault(
        "the mean budget for all segments",
        PROBLEM,
        PROBLEM.replace(" k,", " torch.as_tensor(k).mean(),"),
        check_segments,
    ),
    Fault(
        "a step for labels in order",
        LABELS,
        f"{LABELS}[problem.segments.labels().argsort()]",
        check_order,
    ),
    Fault(
        "squares for norms",
        "with_norms(squares.sqrt())",
        "with_norms(squares)",
        check_squared_lasso,
    ),
    Fault("the tangent touches elsewhere", "(1 - widths * shares)", "(1 - shares)", check_oracle),
    Fault(
        "the tangent is on the wrong side",
        "(1 - widths * shares)",
        "(1 + widths * shares)",
        check_optimality,
    ),
    Fault("the tangent is far too flat", SLOPES, "squares * reduced / x * 1e-3)", check_oracle),
    Fault("the slope is not one by u", SLOPES, "squares / x)", check_oracle),
    Fault(
        "no slope for groups that are zero is a number",
        ".nan_to_num(1.0, 1.0, 1.0)",
        "",
        check_oracle,
    ),
    Fault("a few tangents only", "ROUNDS = 40", "ROUNDS = 2", check_oracle),
    Fault(
        "content with shares that nearly stay",
        "tolerance: float = 1e-10",
        "tolerance: float = 1e-2",
        check_oracle,
    ),
    Fault(
        "padding of tangents is zero",
        "bucket.matrix(vector, pad_with_lowest=True)",
        "bucket.matrix(vector)",
        check_oracle,
    ),
    Fault(
        "what is unchanged is rounded",
        "(v * factors)",
        "(v * diagonal * factors / diagonal)",
        check_unchanged,
    ),
    Fault(
        "the result in working precision",
        "(v * factors).to(values.dtype)",
        "(v * factors)",
        check_float32,
    ),
]

# Nothing of this changes a result.
HARMLESS = [
    Fault(
        "shares start at 0",
        "torch.ones_like(groups), thresholds",
        "torch.zeros_like(groups), thresholds",
    ),
    Fault(
        "shares start anywhere",
        "torch.ones_like(groups), thresholds",
        "torch.rand_like(groups), thresholds",
    ),
    Fault("more rounds", "ROUNDS = 40", "ROUNDS = 80"),
    Fault("the tangent is a bit too flat", SLOPES, "squares * reduced / x * 0.9)"),
]


def run(check, module):
    usual = inspect.signature(check).parameters["count"].default
    return check(module, usual // PART)


@pytest.mark.parametrize("check", CHECKS)
def test_the_source_without_a_fault_passes(check):
    run(check, load(SOURCES)["penalties.preconditioned"])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_caught(fault):
    module = load(SOURCES, fault)["penalties.preconditioned"]
    with pytest.raises(AssertionError):
        run(fault.check, module)


@pytest.mark.parametrize("fault", HARMLESS, ids=lambda fault: fault.what)
def test_what_is_no_fault_is_not_caught(fault):
    module = load(SOURCES, fault)["penalties.preconditioned"]
    for check in (check_oracle, check_optimality, check_unchanged):
        run(check, module)


def test_every_checker_has_a_fault():
    assert {fault.check for fault in FAULTS} == set(CHECKS)
    assert {fault.file(SOURCES) for fault in FAULTS} == {
        "penalties.preconditioned",
        "penalties.problem",
    }
