r"""Sampled secant for one segment of millions of groups: linear time, little memory.

What `Problem` does with whole matrices in float64 is done here in chunks that stay in the cache,
with the arithmetic that is fast there: products, bounds and sums, hardly a comparison. The root is
first bracketed by a sample: the solution for the sample with a little less and a little more than
its share of the budget. Secants over all groups then find it, which for so many of them is as good
as Newton: the sum is a smooth function at their scale. A sample that misled costs time only.

Sums are in float64; what comes out has the precision of the norms.

Unit weights and costs; on the CPU, since looking at a bracket would stall an accelerator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_wgsef.penalties.solvers.root_finding import root_of_budget
from lightning_wgsef.utils.fusion import CACHED

# debias * step counts as 1 within the rounding of float32 arguments.
FULL_STEP_SLACK = 6e-8

# Of float64, in which sums are formed.
_CHUNK = CACHED // 2

# By so many standard deviations of a sample's count the bracket is wider than its estimate: it
# misleads in one of millions of calls.
_DEVIATIONS = 5.0

_ROUNDS = 200

# So near to a known point a secant is exact: the sum is as good as linear there.
_NEAR = 1e-9

# A known point that misses the budget by more is not near the root, whatever a secant says.
_FLAT = 1e-6


def multipliers(norms: Tensor, step: float, k: float, *, debias: float, anchored: bool) -> Tensor:
    """Return what `prox_multipliers` gives for one segment, shape (m,).

    Args:
        norms: shape (m,), on the CPU, finite, at least 0.
        step: tau, at least 0 and at most 1 / debias.
        k: the budget.
        debias: see `prox_multipliers`.
        anchored: see `prox_multipliers`.
    """
    if step == 0:
        return torch.ones_like(norms)
    survivor = 1.0 if anchored else 1 / (1 + step * (1 - debias))
    if int(norms.count_nonzero()) <= k:
        return (norms > 0).to(norms.dtype).mul_(survivor)
    if debias * step >= 1 - FULL_STEP_SLACK:
        return projection(norms, k).mul_(survivor)
    return _shrunk(norms, step, k, debias, anchored)


def _shrunk(norms: Tensor, step: float, k: float, debias: float, anchored: bool) -> Tensor:
    """Return the multipliers where more groups are live than the budget has room for."""
    width = 1 - debias * step
    root = _root(norms, step, width, k)
    anchor = 1.0
    if anchored and k >= 1:
        last = kth_largest(norms, math.floor(k))
        share = min(1.0, max(0.0, (root * last - step) / width))
        anchor = share / (share + step * (1 - debias * share)) or 1.0
    enters = step / root  # norms above this live
    whole = torch.tensor(enters, dtype=norms.dtype).item()
    result = torch.empty_like(norms)
    for chunk, out in zip(torch.split(norms, _CHUNK), torch.split(result, _CHUNK), strict=True):
        # In two parts: what remains near to where shares begin loses nothing in float32.
        torch.sub(chunk, whole, out=out).sub_(enters - whole)
        shares = out.mul_(root / width).clamp_(0, 1)
        denominators = shares.mul(1 - debias * step).add_(step)
        shares.div_(denominators)
        if anchored:
            shares.div_(anchor).clamp_(max=1)
    return result


def projection(norms: Tensor, k: float) -> Tensor:
    """Return 1 for the floor(k) largest norms that are not zero (ties: lower index first), else 0.

    >>> projection(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2.5)
    tensor([0., 1., 1., 0.])
    """
    count = math.floor(k)
    least = kth_largest(norms, count) if count else math.inf
    room = count - sum(int((chunk > least).count_nonzero()) for chunk in torch.split(norms, _CHUNK))
    result = torch.empty_like(norms)
    for chunk, out in zip(torch.split(norms, _CHUNK), torch.split(result, _CHUNK), strict=True):
        level = (chunk == least) & (chunk > 0)
        found = int(level.count_nonzero())
        if room < found:
            level &= level.cumsum(0) <= room
        room -= min(room, found)
        out.copy_(level.logical_or_(chunk > least))
    return result


def kth_largest(norms: Tensor, k: int) -> float:
    """Return the k-th largest of the norms, 1 <= k <= m.

    >>> kth_largest(torch.tensor([1.0, 3.0, 2.0, 2.0]), 3)
    2.0
    """
    sample = _sample(norms).sort(descending=True).values
    share = k / len(norms)
    # How many of the sample are larger is binomial: the rank is uncertain by its deviation.
    around = _DEVIATIONS * math.sqrt(len(sample) * share * (1 - share)) + 2
    first, last = share * len(sample) - around, share * len(sample) + around
    high = sample[math.floor(first)].item() if first >= 0 else math.inf
    low = sample[math.ceil(last)].item() if last < len(sample) else -math.inf
    above, between = 0, []
    for chunk in torch.split(norms, _CHUNK):
        above += int((chunk > high).count_nonzero())
        between.append(chunk[(chunk <= high) & (chunk >= low)])
    doubtful = torch.cat(between)  # few, so that sorting them is cheap
    if 0 < k - above <= len(doubtful):
        return float(doubtful.sort(descending=True).values[k - above - 1])
    return float(norms.sort(descending=True).values[k - 1])  # the sample misled


def _root(norms: Tensor, step: float, width: float, k: float) -> float:
    """Find the rho with sum clip((rho a - step) / width, 0, 1) = k."""
    sample = _sample(norms).double()
    share = k / len(norms)
    around = _DEVIATIONS * math.sqrt(len(sample) * share * (1 - share)) + 2
    ends = [len(sample) * share - around, len(sample) * share + around]
    most = float((sample > 0).sum())
    # A budget that a sample cannot spend, or that costs it nothing, has no root there.
    guesses = [_root_of_sample(sample, step, width, end) for end in ends if 0 < end < most]
    low, high = 0.0, math.inf
    excess: dict[float, float] = {}  # by root: what the groups take there beyond the budget
    root, previous = guesses[0] if guesses else 1.0, 2.0
    for number in range(_ROUNDS):
        excess[root] = _spent(norms, root, step, width) - k
        low, high = (max(low, root), high) if excess[root] <= 0 else (low, min(high, root))
        if number + 1 < len(guesses):
            root = guesses[number + 1]
            continue
        secant = _secant(excess)
        # A secant is the answer where it is next to a point that is next to the root, or where the
        # bracket leaves it no room; else it is tried only if it behaves, as in `root_of_budget`.
        nearest = min(excess, key=lambda known: abs(known - secant))
        moved = abs(secant - nearest) / nearest
        inside = low < secant < high or abs(excess[nearest]) <= _NEAR * k
        near = moved <= _NEAR and abs(excess[nearest]) <= _FLAT * k
        if inside and (near or low * (1 + _NEAR) >= high):
            return secant
        if math.nextafter(low, high) >= high:  # no number is left between them
            return low
        trusted = low < secant < high and moved <= 0.5 * previous
        previous = moved if trusted else 2.0
        root = secant if trusted else _middle(low, high)
    return root


def _secant(excess: dict[float, float]) -> float:
    """Return where the line through the two best points meets the budget; infinite: nowhere."""
    first, *others = sorted(excess, key=lambda root: abs(excess[root]))
    if not excess[first] or not others:
        return first if not excess[first] else math.inf
    rise = excess[others[0]] - excess[first]
    return first - excess[first] * (others[0] - first) / rise if rise else math.inf


def _spent(norms: Tensor, root: float, step: float, width: float) -> float:
    """Sum what the shares at ``root`` cost."""
    wide = torch.empty(min(_CHUNK, len(norms)), dtype=torch.float64)
    total = 0.0
    for chunk in torch.split(norms, _CHUNK):
        shares = wide[: len(chunk)].copy_(chunk)
        shares.mul_(root / width).sub_(step / width).clamp_(0, 1)
        total += float(shares.sum())
    return total


def _root_of_sample(sample: Tensor, step: float, width: float, k: float) -> float:
    """Find the root of the sample, which is short enough for `root_of_budget`."""
    row = sample.view(1, -1)
    slopes, offsets = row / width, row.new_full((1, 1), step / width)
    start = (k + len(sample) * step / width) / slopes.sum(1, True)
    never = torch.zeros(1, 1, dtype=torch.bool)
    return float(root_of_budget(slopes, offsets, None, row.new_full((1, 1), k), start, never))


def _middle(low: float, high: float) -> float:
    """Return halfway on the scale of exponents; a thousand times further where an end is open."""
    if low and high < math.inf:  # the product of both could overflow
        return math.sqrt(low) * math.sqrt(high)
    return low * 1e3 if low else high / 1e3


def _sample(norms: Tensor) -> Tensor:
    """Draw some of the norms, with replacement; the same on every call."""
    size = min(max(len(norms) // 128, 2**14), 2**19)
    generator = torch.Generator().manual_seed(0)
    return norms[torch.randint(len(norms), (size,), generator=generator)]
