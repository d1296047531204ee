"""The tools that keep cases few leave out no pair and hide no failure."""

from itertools import combinations, product

import pytest
from support.cases import case, pairwise


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
