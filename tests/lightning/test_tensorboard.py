"""What TensorBoard gets on request, read back from the event files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_wgsef import Constant, WGSEFCallback
from lightning_wgsef.lightning.tensorboard import COLUMNS, ROWS, GroupHistory
from tests.helpers.trainers import loader, make_module, make_trainer


def run(folder: Path, *, dashboard: bool = True, **arguments: Any) -> EventAccumulator:
    logger = TensorBoardLogger(folder, name="", version="run")
    callback = WGSEFCallback(k=0.25, dashboard=dashboard, **arguments)
    loggers = [logger, CSVLogger(folder, name="", version="csv")]
    trainer = make_trainer([callback], max_epochs=4, logger=loggers, log_every_n_steps=5)
    trainer.fit(make_module(), loader())
    return events(folder / "run")


def events(folder: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    accumulator = EventAccumulator(str(folder), size_guidance=everything)
    accumulator.Reload()
    return accumulator


def charts_of(found: EventAccumulator) -> dict[str, dict[str, list[str]]]:
    """The patterns of every chart of every category."""
    (event,) = found.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


def test_without_it_there_are_scalars_alone(tmp_path: Path) -> None:
    tags = run(tmp_path, dashboard=False).Tags()
    assert not tags["images"]
    assert not tags["histograms"]
    assert not tags["tensors"]
    assert "wgsef/groups_alive" not in tags["scalars"]


def test_layout_histograms_pictures_report_and_hparams(tmp_path: Path) -> None:
    found = run(tmp_path)
    tags = found.Tags()
    assert charts_of(found)["wgsef"] == {
        "group sparsity of layers": [
            "wgsef/conv2/group_sparsity",
            "wgsef/fc/group_sparsity",
            "wgsef/frozen",
        ],
        "accuracy": ["(?!wgsef/).*[aA]cc.*", "wgsef/frozen"],
        "gap": ["wgsef/gap"],
        "budget and groups alive": ["wgsef/groups_alive", "wgsef/groups_budget"],
    }
    assert tags["histograms"] == ["wgsef/conv2/norms", "wgsef/fc/norms"]
    assert tags["images"] == ["wgsef/conv2/life_of_the_groups", "wgsef/fc/life_of_the_groups"]
    pictures = found.Images("wgsef/conv2/life_of_the_groups")
    assert 2 <= len(pictures) <= 5
    assert all(len(picture.encoded_image_string) < 20_000 for picture in pictures)
    last = found.Histograms("wgsef/conv2/norms")[-1].histogram_value
    assert last.num == 8
    (report,) = found.Tensors("wgsef/report/text_summary")
    assert b"2 / 8" in report.tensor_proto.string_val[0]
    alive = [(event.step, event.value) for event in found.Scalars("wgsef/groups_alive")]
    assert 5 < alive[0][1] <= 20
    assert alive[-1][1] == 5
    assert {event.value for event in found.Scalars("wgsef/groups_budget")} == {5}
    # The x-axis is that of Lightning's own scalars.
    assert [step for step, _ in alive] == [x.step for x in found.Scalars("wgsef/sparsity")]
    (final,) = found.Scalars("wgsef/final_sparsity")
    assert final.value == pytest.approx(1 - (80 + 16 + 228 + 24 + 40) / 1126, abs=1e-3)


def test_without_tensorboard_it_says_so(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = WGSEFCallback(k=0.25, dashboard=True)
    trainer = make_trainer([callback], max_epochs=2, logger=logger, log_every_n_steps=5)
    with pytest.warns(UserWarning, match="dashboard=True shows nothing: no logger"):
        trainer.fit(make_module(), loader())


def hparams(found: EventAccumulator, tag: str) -> plugin_data_pb2.HParamsPluginData:
    content = found.summary_metadata[f"_hparams_/{tag}"].plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def with_settings() -> Any:
    module = make_module()
    module.save_hyperparameters({"width": 8})
    return module


def test_hparams_of_the_module_and_of_two_callbacks_stand_together(tmp_path: Path) -> None:
    """TensorBoard shows the first of a run alone, which was Lightning's, without any result."""
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    callbacks = [
        WGSEFCallback(k=0.25, include="conv2", dashboard=True),
        WGSEFCallback(k=0.5, grouping="filter", exclude="*conv2", dashboard=True, name="second"),
    ]
    trainer = make_trainer(callbacks, max_epochs=4, logger=logger, log_every_n_steps=5)
    trainer.fit(with_settings(), loader())
    assert logger._default_hp_metric
    found = events(tmp_path / "run")
    settings = hparams(found, "session_start_info").session_start_info.hparams
    assert settings["width"].number_value == 8
    assert settings["wgsef/k"].number_value == 0.25
    assert settings["wgsef/grouping"].string_value == "channel"
    assert settings["wgsef/lam"].string_value.startswith("Homotopy(")
    assert settings["wgsef/second/grouping"].string_value == "filter"
    infos = {x.name: x for x in hparams(found, "experiment").experiment.hparam_infos}
    for name in ("k", "lam", "grouping", "second/k", "second/lam", "second/grouping"):
        assert getattr(infos[f"wgsef/{name}"], "differs", True)  # TensorBoard shows these at first
    assert not getattr(infos["width"], "differs", False)
    shown = [f"wgsef/{name}" for name in ("grouping", "include", "k", "lam")]
    more = [f"wgsef/second/{name}" for name in ("exclude", "grouping", "k", "lam")]
    assert sorted(settings) == [*shown, *more, "width"]  # what is a default is no column
    charts = charts_of(found)
    assert {title: tags["group sparsity of layers"] for title, tags in charts.items()} == {
        "wgsef": ["wgsef/conv2/group_sparsity", "wgsef/frozen"],
        "wgsef/second": ["wgsef/second/conv1/group_sparsity", "wgsef/second/frozen"],
    }
    results = {metric.name.tag for metric in hparams(found, "experiment").experiment.metric_infos}
    assert {"wgsef/final_sparsity", "wgsef/second/final_sparsity"} <= results
    assert results <= set(found.Tags()["scalars"])
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == []


