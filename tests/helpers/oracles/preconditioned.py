"""A slow twin of `lightning_wgsef.prox_metric`, its objective, and random problems for both.

Notation: v_i are the weights, D_i > 0 their metric; w_j, c_j and K as in `oracle`, tau >= 0 the
step, gamma the debias, t_j = tau w_j, D_i > gamma t_j. The argmin over theta and over u in [0, 1]^m
with sum_j c_j u_j <= K of

    1/2 sum_i D_i (theta_i - v_i)^2 + 1/2 sum_j t_j (1 / u_j - gamma) ||theta_j||^2     (0/0 = 0).

Arrays of shape (problems, groups, members) hold many problems, padded with v = 0. Nothing here
iterates by Newton, sorts or keeps a closed form for u: bisection inside bisection.
"""

import dataclasses

import numpy as np
import torch

from tests.helpers.oracles import envelope as oracle
from tests.helpers.oracles.envelope import Real
from tests.helpers.problems import FLOOR, loguniform

HALVINGS = 66  # of an interval of logarithms shorter than 200: to 1e-17
SMALLEST = Real(1e-60)  # a share below it counts as it; exact zeros are found apart


def shares(values, metric, step, k, weights, costs, debias):
    r"""u of shape (problems, groups), by bisection for mu and within it for every u_j.

    For fixed u, theta_i = v_i D_i u_j / ((D_i - gamma t_j) u_j + t_j). What is left has in u_j the
    derivative -h_j(u_j), h_j(u) = 1/2 sum_i t_j D_i^2 v_i^2 / ((D_i - gamma t_j) u + t_j)^2, which
    falls with u. With mu the multiplier of the budget h_j(u_j) = mu c_j inside (0, 1), u_j = 0
    where even h_j(0) <= mu c_j and u_j = 1 where still h_j(1) >= mu c_j. The budget is spent,
    unless all groups that are not zero fit: then mu = 0.
    """
    threshold = step[:, None] * weights
    curvature = metric - debias * threshold[..., None]
    pull = 0.5 * threshold[..., None] * (metric * values) ** 2
    live = (values != 0).any(axis=-1)
    assert (curvature > 0)[values != 0].all()
    assert (threshold > 0).all()

    def slope(u):
        return (pull / (curvature * u[..., None] + threshold[..., None]) ** 2).sum(axis=-1)

    at_zero, at_one = slope(np.zeros_like(threshold)), slope(np.ones_like(threshold))

    def shares_at(mu):
        price = mu[:, None] * costs
        low, high = np.full_like(price, SMALLEST), np.ones_like(price)
        for _ in range(HALVINGS):
            middle = np.sqrt(low * high)
            right = slope(middle) > price
            low, high = np.where(right, middle, low), np.where(right, high, middle)
        inside = np.sqrt(low * high)
        return np.where(at_zero <= price, 0, np.where(at_one >= price, 1, inside)) * live

    fits = (costs * live).sum(axis=-1) <= k
    low = np.where(live, at_one / costs, np.inf).min(axis=-1)
    high = np.where(live, at_zero / costs, 0).max(axis=-1)
    low, high = (np.where(fits, 1, x) for x in (low, high))
    for _ in range(HALVINGS):
        middle = np.sqrt(low * high)
        right = (costs * shares_at(middle)).sum(axis=-1) >= k
        low, high = np.where(right, middle, low), np.where(right, high, middle)
    # Where groups of u = 1 spend all of K, any mu of an interval is right. This is its upper end,
    # which is far from where a group that is dead would come alive.
    u = np.where(fits[:, None], live, shares_at(low))
    spent = (costs * u).sum(axis=-1)
    assert (np.abs(spent - k) <= 1e-12 * k)[~fits].all()
    return u


def solve(values, metric, step, k, weights, costs, debias):
    """theta, shape (problems, groups, members); step and k have shape (problems,)."""
    values, metric, step, k, weights, costs = (
        np.asarray(x, dtype=Real) for x in (values, metric, step, k, weights, costs)
    )
    debias = Real(debias)
    moving = step > 0  # the prox of the zero function is the identity
    step = np.where(moving, step, 1e-6 * metric.min(axis=(1, 2)) / weights.max(axis=1))
    u = shares(values, metric, step, k, weights, costs, debias)[..., None]
    threshold = (step[:, None] * weights)[..., None]
    theta = values * metric * u / ((metric - debias * threshold) * u + threshold)
    return np.where(moving[:, None, None], theta, values).astype(np.float64)


