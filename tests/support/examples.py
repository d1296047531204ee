"""How many examples Hypothesis tries of a test."""

from hypothesis import settings


def examples(count: int) -> settings:
    """So many in every run, and as many times more as the profile asks for more than Hypothesis's own 100."""
    return settings(max_examples=count * settings.default.max_examples // 100)