def test_without_a_dashboard_hparams_are_lightnings(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = make_trainer(
        [WGSEFCallback(k=0.25)], max_epochs=2, logger=logger, log_every_n_steps=5
    )
    trainer.fit(with_settings(), loader())
    found = events(tmp_path / "run")
    assert list(hparams(found, "session_start_info").session_start_info.hparams) == ["width"]


def test_the_event_file_stays_small(tmp_path: Path) -> None:
    sizes = {}
    for dashboard in (False, True):
        run(tmp_path / str(dashboard), dashboard=dashboard)
        files = (tmp_path / str(dashboard) / "run").glob("events*")
        sizes[dashboard] = sum(path.stat().st_size for path in files)
    assert sizes[True] - sizes[False] < 50_000


def test_life_is_ordered_by_death_and_thinned() -> None:
    deaths = torch.tensor([5, 1000, 20, 0, 700])
    history = GroupHistory({"a": 2, "b": 3})
    for step in range(1000):
        history.update(step < deaths)
    alive = history.alive("b")
    assert COLUMNS / 2 <= len(alive) <= COLUMNS
    assert alive.sum(0).tolist() == [-(-20 * 250 // 1000), 0, 700 * 250 // 1000]
    picture = history.picture("b")
    height, width = picture.shape[1:]
    assert height == ROWS // 3 * 3
    assert width == 250
    blue = (picture[2] == 180).float().mean(1)
    assert [round(float(x), 2) for x in blue[:: ROWS // 3]] == [0.7, 0.02, 0.0]


def test_many_groups_are_shown_in_part() -> None:
    history = GroupHistory({"a": 10_000})
    history.update(torch.arange(10_000) < 5_000)
    picture = history.picture("a")
    assert picture.shape == (3, ROWS, COLUMNS)
    assert float((picture[2] == 180).float().mean()) == 0.5


def test_a_fast_development_run_writes_nothing_and_says_nothing(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    callback = WGSEFCallback(k=0.25, lam=Constant(0.1), freeze=None, dashboard=True)
    trainer = make_trainer([callback], fast_dev_run=2, logger=logger)
    trainer.fit(with_settings(), loader())  # a warning is an error
    assert trainer.global_step == 2
    assert not list(tmp_path.iterdir())