def prox_metric(values, metric, index, step, k, weights=None, costs=None, debias=0.0):
    """The same for one problem, `index` naming the group of every weight."""
    groups = index.max() + 1 if weights is None and costs is None else None
    weights = np.ones(groups or len(costs)) if weights is None else weights
    costs = np.ones(len(weights)) if costs is None else costs
    place = np.array([np.sum(index[:i] == group) for i, group in enumerate(index)], dtype=int)
    padded = np.zeros((2, 1, len(weights), place.max() + 1))
    padded[1] = metric.min()
    padded[:, 0, index, place] = values, metric
    some = np.reshape
    theta = solve(*padded, some(step, 1), some(k, 1), weights[None], costs[None], debias)
    return theta[0, index, place]


def objective(theta, values, metric, index, step, k, weights, costs, debias):
    """1/2 sum_i D_i (theta_i - v_i)^2 + tau (E - gamma/2 sum_j w_j ||theta_j||^2).

    E is `oracle.value`, which knows nothing of D. theta of shape (n,) or (points, n).
    """
    owner = index[:, None] == np.arange(len(weights))
    squares = theta**2 @ owner
    weights, costs = (np.broadcast_to(x, squares.shape) for x in (weights, costs))
    envelope = oracle.value(np.sqrt(squares), np.full(squares.shape[:-1], k), weights, costs)
    ridge = 0.5 * np.sum(weights * squares, axis=-1)
    distance = 0.5 * np.sum(metric * (theta - values) ** 2, axis=-1)
    return distance + step * (envelope - debias * ridge)


def worst_descent(theta, problems, rng, points=100):
    """The most by which a change of theta lowers the objective, relative to the sum of its terms.

    Changes of 1e-6 to 1 in the size of the group, also where it is dead; one in three is of one
    group only, one in three takes a group nearer to zero or to v.
    """
    worst = 0.0
    groups, members = theta.shape[1:]
    for row, least in enumerate(theta):
        values, exists = problems.values[row], problems.exists[row]
        scale = np.abs(values).max(axis=-1, keepdims=True)
        scale = np.where(scale > 0, scale, np.abs(values).max()) * exists
        change = rng.normal(size=(points, groups, members)) * scale
        one = rng.permuted(np.eye(groups)[rng.integers(0, groups, points)], axis=1)[..., None]
        change[::3] *= one[::3]
        target = values * rng.integers(0, 2, (points, 1, 1))
        change[1::3] = ((target - least) * one)[1::3]
        change *= loguniform(rng, 1e-6, 1, (points, 1, 1))
        others = np.concatenate([least[None], least + change]).reshape(points + 1, -1)
        arguments = {
            "values": values.ravel(),
            "metric": problems.metric[row].ravel(),
            "index": np.repeat(np.arange(groups), members),
            "step": problems.step[row],
            "k": problems.k[row],
            "weights": problems.weights[row],
            "costs": problems.costs[row],
        }
        value = objective(others, **arguments, debias=problems.debias)
        terms = objective(others, **arguments, debias=-problems.debias)  # the same, all added
        descent = (value[0] - value) / np.maximum(terms, terms[0]).clip(min=1e-300)
        worst = max(worst, float(descent.max()))
    return worst


# ----------------------------------------------------------------------
# Random problems.


@dataclasses.dataclass
class Problems:
    """Many problems, padded, and their flat form: weights and groups of all mixed at random."""

    values: np.ndarray
    metric: np.ndarray
    step: np.ndarray
    k: np.ndarray
    weights: np.ndarray
    costs: np.ndarray
    debias: float
    exists: np.ndarray  # (problems, groups, members)
    rng: np.random.Generator

    def __post_init__(self):
        self.mix()

    def mix(self):
        """An order of all weights and a number for every group, at random."""
        self._places = tuple(self.rng.permutation(np.argwhere(self.exists)).T)
        self._groups = tuple(self.rng.permutation(np.argwhere(self.exists.any(axis=-1))).T)
        number = np.zeros(self.weights.shape, dtype=int)
        number[self._groups] = np.arange(len(self._groups[0]))
        self.index = number[self._places[:2]]

    def exact(self):
        """The oracle's theta, padded."""
        arrays = (self.values, self.metric, self.step, self.k, self.weights, self.costs)
        return solve(*arrays, self.debias)

    def flat(self):
        """Arrays of one call with a segment for each problem."""
        return {
            "values": self.values[self._places],
            "metric": self.metric[self._places],
            "index": self.index,
            "step": self.step,
            "k": self.k,
            "weights": self.weights[self._groups],
            "costs": self.costs[self._groups],
            "segments": self._groups[0],
            "debias": self.debias,
        }

    def rows(self, flat):
        """The answer to a flat call, padded with zero."""
        rows = np.zeros(self.values.shape)
        rows[self._places] = flat
        return rows

    def run(self, env, **changed):
        """The answer of the module under test, padded."""
        return self.rows(run(env, self.flat() | changed))

    def alone(self):
        """Arrays of one call for a single problem: no segments, numbers for the step and k."""
        arguments = self.flat()
        del arguments["segments"]
        return arguments | {"step": float(self.step[0]), "k": float(self.k[0])}

    def __iter__(self):
        """Each problem on its own."""
        fields = [f.name for f in dataclasses.fields(self) if f.name not in ("debias", "rng")]
        for row in range(len(self.k)):
            arrays = {name: getattr(self, name)[row : row + 1] for name in fields}
            yield Problems(**arrays, debias=self.debias, rng=self.rng)


