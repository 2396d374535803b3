"""Arguments of another kind: every public function says which, and what it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_wgsef
from lightning_wgsef import (
    WGSEF,
    export_onnx,
    export_program,
    group_parameters,
    load_slim,
    load_sparse,
    masks_from_zeros,
    measure_latency,
    network_report,
    plot_report,
    plot_sparsity,
    prune,
    save_slim,
    sensitivity,
    slim,
    sparsity_report,
    to_sparse,
)

EXAMPLE = torch.ones(2, 4)


def network() -> nn.Sequential:
    """A dense layer, half of which is zero, and one that reads it."""
    made = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for parameter in made[0].parameters():
        parameter.data[4:] = 0
    return made


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error."""
    return (outputs - targets).pow(2).mean()


Calls = dict[Callable[..., Any], dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files are written, if any are."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def calls(folder: Path) -> Calls:
    """Every public function of networks, reports and files, with arguments that it takes."""
    model = network()
    groups = group_parameters(model, "filter")
    small = slim(model, EXAMPLE)
    save_slim(small, folder / "small.safetensors")
    batches = [(EXAMPLE, torch.zeros(2, 2))]
    given = {"model": model, "example_input": EXAMPLE}
    return {
        export_onnx: {**given, "path": folder / "a.onnx"},
        export_program: {**given, "path": folder / "a.pt2"},
        group_parameters: {"model": model, "grouping": "filter"},
        load_slim: {"path": folder / "small.safetensors", "make_model": network},
        load_sparse: {"model": model, "state": model.state_dict()},
        masks_from_zeros: {"groups": groups, "state_dict": model.state_dict()},
        measure_latency: {**given, "against": model, "batch_sizes": (1,), "repeats": 1},
        network_report: {"networks": {"a": model}, "example_input": EXAMPLE, "batch_sizes": [1]},
        plot_report: {"report": sparsity_report(model, groups)},
        plot_sparsity: {"source": {"wgsef/sparsity": [(0, 0.5)], "wgsef/gap": [(0, 1.0)]}},
        prune: {"model": model, "batches": batches, "loss": loss},
        save_slim: {"model": small, "path": folder / "again.safetensors"},
        sensitivity: {"model": model, "batches": batches, "loss": loss, "levels": (0.5,)},
        slim: {**given, "masks": {"0.weight": torch.ones(8, 4)}},
        sparsity_report: {"model": model, "groups": groups, "slim": small},
        to_sparse: {**given, "layout": "bsr", "blocksize": (2, 2)},
        WGSEF: {"model": model, "grouping": "filter", "half_space": 0.0},
    }


CHECKED = [
    *((f, name) for f in (export_onnx, export_program) for name in ("model", "path")),
    *((f, "model") for f in (load_sparse, prune, save_slim, sensitivity, WGSEF)),
    *((f, "model") for f in (group_parameters, measure_latency, slim, sparsity_report, to_sparse)),
    (group_parameters, "grouping"),
    (load_slim, "path"),
    (load_slim, "make_model"),
    (load_sparse, "state"),
    (masks_from_zeros, "groups"),
    (masks_from_zeros, "state_dict"),
    (measure_latency, "against"),
    (measure_latency, "batch_sizes"),
    (network_report, "networks"),
    (network_report, "batch_sizes"),
    (plot_report, "report"),
    (plot_sparsity, "source"),
    (save_slim, "path"),
    (slim, "masks"),
    (sparsity_report, "groups"),
    (sparsity_report, "slim"),
    (to_sparse, "blocksize"),
    (WGSEF, "half_space"),
]
OPTIONAL = {"against", "slim", "masks", "state_dict", "half_space"}
PAIRS = {"batch_sizes", "blocksize"}
WRONG = [None, 3, [1, 2], nn.Linear, torch.zeros(2)]


def is_taken(name: str, value: object) -> bool:
    """None may stand for nothing, and two numbers may be right."""
    return (value is None and name in OPTIONAL) or (isinstance(value, list) and name in PAIRS)


@pytest.mark.parametrize(
    ("function", "name", "wrong"),
    [
        pytest.param(function, name, wrong, id=f"{function.__name__}-{name}-{type(wrong).__name__}")
        for function, name in CHECKED
        for wrong in WRONG
        if not is_taken(name, wrong)
    ],
)
def test_an_argument_of_another_kind_is_named(
    function: Callable[..., Any], name: str, wrong: Any, calls: Calls, folder: Path
) -> None:
    """The message begins with the argument, and nothing was written."""
    arguments = calls[function] | {name: wrong}
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=rf"^{name}\b.* must "):
        function(**arguments)
    assert sorted(folder.iterdir()) == before


