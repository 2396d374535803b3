"""Checkpoints that were damaged or made to do harm: a readable error, and nothing is executed."""

from __future__ import annotations

import ast
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_wgsef
from lightning_wgsef import WGSEF, Constant, Homotopy, WGSEFCallback, group_parameters
from lightning_wgsef.training import pruner
from lightning_wgsef.training.masks import masks_from_checkpoint
from tests.helpers.groups import PRUNED, batches, dense_network, lists, pruned, raises_naming
from tests.helpers.malicious_files import Malicious, at, changed, like_but_wrong, places, variants
from tests.helpers.plain_loops import Dense, K, alive, data, loss_of, sgd
from tests.helpers.trainers import make_trainer

EXECUTES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "runpy", "code"}
CALLS = {"eval", "exec", "compile", "__import__"}
RUNS: dict[str, dict[str, Any]] = {
    "homotopy": {"k": K, "lam": Homotopy(length=6)},
    "frozen": {"k": K, "lam": Homotopy(length=2)},
    "paper": {
        "lam": Constant(1.0),
        "freeze": None,
        "metric": "auto",
        "weights": "layer_norm",
        "costs": "params",
        "example_input": torch.zeros(1, 4, dtype=torch.float64),
    },
    "global": {"k": 0.5, "lam": Homotopy(length=6), "scope": "global"},
}
# What may be missing: it says no more than that nothing was noted yet, or that there is no end.
MAY_BE_NONE = ("total_steps", "masks", "start_norms", "alive", "remainder", "shares")


def unsafe_lines(source: str) -> Iterator[str]:
    """What a file does that could execute what it reads."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (x.name for x in names if x.name.split(".")[0] in EXECUTES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in EXECUTES:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield name
            case ast.Call(func=ast.Attribute(attr="load"), keywords=keywords):
                called, given = ast.unparse(node.func), {x.arg: x.value for x in keywords}
                safe = ast.unparse(given.get("weights_only", ast.Constant(None))) == "True"
                if called not in ("json.load",) and not safe:
                    yield ast.unparse(node)


def test_nothing_that_is_read_is_executed() -> None:
    package = Path(lightning_wgsef.__file__).parent
    files = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
    assert len(files) > 50
    unsafe = {name: found for name in files if (found := list(unsafe_lines(files[name])))}
    assert unsafe == {"export/runtimes.py": ["torch.export.load(file)"]}  # which it wrote itself
    assert [name for name in files if "torch.load(" in files[name]] == ["utils/files.py"]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from marshal import loads",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "eval(text)",
    ],
)
def test_planted_faults_are_seen(line: str) -> None:
    assert len(list(unsafe_lines(line))) == 1


def optimizer_of(model: Dense, run: str) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters()) if run == "paper" else sgd(model.net)


def trained_state(run: str) -> dict[str, Any]:
    """The state of three steps; the values are what a file gives back."""
    model = Dense()
    optimizer = optimizer_of(model, run)
    regularizer = WGSEF(model, total_steps=8, **RUNS[run]).attach(optimizer)
    steps(model, optimizer, 3)
    content = io.BytesIO()
    torch.save(regularizer.state_dict(), content)
    content.seek(0)
    return torch.load(content, weights_only=True)


def steps(model: Dense, optimizer: torch.optim.Optimizer, count: int) -> None:
    for batch in batches(count):
        optimizer.zero_grad()
        loss_of(model.net, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("run", RUNS)
def test_every_place_of_the_state_is_checked(run: str) -> None:
    """Every value is replaced by others in turn; what is accepted can be trained with."""
    state = trained_state(run)
    assert len(list(places(state))) >= 15
    messages, accepted = {}, []
    fresh: Any = None
    for what, crafted in variants(state):
        if fresh is None:  # what was refused left nothing behind
            model = Dense()
            optimizer = optimizer_of(model, run)
            fresh = regularizer = WGSEF(model, total_steps=8, **RUNS[run]).attach(optimizer)
            before = repr(regularizer.state_dict())
        try:
            regularizer.load_state_dict(crafted)
        except ValueError as error:
            messages[what] = str(error)
            assert repr(regularizer.state_dict()) == before, what
            continue
        fresh = None
        accepted.append(what)
        steps(model, optimizer, 5)
        regularizer.metrics()
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters()), what
        assert [len(columns) <= 6 for columns in alive(model.net)] == [True, True], what
    part = "('attachments', 0, '"
    harmless = {f"{part}{name}'): None" for name in MAY_BE_NONE}
    harmless |= {"('attachments',): empty list", f"{part}collapse_reported'): True"}
    given = at(state, ("attachments", 0))
    harmless |= {f"{part}{name}'): None" for name in ("weights", "costs") if given[name] is None}
    # Files of earlier versions say nothing of the grouping; what is None stays None.
    layers = [f"('grouping', 'layers', '{name}'" for name in ("net.2", "net.3")]
    harmless |= {"(): without grouping", "('grouping', 'grouping'): text"}
    members = [f"{x}, 'members', 0" for x in layers]
    harmless |= {f"{x}, '{name}'): None" for x in members for name in ("index", "shape")}
    assert set(accepted) == harmless
    assert len(messages) > 300
    # Of a global competition a part without some layers is refused where it is built.
    alone = "layers that compete for one budget (scope='global')"
    texts = ("the saved state is", "the arguments changed:", alone)
    assert [x for x in messages.items() if not x[1].startswith(texts) or len(x[1]) > 500] == []


def test_planted_fault_without_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then wrong values are found somewhere inside, or never."""
    monkeypatch.setattr(pruner, "check_state", lambda *_: None)
    state, model = trained_state("frozen"), Dense()
    regularizer = WGSEF(model, **RUNS["frozen"]).attach(sgd(model.net))
    regularizer.load_state_dict(changed(state, ("attachments", 0, "taken"), "many"))
    assert regularizer.pruners[0].taken == "many"
    regularizer.load_state_dict(changed(state, ("attachments", 0, "masks"), "many"))
    with pytest.raises(TypeError):
        regularizer.step(regularizer.pruners[0].optimizer)


