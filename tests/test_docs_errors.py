"""Every message that docs/errors.md quotes is one of the package's."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)


def texts(node: ast.AST) -> Iterator[str]:
    """Text of a module's string literals; the values within an f-string are left out."""
    for each in ast.walk(node):
        if isinstance(each, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in each.values)
        elif isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value


@pytest.fixture(scope="module")
def messages() -> str:
    sources = sorted((ROOT / "lightning_mimic").rglob("*.py"))
    return "\n".join(text for path in sources for text in texts(ast.parse(path.read_text())))


def test_the_page_has_the_likely_messages():
    assert len(ROWS) == len(set(ROWS))
    assert len(ROWS) >= 30


@pytest.mark.parametrize("phrase", ROWS)
def test_a_quoted_message_is_in_the_source(phrase, messages):
    assert phrase in messages, "the message has changed: quote its new words in docs/errors.md"
