"""Faults planted in the envelope's source must turn the checkers of `test_envelope_oracle` red."""

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from test_envelope_oracle import (
    CHECKS,
    check_anchored,
    check_conjugate,
    check_projection,
    check_prox,
    check_value,
)

from lightning_wgsef import envelope

# Each is executed after those that it imports.
FILES = ("segments", "budgets", "envelope")
PROBLEMS = 300  # enough for every fault below, and quick


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`, which `check` must notice."""

    fault: str
    file: str
    old: str
    new: str
    check: Callable[..., float]


MUTANTS = [
    Mutant(
        "value without the factor 1/2",
        "envelope",
        "0.5 * torch.where(live, squares / shares, 0)",
        "1.0 * torch.where(live, squares / shares, 0)",
        check_value,
    ),
    Mutant(
        "gap without the factor 1/2",
        "envelope",
        "competition.total(0.5 * excess)",
        "competition.total(1.0 * excess)",
        check_value,
    ),
    Mutant(
        "gap without the division by the share",
        "envelope",
        "squares * (1 - shares) / shares",
        "squares * (1 - shares)",
        check_value,
    ),
    Mutant(
        "conjugate without the factor 1/2",
        "envelope",
        "0.5 * squares[order] * share",
        "squares[order] * share",
        check_conjugate,
    ),
    Mutant(
        "conjugate without the weights",
        "envelope",
        "competition.norms.square() / competition.weights",
        "competition.norms.square()",
        check_conjugate,
    ),
    Mutant(
        "conjugate of one group less",
        "envelope",
        "order, competition.segments, sizes) - 1",
        "order, competition.segments, sizes)",
        check_conjugate,
    ),
    Mutant(
        "weights dropped from the threshold",
        "envelope",
        "competition.spread(steps) * competition.weights",
        "competition.spread(steps)",
        check_prox,
    ),
    Mutant(
        "debias ignored in the shares",
        "envelope",
        "(1 - debias * thresholds).clamp(",
        "(1 - 0 * thresholds).clamp(",
        check_prox,
    ),
    Mutant(
        "debias ignored in the factors",
        "envelope",
        "thresholds * (1 - debias * shares)",
        "thresholds",
        check_prox,
    ),
    Mutant(
        "the strongest are not restored by the anchored step",
        "envelope",
        "torch.where(kept, 1, (factors / anchor).clamp(max=1))",
        "(factors / anchor).clamp(max=1)",
        check_anchored,
    ),
    Mutant(
        "the anchored step is not cut at 1",
        "envelope",
        "(factors / anchor).clamp(max=1)",
        "(factors / anchor)",
        check_anchored,
    ),
    Mutant(
        "the full step does not project",
        "envelope",
        "competition.spread(competition.total(partial.to(thresholds.dtype))) == 0",
        "competition.spread(competition.total(partial.to(thresholds.dtype))) < 0",
        check_projection,
    ),
    Mutant(
        "weights dropped from the strength: value",
        "budgets",
        "self.norms * (self.weights / self.costs).sqrt()",
        "self.norms / self.costs.sqrt()",
        check_value,
    ),
    Mutant(
        "weights dropped from the strength: anchored step",
        "budgets",
        "self.norms * (self.weights / self.costs).sqrt()",
        "self.norms / self.costs.sqrt()",
        check_anchored,
    ),
    Mutant(
        "costs dropped from the strength: prox",
        "budgets",
        "self.norms * (self.weights / self.costs).sqrt()",
        "self.norms * self.weights.sqrt()",
        check_prox,
    ),
    Mutant(
        "costs dropped from the strength: projection",
        "budgets",
        "self.norms * (self.weights / self.costs).sqrt()",
        "self.norms * self.weights.sqrt()",
        check_projection,
    ),
    Mutant(
        "square root dropped from the strength",
        "budgets",
        "(self.weights / self.costs).sqrt()",
        "(self.weights / self.costs)",
        check_prox,
    ),
    Mutant(
        "costs dropped from the budget",
        "budgets",
        "return self.total(self.costs * shares)",
        "return self.total(shares)",
        check_prox,
    ),
    Mutant(
        "a group saturates as if there were no debias",
        "budgets",
        "(thresholds + widths) / strengths",
        "(thresholds + 1) / strengths",
        check_prox,
    ),
    Mutant(
        "the root is sought one breakpoint too low",
        "budgets",
        "left = breakpoints[low]",
        "left = breakpoints[(low - 1).clamp(min=0)]",
        check_prox,
    ),
    Mutant(
        "the root is the breakpoint below it",
        "budgets",
        "torch.where(slope > 0, left + distance, left)",
        "left",
        check_value,
    ),
    Mutant(
        "the weakest are kept",
        "budgets",
        "sort_within(strengths, self.segments, descending=True)",
        "sort_within(strengths, self.segments, descending=False)",
        check_projection,
    ),
    Mutant(
        "the anchor is the last group but one",
        "budgets",
        "first_positions(sizes) + number - 1)",
        "first_positions(sizes) + number - 2)",
        check_anchored,
    ),
    Mutant(
        "ties go to the higher index",
        "segments",
        "values.argsort(stable=True, descending=descending)",
        "len(values) - 1 - values.flip(0).argsort(stable=True, descending=descending)",
        check_projection,
    ),
    Mutant(
        "running costs do not restart in a segment",
        "segments",
        "return running - before[segments[order]]",
        "return running",
        check_projection,
    ),
]


def load(mutant=None):
    """The envelope from its source and that of the files it imports, with a fault or none."""
    modules = {}
    with pytest.MonkeyPatch.context() as patch:
        for file in FILES:
            path = Path(envelope.__file__).with_name(f"{file}.py")
            source = path.read_text(encoding="utf-8")
            if mutant and mutant.file == file:
                assert source.count(mutant.old) == 1, f"{file}.py must hold once: {mutant.old}"
                source = source.replace(mutant.old, mutant.new)
            module = types.ModuleType(f"lightning_wgsef.{file}")
            # Imports of the next file, and dataclasses, look here.
            patch.setitem(sys.modules, module.__name__, module)
            exec(compile(source, str(path), "exec"), module.__dict__)
            modules[file] = module
    return modules["envelope"]


@pytest.mark.parametrize("check", CHECKS)
def test_the_source_without_a_fault_passes(check):
    module = load()
    assert module is not envelope
    assert check(module, PROBLEMS) <= 1e-6


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_a_planted_fault_is_caught(mutant):
    module = load(mutant)
    with pytest.raises(AssertionError):
        mutant.check(module, PROBLEMS)


def test_every_file_and_every_checker_has_a_fault():
    assert {mutant.file for mutant in MUTANTS} == set(FILES)
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)