def test_the_state_itself_is_accepted() -> None:
    for run in RUNS:
        model = Dense()
        regularizer = WGSEF(model, total_steps=8, **RUNS[run])
        regularizer.attach(optimizer_of(model, run)).load_state_dict(trained_state(run))
        assert regularizer.pruners[0].taken == (2 if run == "frozen" else 3)


def test_values_out_of_their_range() -> None:
    """The right shape and type, and no sense: what would make weights infinite or NaN."""
    state = trained_state("paper")
    part = ("attachments", 0)
    for name, value in (
        ("shares", 1e300),
        ("shares", -0.1),
        ("weights", 0.0),
        ("costs", float("inf")),
        ("budgets", -1.0),
        ("start_norms", float("nan")),
    ):
        found = at(state, (*part, name))
        crafted = changed(state, (*part, name), torch.full_like(found, value))
        model = Dense()
        regularizer = WGSEF(model, total_steps=8, **RUNS["paper"])
        regularizer.attach(optimizer_of(model, "paper"))
        with raises_naming("damaged", name, "must be finite"):
            regularizer.load_state_dict(crafted)
    crafted = changed(state, ("attachments",), state["attachments"] * 2)
    with raises_naming("layers", "others than those"):
        regularizer.load_state_dict(crafted)


def test_layers_of_several_optimizers_that_one_trained() -> None:
    state, model = trained_state("homotopy"), Dense()
    parts = [torch.optim.SGD(model.net[i].parameters(), lr=0.1) for i in (2, 3)]
    regularizer = WGSEF(model, total_steps=8, **RUNS["homotopy"]).attach(*parts)
    with raises_naming("other optimizers", "net.2", "net.3"):
        regularizer.load_state_dict(state)


