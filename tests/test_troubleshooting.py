"""docs/troubleshooting.md quotes what the program says: every message there must still stand in the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
# what other programs say
STRANGERS = {"OutOfMemoryError: …"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def told(text):
    """A message with one … for each variable part, and one space between words."""
    return re.sub(r"\s+", " ", re.sub(r"…(\s*…)+", "…", text)).strip()


def pattern(node):
    """What an expression of strings says, … for what is not written in it; None for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = pattern(node.left), pattern(node.right)
        return None if left is None and right is None else f"{left or '…'}{right or '…'}"
    return None


def said(source):
    """Every string of a source file but its docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, DOCUMENTED) and node.body and isinstance(node.body[0], ast.Expr)
    }
    found = {pattern(node) for node in ast.walk(tree) if id(node) not in docstrings}
    return {told(text) for text in found if text}


def quoted(page):
    """The messages: what stands in code at the beginning of a table's row."""
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def stands(message, strings):
    """Whether a string begins so, or, behind a variable part or another sentence, goes on so."""
    wanted = re.escape(told(message).removesuffix("…").rstrip())
    begins = re.compile(rf"(^|^…: ?|[.!?;] ){wanted}")
    return any(begins.search(text) for text in strings)


MESSAGES = quoted(PAGE.read_text(encoding="utf-8"))
SOURCES = [*sorted((ROOT / "ziplora_lib").rglob("*.py")), ROOT / "install.py"]
STRINGS = set().union(*(said(path.read_text(encoding="utf-8")) for path in SOURCES))


def test_the_page_quotes_messages():
    assert len(MESSAGES) > 150
    # a row whose message is not read would not be checked
    rows = [row for row in PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    assert len(rows) == len(MESSAGES) + sum(row == "| Message | Why | What to do |" for row in rows)


@pytest.mark.parametrize("message", sorted(set(MESSAGES) - STRANGERS))
def test_the_message_is_one_of_ours(message):
    assert len(re.sub(r"[^a-zA-Z]", "", message)) >= 8, "too short to tell one message from another"
    assert stands(message, STRINGS), f"no string of the source begins with: {message}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise BadInput(f"the layer {key!r} has {len(x)}{many} ranks")', True),
        ('raise BadInput(f"the layer {key!r} " + f"has {len(x)} ranks")', True),
        ('raise BadInput(f"the layer {key!r} holds {len(x)} ranks")', False),
        ('"""the layer … has … ranks"""', False),
    ],
)
def test_a_changed_message_is_noticed(source, found):
    assert stands("the layer … has … ranks", said(source)) is found
