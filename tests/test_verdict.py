"""What a mean must be to count: more than chance, and not little beside how samples differ."""

from lightning_mimic import Diagnosis
from lightning_mimic.reference.diagnosis import Estimate
from support.cases import for_each


@for_each(("mean", "verdict"), [(0.15, "unrelated"), (0.2, "unrelated"), (0.25, "compatible")])
def test_a_rise_that_is_sure_but_little_is_no_knowledge(mean, verdict):
    rise = Estimate(mean, error=0.01, count=10_000)  # of samples that differ by 1
    assert not rise.missing
    found = Diagnosis(512, label_gap=rise)
    assert found.verdict == verdict
    assert found.alignable == (verdict == "compatible")


def test_a_small_score_counts_if_it_is_sure():
    assert Diagnosis(512, score=Estimate(0.15, error=0.01, count=10_000)).verdict == "compatible"


def test_few_samples_say_nothing_of_the_size_either():
    assert Diagnosis(512, label_gap=Estimate(0.1, error=0.01, count=99)).verdict == "compatible"
