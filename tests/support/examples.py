"""Number of examples of a Hypothesis test."""

from hypothesis import settings


def examples(count: int) -> settings:
    """Return settings with so many examples, times what the profile has over Hypothesis's default of 100."""
    return settings(max_examples=count * settings.default.max_examples // 100)
