"""The tools that keep cases few leave out no pair and hide no failure."""

import inspect
from itertools import combinations, product

import pytest

from support.cases import case, for_each, pairwise


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 4, 2), (5, 2, 2, 2, 2), (3, 3), (4, 3, 3, 2)])
def test_every_pair_of_values_occurs_in_one_of_few_cases(sizes):
    names, cases = pairwise(**{f"of_{size}_{k}": range(size) for k, size in enumerate(sizes)})
    assert len(names) == len(sizes)
    for (a, many), (b, others) in combinations(enumerate(sizes), 2):
        assert {(c[a], c[b]) for c in cases} == set(product(range(many), range(others)))
    assert len(set(cases)) == len(cases) <= 1.4 * max(a * b for a, b in combinations(sizes, 2))
    assert cases == pairwise(**{name: range(size) for name, size in zip(names, sizes, strict=True)})[1]


def test_a_failure_within_a_loop_is_raised_with_the_name_of_its_case():
    def loop():
        for number in (1, 2, 3):
            with case("number", number):
                assert number != 2

    with pytest.raises(AssertionError) as caught:
        loop()
    assert caught.value.__notes__ == ["in the case number, 2"]


def test_a_looped_test_tries_every_value_and_reports_all_that_fail(tmp_path):
    seen = []

    @for_each(("number", "word"), [(1, "a"), (2, "b"), (3, "c"), (4, "d")])
    def inner(tmp_path, word, number):
        seen.append((number, word, tmp_path))
        if number == 2:
            pytest.fail("two")
        assert number != 4

    assert list(inspect.signature(inner).parameters) == ["tmp_path"]
    with pytest.raises(BaseExceptionGroup, match="2 of 4 cases failed") as caught:
        inner(tmp_path=tmp_path)
    assert seen == [(k, "abcd"[k - 1], tmp_path / str(k - 1)) for k in (1, 2, 3, 4)]
    assert all(folder.is_dir() for _, _, folder in seen)
    assert [error.__notes__ for error in caught.value.exceptions] == [["in the case 2, b"], ["in the case 4, d"]]


def test_one_failure_is_itself():
    @for_each("number", [1, 2, 3])
    def inner(number):
        assert number != 2

    with pytest.raises(AssertionError) as caught:
        inner()
    assert caught.value.__notes__ == ["in the case 2"]


@pytest.mark.parametrize("word", ["a", "b"])
@for_each("number", [1, 2, 3])
def test_a_looped_test_has_fixtures_and_parameters(number, word, tmp_path):
    assert (tmp_path.name, list(tmp_path.iterdir())) == (str(number - 1), [])
    assert word in "ab"
