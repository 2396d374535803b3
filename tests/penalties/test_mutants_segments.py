"""Faults planted in the files under the envelope: arguments, layout of segments, roots.

Where the checkers of `test_envelope` cannot see a fault, since results stay right or the
problems never take that way, those of the file's own tests must.
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
from tests.penalties.test_root_finding import (
    check_definition,
    check_neighbours,
    check_ranks,
    check_rounds,
)
from tests.penalties.test_segments import check_segments
from tests.utils.test_validation import check_arguments

SOURCES = solver("penalties.envelope")
FILES = {"utils.validation", "penalties.segments", "penalties.solvers.root_finding"}
PROBLEMS = 300  # enough for every fault below, and quick
OWN = {
    check_arguments: "utils.validation",
    check_segments: "penalties.segments",
    check_definition: "penalties.solvers.root_finding",
    check_neighbours: "penalties.solvers.root_finding",
    check_rounds: "penalties.solvers.root_finding",
    check_ranks: "penalties.solvers.root_finding",
}

SHARES = "(shares if costs is None else shares * costs).sum(1, True)"
SIZES = "shift = torch.arange(count) * width - starts"
COLUMN = "per_segment if self.segments is None else per_segment[self.segments]"
MATRIX = "return values.view(self.rows, self.width)"

ROOTS = [
    Fault("sides of the bracket swapped", "below = excess <= 0", "below = excess > 0", check_prox),
    Fault(
        "sides of the bracket swapped: value",
        "below = excess <= 0",
        "below = excess > 0",
        check_value,
    ),
    Fault(
        "no bracket",
        "trusted = (newton > low) & (newton < high) & (step <= 0.5 * previous)",
        "trusted = torch.ones_like(below)",
        check_prox,
    ),
    Fault(
        "Newton's step the wrong way, left to halving",
        "root - excess / slope",
        "root + excess / slope",
        check_rounds,
    ),
    Fault("slope of the sum without costs", "slopes * costs", "slopes", check_rounds),
    Fault("slope of what is clipped", "(shares == unclipped) * priced", "priced", check_rounds),
    Fault("halving only", "(step <= 0.5 * previous)", "(step < 0)", check_rounds),
    Fault(
        "halving on the scale of numbers",
        "middle = _middle(low, high)",
        "middle = _middle(low, high) * 0 + (low / 2 + high / 2)",
        check_rounds,
    ),
    Fault("the sum is without costs", SHARES, "shares.sum(1, True)", check_prox),
    Fault("not cut at 1", "unclipped.clamp(0, 1)", "unclipped.clamp(min=0)", check_prox),
    Fault("not cut at 0", "unclipped.clamp(0, 1)", "unclipped.clamp(max=1)", check_prox),
    Fault("offsets added", "out_of_reach, -offsets, ", "out_of_reach, offsets, ", check_prox),
    Fault("content with a budget nearly spent", "8 * numbers.eps", "1e-3", check_definition),
    Fault("content with a short step", "step <= 2 * numbers.eps", "step <= 0.1", check_prox),
    Fault("far roots are missed", "largest = numbers.max / 4", "largest = 1e9", check_definition),
    Fault("too few rounds", "ROUNDS = 64", "ROUNDS = 6", check_prox),
    Fault("too few rounds for the hardest", "ROUNDS = 64", "ROUNDS = 16", check_neighbours),
    Fault("by rank: costs", "shares.mul_(costs.unsqueeze(2))", "shares", check_ranks),
    Fault("by rank: not cut at 0", "unclipped.clamp_(0, ", "unclipped.clamp_(-1, ", check_ranks),
    Fault("by rank: short strides", "-(-span // (trials", "max(1, span // (trials", check_ranks),
    Fault("by rank: off by one", "stride * number", "stride * (number - 1)", check_ranks),
    Fault("by rank: sides swapped", "ends[:, :1], ends", "ends[:, 1:], ends", check_ranks),
    Fault("by rank: breakpoints as they come", ".sort(1).values", "", check_ranks),
    Fault("by rank: blurred ends", "apart = 4 * numbers.eps", "apart = 0.0", check_ranks),
]

SEGMENTS = [
    Fault("padding of weights and costs", "matrix += values.amin()", "pass", check_prox),
    Fault("padded with ones", "matrix += values.amin()", "matrix += 1", check_segments),
    Fault("positions off by one", SIZES, f"{SIZES} - (torch.arange(count) > 0).long()", check_prox),
    Fault(
        "positions off by one: value",
        SIZES,
        f"{SIZES} - (torch.arange(count) > 0).long()",
        check_value,
    ),
    Fault(
        "positions off by one on the way back",
        "values = values[self.positions]",
        "values = values[(self.positions - 1).clamp(min=0)]",
        check_prox,
    ),
    Fault(
        "rows swapped",
        SIZES,
        "shift = torch.arange(count).flip(0) * width - starts",
        check_value,
    ),
    Fault("rows of equal length swapped", MATRIX, f"{MATRIX}.flip(0)", check_alone),
    Fault("entries of a row swapped", MATRIX, f"{MATRIX}.flip(1)", check_alone),
    Fault(
        "budgets of the first segments for all matrices",
        COLUMN,
        "per_segment[: self.rows]",
        check_alone,
    ),
    Fault(
        "groups in the order of matrices",
        "result[self.groups] = values",
        "result.view(-1)[: len(values)] = values",
        check_alone,
    ),
    Fault(
        "segments of very different sizes start where others end",
        "starts = lengths.cumsum(0) - lengths",
        "starts = lengths.sort().values.cumsum(0) - lengths.sort().values",
        check_alone,
    ),
    Fault(
        "unsorted labels are not put in order",
        "order if bucket.groups is None else",
        "bucket.groups if bucket.groups is None else",
        check_prox,
    ),
    Fault(
        "unsorted labels are not put in order: conjugate",
        "order if bucket.groups is None else",
        "bucket.groups if bucket.groups is None else",
        check_conjugate,
    ),
    Fault(
        "unsorted labels are not put in order: very different sizes",
        "order[bucket.groups]",
        "bucket.groups",
        check_alone,
    ),
    Fault(
        "ties of unsorted labels go to the higher index",
        "labels.argsort(stable=True)",
        "len(labels) - 1 - labels.flip(0).argsort(stable=True)",
        check_projection,
    ),
    Fault(
        "labels are called sorted",
        "(labels[1:] >= labels[:-1]).all()",
        "(labels[1:] >= 0).all()",
        check_anchored,
    ),
    Fault(
        "totals in the order of matrices",
        "totals[bucket.segments] = sums",
        "totals[: len(sums)] = sums",
        check_segments,
    ),
    Fault(
        "empty segments at the end are forgotten",
        "minlength=count or 0",
        "minlength=0",
        check_segments,
    ),
]

CHECKED = [
    Fault("a number is rounded", "float(value), dtype", "round(value), dtype", check_alone),
    Fault(
        "a vector of numbers is that of its first",
        "values = value.detach().to(like).expand(count)",
        "values = value.detach().to(like).view(-1)[:1].expand(count)",
        check_prox,
    ),
    Fault(
        "zero is positive",
        "(lowest > 0 if positive else lowest >= 0)",
        "(lowest >= 0)",
        check_arguments,
    ),
    Fault("infinite is finite", "and highest < math.inf", "", check_arguments),
    Fault("NaN is a number", "or not math.isfinite(value)", "", check_arguments),
    Fault("no highest number", "or not 0 <= value <= highest", "or value < 0", check_arguments),
    Fault(
        "any length of a vector will do",
        "value.dim() > 1 or (value.dim() == 1 and len(value) != count)",
        "value.dim() > 1",
        check_arguments,
    ),
]
FAULTS = ROOTS + SEGMENTS + CHECKED

# These change how long it takes, or nothing.
HARMLESS = [
    Fault("Newton's step the wrong way", "root - excess / slope", "root + excess / slope"),
    Fault("halving only", "(step <= 0.5 * previous)", "(step < 0)"),
    Fault("all rows are waited for", "= out_of_reach, ", "= out_of_reach & False, "),
]


def run(fault, modules):
    return fault.check(modules[OWN.get(fault.check, "penalties.envelope")], PROBLEMS)


@pytest.mark.parametrize("check", [*OWN, check_ones, check_alone])
def test_the_source_without_a_fault_passes(check):
    run(Fault("none", "", "", check), load(SOURCES))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_caught(fault):
    modules = load(SOURCES, fault)
    with pytest.raises(AssertionError):
        run(fault, modules)


@pytest.mark.parametrize("fault", HARMLESS, ids=lambda fault: fault.what)
def test_what_is_no_fault_is_not_caught(fault):
    module = load(SOURCES, fault)["penalties.envelope"]
    for check in CHECKS:
        check(module, PROBLEMS)


def test_every_file_and_every_checker_has_a_fault():
    assert {fault.file(SOURCES) for fault in FAULTS} == FILES
    assert {fault.check for fault in FAULTS} >= {*OWN, *CHECKS}
