"""Networks next to each other: what is counted, what is written, and that files are whole."""

import copy
import json

import pytest
import torch
from torch import nn

from lightning_wgsef.export import sparse_storage as sparse_storage
from lightning_wgsef.export.sparse_storage import LayerStorage, to_sparse
from lightning_wgsef.network import latency as latency
from lightning_wgsef.reports import networks as network_comparison
from lightning_wgsef.reports.networks import network_report as report_of
from tests.helpers.groups import raises_naming


@pytest.fixture
def networks(monkeypatch):
    """A dense network with 16 of 32 hidden units at zero, its sparse copy, and a smaller one."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(latency, "perf_counter", lambda: float(next(ticks)))  # every run takes 1
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        dense[0].weight[16:] = 0
        dense[0].bias[16:] = 0
    slim = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    return {"dense": dense, "sparse": to_sparse(dense, "bsr", EXAMPLE), "slim": slim}


EXAMPLE = torch.ones(2, 64)


def rows(report):
    return {row.name: row for row in report.networks}


def test_counts(networks):
    found = rows(report_of(networks, EXAMPLE))
    assert list(found) == ["dense", "sparse", "slim"]
    counts = {name: (row.parameters, row.nonzero_parameters) for name, row in found.items()}
    assert counts == {
        "dense": (2048 + 32 + 132, 1024 + 16 + 132),
        "sparse": (1024 + 32 + 132, 1024 + 16 + 132),
        "slim": (1024 + 16 + 68, 1024 + 16 + 68),
    }


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("layout", ["bsr", "csr"])
def test_operations_of_one_sample(networks, samples, layout):
    example = torch.ones(samples, 64)
    networks["sparse"] = to_sparse(networks["dense"], layout, example)
    flops = {name: row.flops for name, row in rows(report_of(networks, example)).items()}
    dense = 2 * (2048 + 128)
    assert flops == {"dense": dense, "sparse": dense, "slim": 2 * (1024 + 64)}


def test_bytes_are_those_of_the_saved_file(networks, tmp_path):
    for name, row in rows(report_of(networks, EXAMPLE)).items():
        file = tmp_path / name / "archive"  # the name of a file in memory, which is stored, too
        file.parent.mkdir()
        torch.save(networks[name].state_dict(), file)
        assert row.state_bytes == file.stat().st_size


def test_tied_weights_count_once():
    square = nn.Linear(8, 8)
    twice = nn.Sequential(square, square)
    tied = nn.Sequential(square, nn.Linear(8, 8, bias=False))
    tied[1].weight = square.weight
    report = rows(report_of({"twice": twice, "tied": tied}, torch.ones(1, 8)))
    assert [row.parameters for row in report.values()] == [72, 72]
    assert [row.flops for row in report.values()] == [256, 256]


def test_others_are_timed_against_the_first(networks, monkeypatch):
    calls = []
    right = network_comparison.measure_latency

    def noted(network, example, *, against, batch_sizes):
        calls.append((network, against, batch_sizes))
        return right(network, example, against=against, batch_sizes=batch_sizes)

    monkeypatch.setattr(network_comparison, "measure_latency", noted)
    report = report_of(networks, EXAMPLE, batch_sizes=(1, 3))
    dense, sparse, slim = networks.values()
    assert calls == [(dense, None, (1, 3)), (sparse, dense, (1, 3)), (slim, dense, (1, 3))]
    for row in report.networks:
        assert [batch.batch_size for batch in row.latency.batches] == [1, 3]
        ratios = [batch.ratio and batch.ratio.median for batch in row.latency.batches]
        assert ratios == ([None, None] if row.name == "dense" else [1.0, 1.0])


def test_networks_are_left_as_they_were(networks):
    networks["dense"].train()
    networks["slim"].eval()
    before = copy.deepcopy(networks["dense"].state_dict())
    report_of(networks, EXAMPLE)
    assert networks["dense"].training
    assert not networks["slim"].training
    state = networks["dense"].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_table(networks):
    header, dense, sparse, slim, *notes = str(report_of(networks, EXAMPLE)).splitlines()
    assert header.split()[:4] == ["network", "parameters", "not", "zero"]
    assert dense.split()[:4] == ["dense", "2,212", "1,172", "4,352"]
    assert dense.split()[5:7] == ["1e+03", "-"]
    assert sparse.split()[6:8] == ["1.00", "(1.00-1.00)"]
    assert slim.split()[:2] == ["slim", "1,108"]
    assert any("ratio to 'dense'" in note for note in notes)
    assert any("torch.save" in note for note in notes)


def test_file(networks, tmp_path):
    report, path = report_of(networks, EXAMPLE), tmp_path / "report.json"
    report.save_json(path)
    data = json.loads(path.read_text())
    assert data == json.loads(json.dumps(report.as_dict()))
    assert [row["name"] for row in data["networks"]] == ["dense", "sparse", "slim"]
    assert data["networks"][1]["latency"]["batches"][0]["ratio"]["median"] == 1.0
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_half_a_file_is_not_left(networks, tmp_path, monkeypatch):
    report, path = report_of(networks, EXAMPLE), tmp_path / "report.json"
    path.write_text("before")

    def fails(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dumps", fails)
    with pytest.raises(OSError, match="no space"):
        report.save_json(path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    with raises_naming("path", "missing"):
        report.save_json(tmp_path / "missing" / "report.json")


def test_what_is_refused(networks):
    with raises_naming("networks"):
        report_of({}, EXAMPLE)
    with raises_naming("example_input", "(2, 63)"):
        report_of(networks, EXAMPLE[:, 1:])


# --- how layers are stored -----------------------------------------------------------------------


@pytest.mark.parametrize(
    # Values of 4 bytes; a column for each, or each block; starts of rows, or of rows of blocks.
    ("layout", "stored"),
    [("csr", 512 * 8 + 33 * 4), ("bsr", 512 * 4 + 2 * 4 + 3 * 4)],
)
def test_the_record_of_a_sparse_network(networks, layout, stored):
    dense = networks["dense"]
    dense[0].weight.data[:, 32:] = 0
    storage = to_sparse(dense, layout, EXAMPLE).storage
    first, last = storage.layers
    assert first == LayerStorage("0", layout, 0.25, 8192, stored, 1.0, "")
    assert last == LayerStorage("2", "dense", 1.0, 512, 512, None, "no weight is zero")
    assert json.loads(json.dumps(storage.as_dict()))["layers"][0]["stored_bytes"] == stored
    header, *lines = str(storage).splitlines()
    assert header.split()[:3] == ["layer", "layout", "density"]
    assert lines[0].split() == ["0", layout, "0.250", "8,192", f"{stored:,}", "1.00"]
    assert lines[1:] == [lines[1], "2: no weight is zero"]


@pytest.mark.parametrize(("seconds", "slower"), [((2.0, 1.0), True), ((1.0, 2.0), False)])
def test_slower_is_said_plainly(networks, monkeypatch, seconds, slower):
    def times(calls, repeats, *_):
        return [[second] * repeats for second in seconds]

    monkeypatch.setattr(sparse_storage, "alternating_times", times)
    storage = to_sparse(networks["dense"], "bsr", EXAMPLE).storage
    assert storage.layers[0].time_ratio == seconds[0] / seconds[1]
    assert ("0: slower than dense on this machine" in str(storage)) == slower