def run(env, arguments):
    """One call of the module under test, of arrays and numbers."""
    return env.prox_metric(
        **{name: torch.as_tensor(x) if np.ndim(x) else x for name, x in arguments.items()}
    )


def relative_error(got, want, problems, floor=FLOOR):
    """Worst relative error of a single weight; infinite where `got` is not a number.

    All weights of a group move with one u_j, so each must be right in its own measure, however
    small its D_i makes it. u_j is a difference, without a relative error where it is nearly zero:
    in a group that is scaled by less than the floor, ||D theta|| / ||D v||, errors count relative
    to the floor.
    A group that dies is measured as a whole, against the floor.
    """
    size = np.sqrt(np.sum((problems.metric * problems.values) ** 2, axis=-1, keepdims=True))
    left = np.sqrt(np.sum((problems.metric * want) ** 2, axis=-1, keepdims=True))
    scale = left / np.where(size > 0, size, 1)
    alive = np.abs(want) * np.maximum(1, floor / np.where(scale > 0, scale, 1))
    dead = floor * np.abs(problems.values)
    difference = np.abs(got - want)
    measure = np.where(scale > 0, alive, dead)
    error = np.where(difference == 0, 0, difference / np.maximum(measure, 1e-300))
    return float(np.where(np.isnan(error), np.inf, error).max(initial=0.0))


def random_problems(rng, count, debias=0.0, groups=6, members=5, *, unit_costs=False):
    """Problems that differ in size, scale, metric, zeros, ties, weights, costs, budget and step."""
    shape, each, column = (count, groups, members), (count, groups), (count, 1)
    wide = (count, 1, 1)
    present = np.arange(groups) < rng.integers(1, groups + 1, column)
    exists = np.arange(members) < rng.integers(1, members + 1, (count, groups, 1))
    exists &= present[..., None]
    values = rng.normal(size=shape) * loguniform(rng, 1e-3, 1e3, wide)
    values *= np.exp(rng.normal(size=each) * rng.uniform(0.05, 2.5, column))[..., None]
    values[rng.random(shape) < 0.1] = 0
    values[(rng.random(column) < 0.25) & (rng.random(each) < 0.4)] = 0
    # Every weight its own metric, every group its own, every problem its own with a little noise.
    metric = np.choose(
        rng.integers(0, 4, wide).clip(max=2),
        [
            loguniform(rng, 1e-4, 1e2, (count, groups, 1)) * np.ones(shape),
            loguniform(rng, 1e-4, 1e2, wide) * np.exp(0.5 * rng.normal(size=shape)).clip(0.1, 10),
            loguniform(rng, 1e-4, 1e2, shape),
        ],
    )
    weights = np.where(rng.random(column) < 0.4, 1.0, np.exp(rng.normal(size=each)))
    # As near to the debiased limit in all groups at once.
    weights = np.where(
        rng.random(column) < 0.2, metric.min(axis=-1, where=exists, initial=1e9), weights
    )
    kind = rng.integers(0, 3, column) * (not unit_costs)
    costs = np.select(
        [kind == 0, kind == 1],
        [np.ones(each), rng.integers(1, 5, each).astype(float)],
        np.exp(0.7 * rng.normal(size=each)),
    )
    tied = rng.random(count) < 0.1
    exists[tied] = present[tied][..., None]
    values[tied] = rng.choice([-1.0, 1.0], (tied.sum(), groups, members))
    values[tied] *= rng.integers(1, 3, (tied.sum(), groups, 1))
    metric[tied] = metric[tied][:, :1]
    weights[tied] = costs[tied] = kind[tied] = 1
    values[~exists] = 0
    total = (costs * present).sum(axis=1)
    k = rng.uniform(0.05, 1, count) * total
    whole = (kind[:, 0] < 2) & (rng.random(count) < 0.6)
    k = np.where(whole, np.maximum(1, np.round(k)), k)
    k = np.where(rng.random(count) < 0.1, rng.uniform(1, 2, count) * total, k)
    step = loguniform(rng, 1e-8, 1e3, count)
    if debias > 0:
        share = np.where(rng.random(count) < 0.5, loguniform(rng, 1e-6, 0.999, count), 0)
        share = np.where(share == 0, 1 - loguniform(rng, 1e-3, 1, count), share)
        limit = np.where(exists, metric / weights[..., None], np.inf).min(axis=(1, 2)) / debias
        step = np.minimum(share * limit, 1e3)
    return Problems(values, metric, step, k, weights, costs, debias, exists, rng)
