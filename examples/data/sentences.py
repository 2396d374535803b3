"""Sentences that lie on every machine with Python: documentation strings and licence texts."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

# Not documentation, or not of the library.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__"}
LICENCES = re.compile(r"(LICEN[CS]E|COPYING|NOTICE)[\w.-]*", re.IGNORECASE)


def read_sentences(most: int | None = None, held_out: int = 10) -> tuple[list[str], list[str]]:
    """Sentences of the standard library's documentation strings and of licence texts.

    Every text is in one of the two parts as a whole, and a sentence is in one of them, once. They
    are the same on machines with the same Python and packages.

    Args:
        most: how many to learn from, at most, evenly from all texts; None: all.
        held_out: one text of that many is held out.

    Returns:
        Sentences to learn from, and those held out.
    """
    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for number, text in enumerate((*_documentation(), *_licences())):
        new = [sentence for sentence in dict.fromkeys(sentences(text)) if sentence not in seen]
        seen.update(new)
        parts[number % held_out == held_out - 1].extend(new)
    train, test = parts
    return train[:: -(-len(train) // most) if most else 1], test


def sentences(text: str) -> Iterator[str]:
    r"""Yield the sentences of a text: five to forty words, nearly all of it letters.

    >>> list(sentences("Open a file and read\nits lines. Return them.\n\n>>> f(1) + 2"))
    ['Open a file and read its lines.']
    """
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            letters = sum(letter.isalpha() or letter == " " for letter in sentence)
            if 5 <= len(sentence.split()) <= 40 and letters > 0.85 * len(sentence):
                yield sentence


def _documentation() -> Iterator[str]:
    """Yield all documentation strings of a module of the standard library, as one text."""
    library = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(library).parts):
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
            nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
            yield "\n\n".join(ast.get_docstring(node) or "" for node in nodes)


def _licences() -> Iterator[str]:
    """Yield the licence texts of the packages that are installed."""
    files = {
        str(file): Path(str(file.locate()))
        for package in distributions()
        for file in package.files or ()
        if LICENCES.fullmatch(file.name)
    }
    for _, path in sorted(files.items()):
        if path.is_file():
            yield path.read_text(encoding="utf-8", errors="replace")
