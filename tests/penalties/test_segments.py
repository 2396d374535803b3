"""Segments as rows of matrices and back, against lists of the groups of every segment.

The `check_*` functions take the module under test, so that `test_mutants` can give them a
broken one.
"""

import numpy as np
import pytest
import torch

from lightning_wgsef import prox_multipliers
from lightning_wgsef.penalties import segments as segments
from lightning_wgsef.penalties.problem import as_segments
from lightning_wgsef.penalties.segments import LARGE, Segments
from tests.helpers.groups import raises_naming
from tests.helpers.problems import tensor

SIZES = {
    "none": [],
    "one": [5],
    "one group each": [1, 1, 1],
    "equal": [3, 3, 3, 3],
    "ragged": [2, 5, 1, 4],
    "empty ones": [0, 3, 0, 0, 2, 0],
    "empty ones only": [0, 0],
    "very different": [3] * 300 + [1000, 70, 0, 65, 2],
    "large first": [1000] + [3] * 100 + [0],
}
HUGE = {
    "very large and 50 small": [3] * 25 + [300_000] + [3] * 25,
    "two of the largest, equal": [LARGE, LARGE],
    "two of the largest, and an empty one": [LARGE + 1, 0, LARGE],
}


def layouts(sizes):
    """The labels of consecutive segments, sorted and in disorder."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    yield labels
    yield np.random.default_rng(1).permutation(labels)


def of_labels(module, labels, sizes):
    """The segments, by sizes where the labels are in order, too."""
    result = [module.Segments.of_labels(torch.as_tensor(labels), len(sizes))]
    if (np.diff(labels) >= 0).all():
        result.append(module.Segments.of_sizes(sizes))
    return result


def check_rows(segments, labels, sizes):
    """Every segment is a row of one matrix: its groups in order, then padding."""
    values = np.random.default_rng(2).uniform(1, 2, len(labels))
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    numbers = 10.0 + torch.arange(len(sizes))
    found = []
    for bucket in segments.buckets:
        matrix = bucket.matrix(tensor(values))
        assert matrix.shape == (bucket.rows, bucket.width)
        if not bucket.rows or not bucket.width:
            continue
        padded = bucket.matrix(tensor(values), pad_with_lowest=True).numpy()
        own = (bucket.column(numbers).view(-1) - 10).int().tolist()
        lowest = min(values[members[number]].min() for number in own if sizes[number])
        for row, number in enumerate(own):
            want, size = values[members[number]], sizes[number]
            np.testing.assert_array_equal(matrix[row, :size], want)
            np.testing.assert_array_equal(padded[row, :size], want)
            assert (matrix[row, size:] == 0).all()
            assert (padded[row, size:] == lowest).all()
        found += own
    empty = [number for number, size in enumerate(sizes) if not size]
    assert set(found) | set(empty) == set(range(len(sizes)))
    assert len(found) == len(set(found))


def check_there_and_back(segments, labels, sizes):
    """Vectors over groups and segments come back as they were."""
    values = tensor(np.random.default_rng(3).normal(size=len(labels)))
    result = values if not segments.buckets else None
    for bucket in segments.buckets:
        result = bucket.place(bucket.matrix(values), result, segments.size)
    np.testing.assert_array_equal(result, values)
    np.testing.assert_array_equal(segments.labels(), labels)
    numbers = tensor(10.0 + np.arange(len(sizes)))
    np.testing.assert_array_equal(segments.spread(numbers), numbers[torch.as_tensor(labels)])
    want = np.bincount(labels, weights=values, minlength=len(sizes))
    got = segments.total(values)
    assert (got.shape, got.dtype) == ((len(sizes),), values.dtype)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def check_segments(module, _=None, *, sizes_by_name=SIZES):
    """All of it, for sorted and unsorted labels."""
    for sizes in sizes_by_name.values():
        for labels in layouts(sizes):
            for laid_out in of_labels(module, labels, sizes):
                assert (laid_out.size, laid_out.count) == (len(labels), len(sizes))
                check_rows(laid_out, labels, sizes)
                check_there_and_back(laid_out, labels, sizes)
    return 0.0


@pytest.mark.parametrize("name", [*SIZES, *HUGE])
def test_there_and_back(name):
    check_segments(segments, sizes_by_name={name: (SIZES | HUGE)[name]})


@pytest.mark.parametrize("name", [*SIZES, *HUGE])
def test_padding_is_bounded(name):
    """At most as many entries again as there are groups, but for what is small anyway."""
    sizes = (SIZES | HUGE)[name]
    laid_out = Segments.of_sizes(sizes)
    assert sum(x.rows * x.width for x in laid_out.buckets) <= max(2**16, 2 * sum(sizes))
    alone = [bucket for bucket in laid_out.buckets if bucket.width >= LARGE]
    assert all(bucket.rows == 1 and bucket.positions is None for bucket in alone)


def test_as_few_matrices_as_there_are_magnitudes():
    buckets = Segments.of_sizes(SIZES["very different"]).buckets
    assert sorted((bucket.rows, bucket.width) for bucket in buckets if bucket.width) == [
        (1, 1000),
        (2, 70),
        (301, 3),
    ]
    assert [(x.rows, x.width) for x in Segments.of_sizes([3] * 5 + [4]).buckets] == [(6, 4)]


def test_segments_that_labels_do_not_name():
    labels = torch.tensor([4, 0, 4])
    for count, want in ((None, 5), (5, 5), (7, 7)):
        laid_out = Segments.of_labels(labels, count)
        assert laid_out.count == want
        assert laid_out.labels().tolist() == [4, 0, 4]
        totals = laid_out.total(torch.tensor([1.0, 2.0, 4.0])).tolist()
        assert totals == [2, 0, 0, 0, 5] + [0] * (want - 5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_dtypes_of_labels(dtype):
    laid_out = Segments.of_labels(torch.tensor([1, 0, 1], dtype=dtype))
    assert laid_out.total(torch.tensor([1, 2, 4])).tolist() == [2, 5]
    assert laid_out.spread(torch.tensor([True, False])).tolist() == [False, True, False]


def test_the_device_of_labels_is_kept():
    laid_out = Segments.of_sizes([70_000, 0, 2, 3], "meta")
    assert {bucket.segments.device.type for bucket in laid_out.buckets} == {"meta"}
    assert laid_out.spread(torch.ones(4, device="meta")).shape == (70_005,)


# ----------------------------------------------------------------------
# Every form of the argument.


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("debias", [0.0, 0.5, 1.0])
def test_a_length_says_what_labels_say(debias, anchored):
    rng = np.random.default_rng(4)
    norms, weights, costs = (tensor(np.exp(rng.normal(size=20))) for _ in range(3))
    weights /= weights.max()
    for options in ({}, {"weights": weights}, {"weights": weights, "costs": costs}):
        for k in (1, 2.5, tensor(rng.uniform(0.5, 4, 5))):
            for step in (0.3, 1.0, tensor(rng.uniform(0, 1, 5))):
                forms = [
                    prox_multipliers(
                        norms, step, k, segments=form, debias=debias, anchored=anchored, **options
                    )
                    for form in (4, torch.arange(20) // 4, Segments.of_sizes([4] * 5))
                ]
                assert torch.equal(forms[0], forms[1])
                assert torch.equal(forms[0], forms[2])


@pytest.mark.parametrize("length", [1, 4, 5, 20])
def test_blocks_of_a_length(length):
    laid_out = as_segments(length, torch.ones(20), 1)
    assert (laid_out.size, laid_out.count) == (20, 20 // length)
    assert laid_out.labels().tolist() == (torch.arange(20) // length).tolist()
    values = torch.randn(20)
    (bucket,) = laid_out.buckets
    matrix = bucket.matrix(values)
    assert matrix.data_ptr() == values.data_ptr()  # nothing is copied
    assert torch.equal(bucket.place(matrix, None, 20), values)


def test_segments_are_taken_as_they_are():
    given = Segments.of_sizes([2, 1])
    assert as_segments(given, torch.ones(3), 1) is given
    assert as_segments(None, torch.ones(3), 1).labels().tolist() == [0, 0, 0]
    assert as_segments(None, torch.ones(3), torch.ones(4)).total(torch.ones(3)).tolist() == [
        3,
        0,
        0,
        0,
    ]
    assert as_segments(None, torch.ones(0), 1).count == 1
    assert as_segments(torch.tensor([1, 0, 0]), torch.ones(3), torch.ones(4)).count == 4


@pytest.mark.parametrize(
    ("given", "k", "words"),
    [
        (7, 1, ("segments", "7", "20 groups")),
        (0, 1, ("segments", "0", "at least 1")),
        (-4, 1, ("segments", "-4", "at least 1")),
        (40, 1, ("segments", "40", "20 groups")),
        (Segments.of_sizes([19]), 1, ("segments", "19", "20")),
        (Segments.of_sizes([20, 1]), 1, ("segments", "21", "20")),
        (torch.zeros(19, dtype=torch.int64), 1, ("segments", "(19,)", "(20,)")),
        (torch.zeros(20, 1, dtype=torch.int64), 1, ("segments", "(20, 1)")),
        (torch.zeros(20), 1, ("segments", "float32")),
        (torch.zeros(20, dtype=torch.complex64), 1, ("segments", "complex64")),
        (torch.arange(-1, 19), 1, ("segments", "-1", "index 0")),
        (torch.arange(20), torch.ones(19), ("k", "19 budgets", "19")),
        (4, torch.ones(4), ("k", "(5,)", "(4,)")),
        (Segments.of_sizes([10, 10]), torch.ones(3), ("k", "(2,)", "(3,)")),
    ],
)
def test_segments_that_do_not_fit(given, k, words):
    with raises_naming(*words):
        prox_multipliers(torch.ones(20), 0.1, k, segments=given)
