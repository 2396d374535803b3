"""The documents: their code runs, what they show is what comes out, what they point to exists."""

from __future__ import annotations

import importlib.util
import inspect
import re
import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest

import lightning_wgsef
from lightning_wgsef.cli.commands import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_wgsef"
GUIDES = ROOT / "examples" / "guides"
RUN = [ROOT / "README.md", *sorted(GUIDES.glob("*.md"))]
READ = [
    *RUN,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    PACKAGE / "README.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "examples" / "results").rglob("*.md")),
]
KINDS = {"python", "bash", "text", "bibtex"}


def title(document: Path) -> str:
    return str(document.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    document: Path
    number: int
    kind: str
    code: str
    output: str | None

    def __str__(self) -> str:
        return f"{title(self.document)}-{self.number}"


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document; a text block behind one of Python is what it prints."""
    found = re.findall(
        r"^```(\w*)\n(.*?)^```(?=(?:\s*^```text\n(.*?)^```)?)",
        document.read_text("utf-8"),
        flags=re.DOTALL | re.MULTILINE,
    )
    return [
        Block(document, number, kind, code, shown if kind == "python" and shown else None)
        for number, (kind, code, shown) in enumerate(found)
    ]


BLOCKS = [block for document in READ if document.exists() for block in blocks(document)]
PYTHON = [block for block in BLOCKS if block.kind == "python"]


def headings(document: Path) -> set[str]:
    """The anchors that a document has."""
    text = re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in titles}


def broken_links(document: Path) -> list[str]:
    """Links and pictures that point to no file of the project, or to no heading of it."""
    text = re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", RUN, ids=title)
def test_blocks_are_of_known_kinds(document: Path) -> None:
    assert {block.kind for block in blocks(document)} <= KINDS


def test_there_is_code_to_run() -> None:
    documents = {block.document for block in PYTHON}
    assert ROOT / "README.md" in documents
    assert {path.stem for path in documents} >= {"choosing", "smaller", "loops", "method"}
    assert sum(block.output is not None for block in PYTHON) >= 4


@pytest.mark.filterwarnings("ignore:.*litlogger")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # torch's own, of int8
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs_and_prints_what_is_shown(
    block: Block,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "torchao" in block.code:  # of the extra "dev"
        pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(block.code, str(block), "exec"), names)
    if block.output is not None:
        assert capsys.readouterr().out.strip() == block.output.strip()


def test_a_wrong_output_would_be_noticed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "wrong.md"
    document.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n", encoding="utf-8")
    (wrong, _) = blocks(document)
    assert wrong.output == "2\n"
    monkeypatch.setattr("tests.test_docs.ROOT", tmp_path)
    with pytest.raises(AssertionError):
        test_python_runs_and_prints_what_is_shown(wrong, capsys, tmp_path, monkeypatch)


def missing_commands(text: str) -> list[str]:
    """Lines of a bash block that name no target, module or command of the project."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    missing = []
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        program, *arguments = line.split()
        if program == "make":
            known = re.search(rf"^{re.escape(arguments[0])}:", makefile, flags=re.MULTILINE)
        elif arguments[:1] == ["-m"]:
            known = importlib.util.find_spec(arguments[1])
        elif program == "lightning-wgsef":
            with pytest.raises(SystemExit) as ended:
                main([arguments[0], "--help"])
            known = ended.value.code == 0
        else:
            known = program in {"pip", "tensorboard"} or None
        if not known:
            missing.append(line)
    return missing


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "bash"], ids=str)
def test_commands_exist(block: Block) -> None:
    assert missing_commands(block.code) == []


@pytest.mark.parametrize(
    "line", ["make tea", "python -m examples.nothing", "lightning-wgsef brew", "rm -rf /"]
)
def test_commands_that_do_not_exist_are_found(line: str) -> None:
    assert missing_commands(f"{line}  # a remark") == [line]


@pytest.mark.parametrize("document", READ, ids=title)
def test_commands_in_the_text_exist(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.DOTALL)
    spans = re.findall(r"`((?:make|python -m) [^`]+)`", text)
    assert missing_commands("\n".join(spans)) == []


@pytest.mark.parametrize("document", READ, ids=title)
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []


@pytest.mark.parametrize("document", [ROOT / "CONTRIBUTING.md", PACKAGE / "README.md"], ids=title)
def test_files_that_are_named_exist(document: Path) -> None:
    named = set(re.findall(r"`(\w+(?:/\w+)+)(?:\.py|/)?`", document.read_text("utf-8")))
    assert len(named) >= 2
    candidates = {
        name: [r / f"{name}{e}" for r in (PACKAGE, ROOT) for e in ("", ".py")] for name in named
    }
    assert [name for name, paths in candidates.items() if not any(p.exists() for p in paths)] == []


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("# One\n[x](b.md) [y](a.md#one) [z](#two) [w](https://a.b)", "utf-8")
    assert broken_links(document) == ["b.md", "#two"]


def test_the_readme_is_read_in_five_minutes() -> None:
    text = RUN[0].read_text("utf-8")
    assert len(text.splitlines()) <= 160
    assert len(text.split()) <= 1600
    assert text.index("make demo") < text.index("## Which grouping")


def test_every_public_name_is_in_the_reference() -> None:
    text = (GUIDES / "reference.md").read_text("utf-8")
    named = re.findall(r"^::: lightning_wgsef\.(\w+)$", text, flags=re.MULTILINE)
    assert sorted(named) == sorted(lightning_wgsef.__all__)


def docstrings() -> list[str]:
    """Of everything public, and of its methods."""
    public = [getattr(lightning_wgsef, name) for name in lightning_wgsef.__all__]
    methods = [inspect.getmembers(x, inspect.isfunction) for x in public if inspect.isclass(x)]
    functions = [function for found in methods for _, function in found]
    return [inspect.getdoc(x) or "" for x in [*public, *functions]]


def as_markdown(text: str) -> str:
    pytest.importorskip("griffe")  # of the extra "docs"
    return str(runpy.run_path(str(GUIDES / "site" / "docstrings.py"))["as_markdown"](text))


def test_docstrings_are_rewritten_for_the_site() -> None:
    written = """See `Homotopy`, `tau` and ``k``, :math:`u_j
    \\le 1`.

    .. math:: a +
              b

    >>> 1
    1
    """
    shown = """See [`Homotopy`][lightning_wgsef.Homotopy], `tau` and ``k``, $u_j \\le 1$.

    $$a + b$$

    ```pycon
    >>> 1
    1
    ```
    """
    assert as_markdown(inspect.cleandoc(written)) == inspect.cleandoc(shown)


def test_every_formula_can_be_drawn() -> None:
    converter = pytest.importorskip("math_core").LatexToMathML()
    texts = [(GUIDES / "method.md").read_text("utf-8"), *map(as_markdown, docstrings())]
    text = re.sub(r"```.*?```|``.*?``|`.*?`", "", "\n\n".join(texts), flags=re.DOTALL)
    assert "math:" not in text
    formulas = re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, flags=re.DOTALL)
    assert len(formulas) >= 80
    for displayed, inline in formulas:
        assert "<math" in converter.convert_with_local_state(
            displayed or inline, displaystyle=bool(displayed)
        )


def test_guides_are_in_the_menu_of_the_site() -> None:
    menu = (GUIDES / "mkdocs.yml").read_text("utf-8")
    missing = [guide.name for guide in GUIDES.glob("*.md") if f"guides/{guide.name}" not in menu]
    assert missing == []


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
