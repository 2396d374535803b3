"""The import floors: a file imports only from floors and rooms below its own.

The checkers take the folder of a package, so that the last test can give them a broken copy.
"""

import ast
import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_wgsef

PACKAGE = Path(lightning_wgsef.__file__).parent
NAME = PACKAGE.name
TOP = "__init__"

FLOORS = {
    "checks": (0, 0),
    "members": (0, 0),
    "preconditioners": (0, 0),
    "roots": (0, 0),
    "segments": (0, 0),
    "slim_modules": (0, 0),
    "sparse_linear": (0, 0),
    "tables": (0, 0),
    "whole_files": (0, 0),
    "sharding": (0, 1),
    "blocks": (0, 1),
    "budgets": (0, 1),
    "grouped_layer": (0, 1),
    "overlap": (0, 2),
    "owners": (0, 2),
    "groups": (0, 3),
    "schedules": (0, 1),
    "few": (0, 1),
    "millions": (0, 1),
    "prox_solver": (0, 2),
    "envelope": (0, 3),
    "group_metric": (0, 4),
    "half_space": (0, 4),
    "metric": (0, 2),
    "competitors": (0, 4),
    "penalties": (0, 4),
    "advice": (2, 0),
    "groupings.layers": (1, 0),
    "groupings.patterns": (1, 0),
    "groupings.whole_model": (1, 1),
    "groupings.channels": (1, 1),
    "groupings.costs": (1, 1),
    "groupings.elements": (1, 1),
    "groupings.filters": (1, 1),
    "groupings.layer_budgets": (1, 2),
    "groupings.example_runs": (1, 0),
    "groupings.branches": (1, 2),
    "groupings.filter_shapes": (1, 1),
    "groupings.n_of_m": (1, 1),
    "groupings.tiles": (1, 1),
    "groupings.layer_weights": (1, 1),
    "groupings.attention": (1, 1),
    "groupings.heads": (1, 2),
    "groupings.hidden": (1, 2),
    "groupings.operations": (1, 0),
    "groupings.graph": (1, 1),
    "groupings.channel_slices": (1, 2),
    "groupings.channel_sets": (1, 3),
    "groupings.structure": (1, 4),
    "groupings.constants": (1, 1),
    "groupings.dead_channels": (1, 4),
    "groupings.removal_plan": (1, 1),
    "groupings.unit_removal": (1, 3),
    "groupings.comparison": (1, 2),
    "groupings.same_outputs": (1, 3),
    "groupings.removal": (1, 3),
    "groupings.leaks": (1, 3),
    "groupings.zero_invariance": (1, 4),
    "groupings.registry": (1, 5),
    "groupings.parameters": (1, 6),
    "groupings.__init__": (1, 7),
    "curves": (1, 4),
    "group_life": (1, 0),
    "masks": (1, 4),
    "report": (1, 4),
    "latency": (1, 7),
    "plots": (1, 10),
    "export": (1, 8),
    "network_comparison": (1, 9),
    "sparse_storage": (1, 10),
    "proximal_step": (2, 0),
    "saved_state": (2, 0),
    "step_hooks": (2, 0),
    "attachment": (2, 1),
    "regularizer": (2, 2),
    "slimming": (2, 0),
    "slim_files": (2, 1),
    "arguments": (2, 7),
    "dashboard": (1, 4),
    "callback_base": (3, 0),
    "presentation": (3, 1),
    "strategies": (3, 0),
    "hparams": (3, 0),
    "callback": (3, 2),
    "cli_checkpoints": (3, 1),
    "cli": (3, 2),
    TOP: (4, 0),
}
MAY_IMPORT_LIGHTNING = {"callback", "callback_base", "hparams", "presentation", "strategies"}
LIGHTNING = ("pytorch_lightning", "lightning", "lightning_fabric")
NEIGHBOURS = ("examples", "tests")


def files(package: Path) -> dict[str, Path]:
    """Every file of the package by the name it has in the table."""
    paths = sorted(package.rglob("*.py"))
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in paths}


@functools.cache
def nodes(source: str) -> list[ast.AST]:
    """The syntax tree, flat: the last tests read the same files many times."""
    return list(ast.walk(ast.parse(source)))


