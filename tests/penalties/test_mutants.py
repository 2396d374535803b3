"""Faults planted in the source of the envelope must turn the checkers of its tests red.

Those of `test_envelope` first of all. Faults in the files that lay segments out, check
arguments and find roots are in `test_mutants_segments`, those in the metric step in
`test_mutants_preconditioned`.
"""

import pytest

from tests.helpers.mutants import Fault, load, solver
from tests.penalties.test_envelope import (
    CHECKS,
    check_anchored,
    check_conjugate,
    check_projection,
    check_prox,
    check_value,
)
from tests.penalties.test_envelope_arguments import check_alone, check_ones

SOURCES = solver("penalties.envelope")
FILES = {"penalties.problem", "penalties.envelope"}
PROBLEMS = 300  # enough for every fault below, and quick

VALUE = "return competition.total(0.5 * torch.where(shares > 0, squares / shares, 0))"
GAP = "0.5 * torch.where(shares > 0, squares * (1 - shares) / shares, 0)"
SQUARES = "    squares = competition.weighted(competition.norms.square())\n"

FAULTS = [
    Fault("value without the factor 1/2", VALUE, VALUE.replace("0.5", "1.0"), check_value),
    Fault(
        "value without the weights",
        f"{SQUARES}    {VALUE}",
        f"    squares = competition.norms.square()\n    {VALUE}",
        check_value,
    ),
    Fault("gap without the factor 1/2", GAP, GAP.replace("0.5", "1.0"), check_value),
    Fault("gap without the division by the share", GAP, GAP.replace("/ shares", ""), check_value),
    Fault(
        "gap without the weights",
        f"{SQUARES}    return competition.total({GAP})",
        f"    squares = competition.norms.square()\n    return competition.total({GAP})",
        check_value,
    ),
    Fault("conjugate without the factor 1/2", "0.5 * ordered", "ordered", check_conjugate),
    Fault(
        "conjugate without the weights", "squares / competition.weights", "squares", check_conjugate
    ),
    Fault(
        "conjugate of one group less",
        "(competition.budgets - rank)",
        "(competition.budgets - rank - 1)",
        check_conjugate,
    ),
    Fault(
        "conjugate of the smallest",
        "squares.sort(dim=1, descending=True)",
        "squares.sort(dim=1)",
        check_conjugate,
    ),
    Fault(
        "weights dropped from the threshold",
        "thresholds = competition.weighted(steps)",
        "thresholds = steps.expand_as(competition.norms)",
        check_prox,
    ),
    Fault(
        "debias ignored in the shares",
        "(1 - debias * thresholds).clamp(",
        "(1 - 0 * thresholds).clamp(",
        check_prox,
    ),
    Fault(
        "debias ignored in the factors",
        "thresholds * (1 - debias * shares)",
        "thresholds",
        check_prox,
    ),
    Fault(
        "without a step zero groups are undefined and others shrink",
        "return torch.where(thresholds > 0, factors, 1)",
        "return torch.where(thresholds > 0, factors, shares)",
        check_ones,
    ),
    Fault(
        "the strongest are not restored by the anchored step",
        "return torch.where(competition.within_budget()[0], 1, anchored)",
        "return anchored",
        check_anchored,
    ),
    Fault(
        "the anchored step is not cut at 1",
        "(factors / torch.where(anchor > 0, anchor, 1)).clamp_(max=1)",
        "(factors / torch.where(anchor > 0, anchor, 1))",
        check_anchored,
    ),
    Fault(
        "the full step does not project",
        "full = debias * thresholds >= 1 - FULL_STEP_SLACK",
        "full = debias * thresholds > 2",
        check_projection,
    ),
    Fault(
        "every step projects",
        "full = debias * thresholds >= 1 - FULL_STEP_SLACK",
        "full = debias * thresholds >= 0",
        check_prox,
    ),
]