def test_what_they_are_given_otherwise_is_right(calls: Calls, folder: Path) -> None:
    """Each refusal above is about one argument: the others are taken."""
    given = {function.__name__: function(**arguments) for function, arguments in calls.items()}
    written = {"export_onnx", "export_program", "save_slim"}
    assert {name for name, result in given.items() if result is None} == written
    names = {path.name for path in folder.iterdir()}
    assert names == {"a.onnx", "a.pt2", "small.safetensors", "again.safetensors"}


def test_every_function_of_networks_is_called_here(calls: Calls) -> None:
    """A new public function that takes a network belongs into the table."""
    takes = {"model", "networks", "groups", "report", "path", "source"}
    public = [getattr(lightning_wgsef, name) for name in lightning_wgsef.__all__]
    functions = {f for f in public if callable(f) and takes & set(_names(f))}
    assert {f.__name__ for f in functions} - {f.__name__ for f in calls} == set()


def _names(function: Callable[..., Any]) -> list[str]:
    code = getattr(function, "__code__", None)
    return [] if code is None else list(code.co_varnames[: code.co_argcount])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (network(), "its class or lambda"),  # as load_state_dict is called
        (nn.Linear, "Linear: missing a required argument: 'in_features'"),
        (lambda width: nn.Linear(width, 2), "missing a required argument: 'width'"),
        ("my_package.MyNetwork", "got 'my_package.MyNetwork'"),
    ],
)
def test_load_slim_wants_a_function(wrong: Any, words: str, calls: Calls) -> None:
    """A network, or a class with arguments, is not called."""
    path = calls[load_slim]["path"]
    with pytest.raises(ValueError, match=r"^make_model must be a function without arg") as info:
        load_slim(path, wrong)
    assert words in str(info.value)


@pytest.mark.parametrize("made", [None, 3, nn.Linear])
def test_load_slim_wants_a_network_of_it(made: Any, calls: Calls) -> None:
    """What the function makes is looked at."""
    path = calls[load_slim]["path"]
    with pytest.raises(ValueError, match=r"^what make_model makes must be a torch\.nn\.Module"):
        load_slim(path, lambda: made)


def test_load_slim_takes_a_builtin_of_unknown_signature(calls: Calls) -> None:
    """What does not say what it takes is called, and then judged."""
    path = calls[load_slim]["path"]
    with pytest.raises(ValueError, match="what make_model makes"):
        load_slim(path, dict)


@pytest.mark.parametrize("wrong", [3, "a.ckpt", [[1.0]]])
def test_slim_names_a_mask_that_is_no_tensor(wrong: Any) -> None:
    """The name of the parameter stands in the message."""
    with pytest.raises(ValueError, match=r"^masks\['0.weight'\] must be a tensor"):
        slim(network(), EXAMPLE, {"0.weight": wrong})


def test_a_network_of_a_report_is_named() -> None:
    """So is one of several networks."""
    with pytest.raises(ValueError, match=r"^networks\['slim'\] must be a torch\.nn\.Module"):
        network_report({"dense": network(), "slim": "small.safetensors"}, EXAMPLE)  # type: ignore[dict-item]