def imported(name: str, path: Path) -> Iterator[str]:
    """Absolute dotted names of everything that a file imports, wherever in the file it does.

    ``from a import b`` gives "a.b". A full name in a string counts as an import, too: it may reach
    `import_module` by way of a table.
    """
    folder = [NAME, *name.split(".")[:-1]]
    lightning, others = "|".join(LIGHTNING), "|".join((NAME, *NEIGHBOURS))
    full_name = rf"({lightning})(\.\w+)*|({others})(\.\w+)+"

    def above(level: int) -> list[str]:
        return folder[: len(folder) - level + 1]

    for node in nodes(path.read_text()):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                base = [*(above(node.level) if node.level else []), node.module]
                yield from (".".join(filter(None, [*base, alias.name])) for alias in node.names)
            case ast.Constant(value=str(text)) if re.fullmatch(full_name, text):
                yield text
            case ast.Call(func=function, args=[ast.Constant(value=str(text)), *_]):
                if ast.unparse(function).split(".")[-1] not in ("import_module", "__import__"):
                    continue
                module = text.lstrip(".")
                if module != text:
                    yield ".".join([*above(len(text) - len(module)), module])
                elif text in (NAME, *NEIGHBOURS):
                    yield text


def as_file(dotted: str, known: set[str]) -> str | None:
    """The file of the package that an import runs, by its name in the table; None for others."""
    if dotted.split(".")[0] != NAME:
        return None
    parts = dotted.split(".")[1:]
    for length in range(len(parts), 0, -1):
        for candidate in (".".join(parts[:length]), ".".join([*parts[:length], TOP])):
            if candidate in known:
                return candidate
    return TOP


def floor_complaints(package: Path) -> list[str]:
    """Imports that do not go strictly downward."""
    found = files(package)
    listed = {name: path for name, path in found.items() if name in FLOORS}
    return [
        f"{name} {FLOORS[name]} imports {target} {FLOORS[target]} ({dotted})"
        for name, path in listed.items()
        for dotted in imported(name, path)
        if (target := as_file(dotted, set(listed))) is not None and FLOORS[target] >= FLOORS[name]
    ]


def table_complaints(package: Path) -> list[str]:
    """Files without a row, rows without a file."""
    found = set(files(package))
    unlisted = [f"{name} has no row in the table" for name in sorted(found - set(FLOORS))]
    return unlisted + [f"the row {name} has no file" for name in sorted(set(FLOORS) - found)]


def outside_complaints(package: Path) -> list[str]:
    """Lightning below the top floor, and folders beside the package anywhere."""
    complaints = []
    for name, path in files(package).items():
        for dotted in imported(name, path):
            root = dotted.split(".")[0]
            if root in NEIGHBOURS or (root in LIGHTNING and name not in MAY_IMPORT_LIGHTNING):
                complaints.append(f"{name} imports {dotted}")
    return complaints


def export_complaints(package: Path) -> list[str]:
    """Names in ``__init__`` that are not re-exported as ``X as X``."""
    complaints = []
    for node in nodes((package / "__init__.py").read_text()):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                if isinstance(node, ast.Import) or alias.asname != alias.name:
                    complaints.append(f"line {node.lineno}: {ast.unparse(node)}")
    return complaints


CHECKERS = (floor_complaints, table_complaints, outside_complaints, export_complaints)


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_package_keeps_the_rules(checker):
    assert checker(PACKAGE) == []


def test_every_file_is_read():
    found = files(PACKAGE)
    assert len(found) == len(FLOORS) >= 18
    internal = [x for n, p in found.items() for x in imported(n, p) if as_file(x, set(found))]
    assert len(internal) > 50  # or the checks above have nothing to look at


def test_exported_names_are_there():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in nodes for alias in node.names]
    assert "WGSEFCallback" in names
    assert [name for name in names if not hasattr(lightning_wgsef, name)] == []


