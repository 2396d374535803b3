"""Pages of the site: files of the whole project, and formulas as MathML.

A hook of MkDocs, which wants all pages in one folder; here they stay where readers of the project
find them, under the same relative links. MathML is drawn by every current browser itself: no
script, no network.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from math_core import LatexToMathML
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[3]
PAGES = (
    "*.md",
    "LICENSE",
    "lightning_wgsef/README.md",
    "examples/*.md",
    "examples/**/*.py",
    "examples/guides/*.md",
    "examples/results/**/*.md",
    "examples/results/**/*.png",
    "examples/results/**/*.svg",
    "tests/benchmarks/results/*.md",
)
FORMULA = r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>'


CONVERTER = LatexToMathML()


def on_files(files: Files, config: Any) -> Files:
    """Put the project's files in the place of those of the folder, but for its style sheet."""
    kept = [file for file in files if not file.src_uri.endswith(".py")]
    names = sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
    pages = [
        File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        for path in names
    ]
    return Files([*kept, *pages])


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links to folders lead to their README, or nowhere: a site has no folders."""

    def led(found: re.Match[str]) -> str:
        folder = (ROOT / page.file.src_uri).parent / found[2]
        if not found[2] or not folder.is_dir():
            return found[0]
        return (
            f"[{found[1]}]({found[2]}/README.md)" if (folder / "README.md").exists() else found[1]
        )

    return re.sub(r"\[([^]]+)\]\(([\w./]*)\)", led, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Draw the formulas that Arithmatex found.

    Raises:
        math_core.LatexError: a command that is not known.
    """
    return re.sub(FORMULA, _drawn, content, flags=re.DOTALL)


def _drawn(found: re.Match[str]) -> str:
    tag, kind, latex = found.groups()
    latex = html.unescape(latex.strip())
    drawn = CONVERTER.convert_with_local_state(latex, displaystyle=kind == "[")
    return f'<{tag} class="formula">{drawn}</{tag}>'
