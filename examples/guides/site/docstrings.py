"""Docstrings as Markdown: formulas, doctests and names of the package.

An extension of Griffe, which reads the docstrings for the reference. Docstrings are written to be
read by `help`; what Markdown reads otherwise is rewritten here.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

import lightning_wgsef

# Where the reference has what a docstring names.
PLACES = {name: f"lightning_wgsef.{name}" for name in lightning_wgsef.__all__}
PLACES["PruningOptions"] = "lightning_wgsef.training.options.PruningOptions"


def as_markdown(text: str) -> str:
    """Rewrite a docstring."""
    text = re.sub(r":math:`([^`]+)`", lambda x: f"${' '.join(x[1].split())}$", text)
    text = re.sub(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", _displayed, text, flags=re.MULTILINE)
    text = re.sub(r"(?<![`\[])`(\w+)`(?!`)", _linked, text)
    return re.sub(r"^>>> (?:.+\n?)+", _session, text, flags=re.MULTILINE)


def _linked(found: re.Match[str]) -> str:
    return f"[{found[0]}][{PLACES[found[1]]}]" if found[1] in PLACES else found[0]


def _displayed(found: re.Match[str]) -> str:
    return f"{found[1]}$${' '.join(found[2].split())}$$"


def _session(found: re.Match[str]) -> str:
    return f"```pycon\n{found[0].rstrip()}\n```" + "\n" * found[0].endswith("\n")


class Docstrings(griffe.Extension):
    """Rewrite every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See `as_markdown`."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
