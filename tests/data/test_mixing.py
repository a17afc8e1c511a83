import copy
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfusion.data.mixing import Mixture, permutation, stable_seed


def test_seed_is_stable() -> None:
    """The same number in every process and version, or trainings could not be repeated."""
    assert stable_seed(0, 0, 0) == 2278555635313361279
    assert len({stable_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}) == 512
    assert stable_seed(1, 23, 4) != stable_seed(12, 3, 4)


def test_permutation_is_stable() -> None:
    assert permutation(6, 0, 0).tolist() == [1, 5, 3, 2, 4, 0]
    assert sorted(permutation(100, 1, 2)) == list(range(100))
    assert permutation(100, 1, 2).tolist() != permutation(100, 1, 3).tolist()


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.data())
def test_each_source_goes_through_all_rows_before_any_comes_again(sizes: list[int], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.2, 5), min_size=len(sizes), max_size=len(sizes)))
    length = data.draw(st.integers(40 * len(sizes), 60 * len(sizes)))
    mixture = Mixture(sizes, weights, length, seed=3)
    assert len(mixture) == length
    drawn: list[list[int]] = [[] for _ in sizes]
    for epoch in range(3):
        counts: Counter[int] = Counter()
        for index in range(length):
            source, row = mixture.locate(epoch, index)
            drawn[source].append(row)
            counts[source] += 1
        for source, weight in enumerate(weights):
            assert abs(counts[source] - weight / sum(weights) * length) < 1
    for source, size in enumerate(sizes):
        whole = len(drawn[source]) // size * size
        for start in range(0, whole, size):
            assert sorted(drawn[source][start : start + size]) == list(range(size))
        rest = drawn[source][whole:]
        assert len(set(rest)) == len(rest)


@settings(max_examples=40, deadline=None)
@given(SIZES)
def test_without_weights_an_epoch_has_every_row_once(sizes: list[int]) -> None:
    mixture = Mixture(sizes)
    for epoch in (0, 1):
        found = [mixture.locate(epoch, index) for index in range(len(mixture))]
        assert sorted(found) == [(source, row) for source, size in enumerate(sizes) for row in range(size)]


def test_place_depends_on_seed_epoch_and_index_alone() -> None:
    places = [(epoch, index) for epoch in (0, 1, 5) for index in range(9)]
    mixture = Mixture([7, 2], [2, 1], 9)
    forwards = {place: mixture.locate(*place) for place in places}
    again = copy.deepcopy(Mixture([7, 2], [2, 1], 9))
    assert {place: again.locate(*place) for place in reversed(places)} == forwards
    other = Mixture([7, 2], [2, 1], 9, seed=1)
    assert {place: other.locate(*place) for place in places} != forwards


def test_every_pass_has_another_order() -> None:
    mixture = Mixture([20])
    orders = [tuple(mixture.locate(epoch, index)[1] for index in range(20)) for epoch in range(5)]
    assert len(set(orders)) == 5


def test_workers_that_are_spawned_get_a_mixture() -> None:
    assert ForkingPickler.dumps(Mixture([3, 4]))


def test_sources_lie_spread_over_the_epoch() -> None:
    mixture = Mixture([100, 100, 100], [6, 3, 1], 100)
    for start in range(0, 100, 10):
        counts = Counter(mixture.locate(0, index)[0] for index in range(start, start + 10))
        assert [counts[source] for source in range(3)] == [6, 3, 1]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"\[3, 0\] rows"):
        Mixture([3, 0])
    with pytest.raises(ValueError, match="at least one source"):
        Mixture([])
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="above 0 for each"):
            Mixture([3, 3], weights)
    with pytest.raises(ValueError, match=r"An epoch of 3 rows has \[3, 0\].*epoch_rows"):
        Mixture([3, 3], [100, 1], 3)