# What can be planted: the checker that must see it, the file, and the lines put at its end.
PLANTED = {
    "upward": (
        floor_complaints, "segments.py", "from lightning_wgsef.callback import WGSEFCallback"
    ),
    "upward by one room": (
        floor_complaints, "budgets.py", "from lightning_wgsef.envelope import envelope_value"
    ),
    "sideways": (floor_complaints, "budgets.py", "from lightning_wgsef.groups import Groups"),
    "sideways in a folder": (
        floor_complaints,
        "groupings/filters.py",
        "from lightning_wgsef.groupings.channels import channel_groups",
    ),
    "of a module": (floor_complaints, "masks.py", "import lightning_wgsef.callback"),
    "of a module from the package": (
        floor_complaints, "masks.py", "from lightning_wgsef import callback"
    ),
    "of a name from the package": (
        floor_complaints, "regularizer.py", "from lightning_wgsef import Constant"
    ),
    "of a folder": (floor_complaints, "groups.py", "import lightning_wgsef.groupings"),
    "of everything": (floor_complaints, "groups.py", "from lightning_wgsef.masks import *"),
    "relative": (floor_complaints, "masks.py", "from .callback import WGSEFCallback"),
    "relative module": (floor_complaints, "masks.py", "from . import callback"),
    "relative to the parent": (
        floor_complaints, "groupings/layers.py", "from ..masks import Masks"
    ),
    "in a function": (
        floor_complaints, "groups.py", "def late():\n    from lightning_wgsef.masks import Masks"
    ),
    "in TYPE_CHECKING": (
        floor_complaints,
        "groups.py",
        "if TYPE_CHECKING:\n    from lightning_wgsef.masks import Masks",
    ),
    "by import_module": (
        floor_complaints, "report.py", "module = import_module('lightning_wgsef.regularizer')"
    ),
    "by relative import_module": (
        floor_complaints, "report.py", "module = import_module('.regularizer', 'lightning_wgsef')"
    ),
    "lightning": (outside_complaints, "regularizer.py", "import pytorch_lightning as pl"),
    "lightning in a function": (
        outside_complaints, "masks.py", "def late():\n    from lightning.pytorch import Trainer"
    ),
    "lightning in TYPE_CHECKING": (
        outside_complaints,
        "attachment.py",
        "if TYPE_CHECKING:\n    from pytorch_lightning import Trainer",
    ),
    "lightning by import_module": (
        outside_complaints, "report.py", "trainer = import_module('lightning.pytorch').Trainer"
    ),
    "lightning by a table": (
        outside_complaints, "report.py", "modules = {'old': 'pytorch_lightning'}"
    ),
    "lightning in the package's own file": (
        outside_complaints, "__init__.py", "from lightning import Trainer as Trainer"
    ),
    "examples": (outside_complaints, "callback.py", "from examples.data import digits"),
    "examples by import_module": (
        outside_complaints, "callback.py", "data = import_module('examples.data')"
    ),
    "the folder of examples by import_module": (
        outside_complaints,
        "callback.py",
        "data = importlib.import_module('examples')",
    ),
    "a file without a row": (table_complaints, "extra.py", ""),
    "a file without a row in a folder": (table_complaints, "groupings/extra.py", ""),
    "a name without as": (
        export_complaints, "__init__.py", "from lightning_wgsef.groups import Groups"
    ),
    "a name as another": (
        export_complaints, "__init__.py", "from lightning_wgsef.groups import Groups as Group"
    ),
    "everything": (export_complaints, "__init__.py", "from lightning_wgsef.groups import *"),
    "a module": (export_complaints, "__init__.py", "import lightning_wgsef.groups"),
}  # fmt: skip


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(PACKAGE, tmp_path / NAME, ignore=shutil.ignore_patterns("__py*")))


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_reported(fault, copy):
    checker, file, lines = PLANTED[fault]
    assert checker(copy) == []
    with (copy / file).open("a") as stream:
        stream.write(f"\n\n{lines}\n")
    complaints = checker(copy)
    assert len(complaints) == 1
    assert file.removesuffix(".py").replace("/", ".") in complaints[0] or file == "__init__.py"


def test_a_row_without_a_file_is_reported(copy):
    (copy / "tables.py").unlink()
    assert table_complaints(copy) == ["the row tables has no file"]


def test_only_imports_are_reported(copy):
    """Names in docstrings and comments are not imports."""
    with (copy / "groups.py").open("a") as stream:
        stream.write('\n\n"""Made for pytorch_lightning, see lightning_wgsef.callback."""\n')
        stream.write("# import lightning\nlogger = getLogger('lightning_wgsef')\n")
    assert [checker(copy) for checker in CHECKERS] == [[], [], [], []]
