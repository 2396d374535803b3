"""Many segments of a few groups, and segments of millions: as the general way, which the oracle
judges, does them one by one. Unit weights, spelled out, force the general way."""

import itertools

import pytest
import torch

from lightning_wgsef import prox_multipliers
from lightning_wgsef.penalties.segments import LARGE
from lightning_wgsef.penalties.solvers import sampled_secant as millions
from lightning_wgsef.penalties.solvers import sorting_network as few
from tests.helpers.problems import FLOOR, TOLERANCE, relative_error

STEPS = [  # step, debias, anchored
    (0.05, 1.0, True),
    (0.05, 1.0, False),
    (0.9, 1.0, True),
    (0.999, 0.5, False),
    (1e-3, 0.0, False),
    (0.3, 0.5, True),
    (5.0, 0.0, False),
    (1.0, 1.0, True),
    (2.0, 0.5, True),
    (0.0, 1.0, False),
]
every_step = pytest.mark.parametrize(("step", "debias", "anchored"), STEPS)


def some_norms(count, dtype, zeros=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    norms = torch.randn(count, generator=generator, dtype=dtype).abs()
    norms[torch.rand(count, generator=generator) < zeros] = 0
    return norms


def in_general(norms, step, k, **options):
    return prox_multipliers(norms.double(), step, k, weights=torch.ones_like(norms), **options)


@every_step
@pytest.mark.parametrize(
    ("width", "k"),
    [(4, 2), (4, 3.7), (4, 2.25), (4, 1), (8, 4), (8, 8), (8, 7.9), (16, 0.5), (3, 2)],
)
def test_a_few_groups(width, k, step, debias, anchored):
    options = {"debias": debias, "anchored": anchored, "segments": width}
    norms = some_norms(width * 2**12, torch.float64)
    norms[:width] = 0  # a segment that is dead
    norms[width : 2 * width] = 0
    norms[width] = 1  # and one within its budget
    got, want = prox_multipliers(norms, step, k, **options), in_general(norms, step, k, **options)
    assert relative_error(got, want, FLOOR) <= TOLERANCE
    assert torch.equal(got == 0, want == 0)
    single = prox_multipliers(norms.float(), step, k, **options)
    exact = in_general(norms.float(), step, k, **options)
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("width", range(2, few.LONGEST + 1))
def test_the_network_sorts(width):
    rows = list(some_norms(width * 1000, torch.float64, zeros=0.3).view(width, 1000))
    ordered = torch.stack(few._in_order(rows))
    assert torch.equal(ordered, torch.stack(rows).sort(dim=0, descending=True).values)


def test_a_tiny_step_on_a_dead_segment_is_no_nan():
    norms = torch.ones(4 * few.MANY)
    norms[:4] = 0
    got = prox_multipliers(norms, 1e-8, 2, segments=4)
    assert got[:4].tolist() == [0] * 4
    assert torch.isfinite(got).all()


@every_step
@pytest.mark.parametrize("share", [1e-5, 0.01, 0.3, 0.99])
def test_millions(share, step, debias, anchored):
    norms, k = some_norms(LARGE + 5, torch.float64), share * LARGE + 0.5
    options = {"debias": debias, "anchored": anchored}
    want = in_general(norms, step, k, **options)
    got = prox_multipliers(norms, step, k, **options)
    assert relative_error(got, want, FLOOR) <= TOLERANCE
    assert torch.equal(got == 0, want == 0)
    single = prox_multipliers(norms.float(), step, k, **options)
    exact = in_general(norms.float(), step, k, **options)
    assert relative_error(single.double(), exact, FLOOR) <= TOLERANCE


SPREADS = {
    "few live": lambda: torch.cat([torch.linspace(1, 3.4, 100), torch.zeros(LARGE)]),
    "all equal": lambda: torch.ones(LARGE),
    "two levels": lambda: torch.cat([torch.ones(LARGE), torch.full((1000,), 50.0)]),
    "60 orders": lambda: 10 ** (60 * torch.rand(LARGE, dtype=torch.float64) - 30),
    "sorted": lambda: torch.arange(LARGE).float(),
    "periodic": lambda: (torch.arange(LARGE) % 128 == 0).float() + 0.1,
    "all zero": lambda: torch.zeros(LARGE),
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("k", [0.5, 3, 1000.0, 1e5])
def test_where_a_sample_misleads(spread, k):
    norms = SPREADS[spread]()
    for (step, debias, anchored), dtype in itertools.product(STEPS[:6], [norms.dtype]):
        options = {"debias": debias, "anchored": anchored}
        want = in_general(norms.to(dtype), step, k, **options)
        got = prox_multipliers(norms.to(dtype), step, k, **options)
        assert relative_error(got.double(), want, FLOOR) <= 10 * TOLERANCE, (step, debias)


def test_kth_largest_and_ties():
    norms = torch.randint(0, 50, (LARGE,), generator=torch.Generator().manual_seed(1)).float()
    ordered = norms.sort(descending=True).values
    for k in (1, 2, 777, LARGE // 3, LARGE):
        assert millions.kth_largest(norms, k) == ordered[k - 1]
        kept = millions.projection(norms, k)
        first = norms.sort(descending=True, stable=True).indices[:k]
        assert torch.equal(kept.nonzero().flatten(), first[norms[first] > 0].sort().values)


def test_large_segments_have_matrices_of_their_own():
    norms, ends = some_norms(2 * LARGE + 10, torch.float32), [LARGE, 2 * LARGE]
    labels = (torch.arange(len(norms)).view(-1, 1) >= torch.tensor(ends)).sum(1)
    got = prox_multipliers(norms, 0.1, torch.tensor([50.0, 1e4, 3.0]), segments=labels)
    for number, k in enumerate((50.0, 1e4, 3.0)):
        alone = prox_multipliers(norms[labels == number], 0.1, k)
        torch.testing.assert_close(got[labels == number], alone, rtol=1e-5, atol=1e-6)