@pytest.mark.parametrize("name", [*trained_state("homotopy")["attachments"][0], "more"])
def test_resume_under_a_trainer(name: str, tmp_path: Path) -> None:
    """The error comes before the first step, and names the entry."""
    trainer = make_trainer([WGSEFCallback(**RUNS["homotopy"])], max_epochs=1)
    with pytest.warns(UserWarning, match="before the mask was frozen"):
        trainer.fit(Dense(), data(3))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["callbacks"]["WGSEFCallback"]["attachments"][0][name] = "many"
    torch.save(content, tmp_path / "crafted.ckpt")
    model = Dense()
    callback = WGSEFCallback(**RUNS["homotopy"])
    trainer = make_trainer([callback], max_epochs=3)
    with raises_naming("the saved state is", name):
        trainer.fit(model, data(3), ckpt_path=tmp_path / "crafted.ckpt", weights_only=True)
    assert callback.regularizer.pruners[0].taken == 0
    saved = content["state_dict"]
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("state", [-1, "many", [1], {"attachments": 3}, {"other": []}])
def test_resume_with_another_state(state: Any) -> None:
    callback = WGSEFCallback(k=K)
    callback.load_state_dict(state)
    with raises_naming("the saved state is damaged"):
        make_trainer([callback], max_epochs=1).fit(Dense(), data(3))


def test_a_malicious_checkpoint_is_not_executed_on_resume(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    content = {"state_dict": {}, "callbacks": {"WGSEFCallback": Malicious(harm)}}
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        make_trainer([WGSEFCallback(k=K)]).fit(
            Dense(), data(2), ckpt_path=tmp_path / "bad.ckpt", weights_only=True
        )
    assert not harm.exists()
    torch.load(tmp_path / "bad.ckpt", weights_only=False)
    assert harm.exists()  # the file is as bad as it is said to be


def lying(path: Path) -> None:
    """A checkpoint whose storage is said to hold 2^40 numbers."""
    torch.save({"conv2.weight": torch.ones(77)}, path)
    with zipfile.ZipFile(path) as file:
        parts = {entry.filename: file.read(entry) for entry in file.infolist()}
    (name,) = (name for name in parts if name.endswith("data.pkl"))
    claimed = b"\x8a\x06" + (2**40).to_bytes(6, "little")
    assert parts[name].count(b"K\x4d") >= 2
    parts[name] = parts[name].replace(b"K\x4d", claimed)
    with zipfile.ZipFile(path, "w") as file:
        for key, content in parts.items():
            file.writestr(key, content)


def test_masks_from_a_damaged_file(tmp_path: Path) -> None:
    model = pruned()
    groups = group_parameters(model)
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": model.state_dict()}, path)
    whole = path.read_bytes()
    assert lists(masks_from_checkpoint(groups, path)) == PRUNED
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with raises_naming("masks:", "weights.ckpt", "cannot be read") as _:
            masks_from_checkpoint(groups, path)
    lying(path)
    with raises_naming("masks:", "weights.ckpt", "cannot be read"):
        masks_from_checkpoint(groups, path)
    for missing in (tmp_path, tmp_path / "none.ckpt"):
        with raises_naming("masks:", missing.name, "cannot be read"):
            masks_from_checkpoint(groups, missing)


def test_the_message_does_not_advise_to_execute_the_file(tmp_path: Path) -> None:
    torch.save(Malicious(tmp_path / "harm"), tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        WGSEF(pruned(), masks=tmp_path / "bad.ckpt")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_masks_from_weights_of_another_kind(tmp_path: Path) -> None:
    """Every weight that is looked at is replaced by others in turn."""
    path, model = tmp_path / "weights.pt", pruned()
    groups = group_parameters(model)
    expected = model.state_dict()
    for name in ("conv2.weight", "fc.weight"):
        for what, new in like_but_wrong(expected[name]).items():
            if what in ("of eight bits", "of NaN", "negative"):
                continue
            torch.save({**expected, name: new}, path)
            with raises_naming("the checkpoint's", name):
                masks_from_checkpoint(groups, path)
        torch.save({**expected, name: torch.ones(1).expand(10**12)}, path)
        with raises_naming("the checkpoint's", name, "1000000000000"):
            masks_from_checkpoint(groups, path)


def test_masks_under_a_trainer(tmp_path: Path) -> None:
    (tmp_path / "bad.ckpt").write_bytes(b"PK\x03\x04")
    before = dense_network()
    model = Dense()
    with raises_naming("masks:", "bad.ckpt"):
        make_trainer([WGSEFCallback(masks=tmp_path / "bad.ckpt")]).fit(model, data(2))
    assert isinstance(model.net, nn.Sequential)
    for ours, theirs in zip(model.net.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
