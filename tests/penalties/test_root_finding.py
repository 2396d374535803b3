"""The root that spends a budget, against its definition, and in how many rounds it is found.

The `check_*` functions take the module under test, so that `test_mutants` can give them a
broken one.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_wgsef.penalties.solvers import root_finding as roots

# By the largest offset: rounds of the slowest problem, and of one on average. Of 100,000 each the
# slowest take 19 and 40 rounds, the average ones 8 and 18.
ROUNDS = {1.0: (24, 10), 1e8: (44, 22)}


@dataclasses.dataclass
class Rows:
    """Problems of `root_of_budget`, a row each."""

    slopes: np.ndarray
    offsets: np.ndarray
    costs: np.ndarray | None
    budgets: np.ndarray
    starts: np.ndarray
    never: np.ndarray

    def solve(self, module, dtype=torch.float64, some=slice(None)):
        """The module's roots."""
        arrays = (self.slopes, self.offsets, self.costs, self.budgets, self.starts)
        tensors = [None if x is None else torch.as_tensor(x[some], dtype=dtype) for x in arrays]
        return module.root_of_budget(*tensors, torch.as_tensor(self.never[some])).numpy()

    def spent(self, root):
        """What the shares at the roots cost, by the definition, in 80 bits."""
        exact = np.longdouble
        shares = np.clip(root.astype(exact) * self.slopes - self.offsets, 0, 1)
        priced = shares if self.costs is None else shares * self.costs
        return priced.sum(axis=1, keepdims=True)


def random_rows(rng, count, groups=8, *, decades=30, offsets=1.0):
    """Slopes from 10^-decades to 10^decades, some zero; offsets up to `offsets`; any budget."""
    shape, column = (count, groups), (count, 1)
    slopes = 10.0 ** (rng.uniform(-decades, decades, shape) * rng.uniform(0, 1, column))
    slopes *= (rng.random(shape) < 0.8) | (rng.random(column) < 0.5)
    costs = None if rng.random() < 0.5 else np.exp(rng.normal(size=shape))
    offset = offsets * rng.random(shape if rng.random() < 0.5 else column)
    offset *= rng.random(column) < 0.7
    total = ((slopes > 0) * (1 if costs is None else costs)).sum(axis=1, keepdims=True)
    budgets = np.where(total > 0, total, 1) * rng.uniform(0.02, 1.1, column)
    whole = np.maximum(1, np.round(budgets))
    budgets = np.where((rng.random(column) < 0.5) & (costs is None), whole, budgets)
    # Near to the root, far from it, and of no use.
    with np.errstate(divide="ignore"):
        starts = budgets * (1 + offset.max()) / slopes.sum(axis=1, keepdims=True)
    starts = np.where(rng.random(column) < 0.3, 10.0 ** rng.uniform(-60, 60, column), starts)
    strange = rng.choice([0, np.inf, -np.inf, np.nan, -1], column)
    starts = np.where(rng.random(column) < 0.1, strange, starts)
    return Rows(slopes, offset, costs, budgets, starts, never=total <= budgets)