FAULTS += [
    *(
        Fault(
            f"weights dropped from the strength: {check.__name__}",
            "strengths * self.weights.sqrt()",
            "strengths",
            check,
        )
        for check in (check_value, check_anchored)
    ),
    *(
        Fault(
            f"costs dropped from the strength: {check.__name__}",
            "strengths / self.costs.sqrt()",
            "strengths",
            check,
        )
        for check in (check_prox, check_projection)
    ),
    Fault("square root of weights dropped", "* self.weights.sqrt()", "* self.weights", check_prox),
    Fault("square root of costs dropped", "/ self.costs.sqrt()", "/ self.costs", check_prox),
    Fault(
        "costs dropped from what fits",
        "return values if self.costs is None else values * self.costs",
        "return values",
        check_prox,
    ),
    Fault(
        "costs dropped from the root",
        "root_of_budget(slopes, offsets, self.costs, ",
        "root_of_budget(slopes, offsets, None, ",
        check_prox,
    ),
    Fault(
        "costs dropped from the projection",
        "torch.ones_like(ordered) if self.costs is None else self.costs.gather(1, order)",
        "torch.ones_like(ordered)",
        check_projection,
    ),
    Fault(
        "a group enters as if there were no debias",
        "self.strengths() / widths, thresholds / widths",
        "self.strengths() / widths, thresholds",
        check_prox,
    ),
    Fault(
        "a group saturates as if there were no debias",
        "self.strengths() / widths, thresholds / widths",
        "self.strengths(), thresholds / widths",
        check_prox,
    ),
    Fault("more fits than the budget", "_FIT_SLACK = 2e-9", "_FIT_SLACK = 0.02", check_value),
    Fault(
        "less is kept than the budget",
        "PROJECTION_SLACK = 1e-9",
        "PROJECTION_SLACK = -1e-9",
        check_projection,
    ),
    Fault(
        "shares are not stretched by their rounding",
        "rounding = 4 * torch",
        "rounding = 0 * torch",
        check_prox,
    ),
    Fault(
        "shares are stretched by far more",
        "rounding = 4 * torch",
        "rounding = 4e10 * torch",
        check_prox,
    ),
    Fault(
        "shares are squeezed",
        "rounding = 4 * torch",
        "rounding = -4 * torch",
        check_prox,
    ),
    Fault(
        "groups that fit shrink",
        "return torch.where(fits, live, shares)",
        "return shares",
        check_value,
    ),
    Fault(
        "the weakest are kept",
        "strengths.sort(dim=1, descending=True, stable=True)",
        "strengths.sort(dim=1, descending=False, stable=True)",
        check_projection,
    ),
    Fault(
        "ties in a row go to the higher index",
        "ordered, order = strengths.sort(dim=1, descending=True, stable=True)",
        "order = strengths.shape[1] - 1 - strengths.flip(1).sort(\n"
        "            dim=1, descending=True, stable=True)[1]\n"
        "        ordered = strengths.gather(1, order)",
        check_projection,
    ),
    Fault(
        "the anchor is the last group but one",
        "order.gather(1, (number - 1).clamp(min=0))",
        "order.gather(1, (number - 2).clamp(min=0))",
        check_anchored,
    ),
    Fault(
        "the anchor is the last group but one: no costs",
        "torch.minimum(limits, live).long() - 1",
        "torch.minimum(limits, live).long() - 2",
        check_ones,
    ),
    Fault(
        "the anchor may be a group that is zero: no costs",
        "torch.minimum(limits, live).long() - 1",
        "torch.minimum(limits, 0 * limits + most).long() - 1",
        check_ones,
    ),
    Fault(
        "padding of weights and costs is zero",
        "return None if values is None else bucket.matrix(values, pad_with_lowest=True)",
        "return None if values is None else bucket.matrix(values)",
        check_prox,
    ),
    Fault(
        "values of segments in the order of matrices",
        "result[bucket.segments] = values",
        "result[: len(values)] = values",
        check_alone,
    ),
]

# Nothing of this changes a result: the root is sought from another place.
HARMLESS = [
    Fault("costs dropped from where the root is sought", "self.priced(slopes)", "slopes"),
    Fault(
        "the root is sought from 1",
        "self.costs, self.budgets, start, fits",
        "self.costs, self.budgets, torch.ones_like(start), fits",
    ),
    Fault("what just fits is left to the root", "_FIT_SLACK = 2e-9", "_FIT_SLACK = -0.02"),
]


@pytest.mark.parametrize("check", [*CHECKS, check_ones, check_alone])
def test_the_source_without_a_fault_passes(check):
    module = load(SOURCES)["penalties.envelope"]
    assert check(module, PROBLEMS) <= 1e-6


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_caught(fault):
    module = load(SOURCES, fault)["penalties.envelope"]
    with pytest.raises(AssertionError):
        fault.check(module, PROBLEMS)


@pytest.mark.parametrize("fault", HARMLESS, ids=lambda fault: fault.what)
def test_what_is_no_fault_is_not_caught(fault):
    module = load(SOURCES, fault)["penalties.envelope"]
    for check in CHECKS:
        check(module, PROBLEMS)


def test_every_file_and_every_checker_has_a_fault():
    assert {fault.file(SOURCES) for fault in FAULTS} == FILES
    assert {fault.check for fault in FAULTS} == {*CHECKS, check_ones, check_alone}
