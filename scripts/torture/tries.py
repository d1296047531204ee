"""What came of a number of tries."""

from dataclasses import dataclass, field


@dataclass
class Tries:
    """Counts of one attack on one thing.

    Attributes:
        attack: Its kind.
        name: Of the thing.
        count: Of tries.
        refused: Tries that ended in an error of the package.
        held: Tries that ended as without the attack.
        undetected: Tries with other values, from a format without a checksum for them.
        failures: Descriptions of the others, with their numbers.
    """

    attack: str
    name: str
    count: int = 0
    refused: int = 0
    held: int = 0
    undetected: int = 0
    failures: list[str] = field(default_factory=list)

    def fail(self, number: int, text: str) -> None:
        """Count a failure."""
        self.failures.append(f"{number}: {' '.join(text.split())[:300]}")