def check_definition(module, count=2000, seed=1):
    """The shares at the root cost K, over 60 orders of magnitude; the others are positive."""
    rng = np.random.default_rng(seed)
    worst = 0.0
    for _ in range(10):
        rows = random_rows(rng, count // 10)
        root = rows.solve(module)
        assert ((root > 0) & np.isfinite(root)).all()
        error = (np.abs(rows.spent(root) - rows.budgets) / rows.budgets)[~rows.never]
        worst = max(worst, float(error.max()))
        assert worst <= 1e-12
    return worst


def check_neighbours(module, count=2000, seed=2):
    """However steep the sum is: a few numbers further it is on the other side of K."""
    rng = np.random.default_rng(seed)
    for dtype, decades in ((torch.float64, 30), (torch.float32, 8)):
        near = 16 * torch.finfo(dtype).eps
        for offsets in (1.0, 1e3, 1e8):
            rows = random_rows(rng, count // 6, decades=decades, offsets=offsets)
            for name in ("slopes", "offsets", "budgets", "starts"):  # as the module has them
                rounded = torch.as_tensor(getattr(rows, name), dtype=dtype).double().numpy()
                setattr(rows, name, rounded)
            if rows.costs is not None:
                rows.costs = torch.as_tensor(rows.costs, dtype=dtype).double().numpy()
            root = rows.solve(module, dtype).astype(np.float64)
            below, above = rows.spent(root * (1 - near)), rows.spent(root * (1 + near))
            right = (below <= rows.budgets * (1 + near)) & (above >= rows.budgets * (1 - near))
            assert (right | rows.never).all()
    return 0.0


def rounds_of(module, rows, some=slice(None)):
    """How many rounds all these rows take together, which is what the slowest of them takes."""
    calls = []
    middle = module._middle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_middle", lambda *ends: calls.append(1) or middle(*ends))
        rows.solve(module, some=some)
    return len(calls)


def check_rounds(module, count=2000, seed=3):
    """No problem takes many rounds, and most take few."""
    rng = np.random.default_rng(seed)
    worst = {}
    for offsets, (most, usual) in ROUNDS.items():
        each = []
        for _ in range(10):
            rows = random_rows(rng, count // 20, offsets=offsets)
            worst[offsets] = max(worst.get(offsets, 0), rounds_of(module, rows))
            some = range(min(count // 20, 50))
            each += [rounds_of(module, rows, slice(row, row + 1)) for row in some]
        assert worst[offsets] <= most < module.ROUNDS
        assert np.mean(each) <= usual
    return float(max(worst.values()))


def by_rank(module):
    """`root_by_rank` with the arguments of `root_of_budget`."""
    return SimpleNamespace(root_of_budget=lambda *given: module.root_by_rank(*given[:4]))


def check_ranks(module, count=2000):
    """The other way has the same definition, whatever number of breakpoints is tried at once."""
    worst = 0.0
    for tried in (None, 1, 10, 100):
        with pytest.MonkeyPatch.context() as patch:
            if tried:
                patch.setattr(module, "_TRIED", tried * count // 10 * 8)
            worst = max(worst, check_definition(by_rank(module), count))
            check_neighbours(by_rank(module), count)
    return worst


CHECKS = [check_definition, check_neighbours, check_rounds, check_ranks]


@pytest.mark.parametrize("check", CHECKS)
def test_roots(check, record_property):
    worst = check(roots, 20_000)
    record_property("worst", worst)
    print(f"{check.__name__}: worst {worst:.3g} of 20,000")


def test_rows_of_zeros():
    """Whatever the start, a positive number, and the other rows do not feel it."""
    slopes = torch.tensor([[0.0, 0, 0], [4, 2, 1], [0, 0, 0]], dtype=torch.float64)
    column = torch.ones(3, 1, dtype=torch.float64)
    never = torch.tensor([[True], [False], [True]])
    for start in (0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan):
        for offsets in (0 * column, 0 * slopes):
            for costs in (None, torch.ones_like(slopes)):
                got = roots.root_of_budget(
                    slopes, offsets, costs, 2 * column, start * column, never
                )
                assert ((got > 0) & torch.isfinite(got)).all()
                assert got[1].item() == pytest.approx(1 / 3, rel=1e-15)


def test_rows_of_zeros_by_rank():
    slopes = torch.tensor([[0.0, 0, 0], [4, 2, 1], [0, 0, 0]], dtype=torch.float64)
    for offsets in (slopes[:, :1] * 0, slopes * 0):
        got = roots.root_by_rank(slopes, offsets, None, torch.full_like(slopes[:, :1], 2))
        assert ((got > 0) & torch.isfinite(got)).all()
        assert got[1].item() == pytest.approx(1 / 3, rel=1e-15)


def test_rows_that_are_out_of_reach_are_not_waited_for():
    rng = np.random.default_rng(4)
    rows = random_rows(rng, 500)
    rows.budgets *= 1e3
    rows.never[:] = True
    assert rounds_of(roots, rows) == 1


def test_a_row_alone_has_the_root_that_it_has_among_others():
    rows = random_rows(np.random.default_rng(5), 200)
    together = rows.solve(roots)
    for row in range(200):
        np.testing.assert_array_equal(rows.solve(roots, some=slice(row, row + 1))[0], together[row])


def test_arguments_are_left_alone():
    rows = random_rows(np.random.default_rng(6), 50)
    before = [None if x is None else x.copy() for x in dataclasses.astuple(rows)]
    rows.solve(roots)
    for old, new in zip(before, dataclasses.astuple(rows), strict=True):
        np.testing.assert_array_equal(old, new)


def test_halfway_on_the_scale_of_exponents():
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([[1e-30, 4.0, 1.0]], dtype=dtype), torch.tensor([[1e30, 16, 1]])
        got = roots._middle(ends[0], ends[1].to(dtype))
        assert got[0, 1:].tolist() == [8, 1]
        assert 1 / 3 < got[0, 0] < 3
