"""The detector: its scenes, network, loss and precision against definitions; the example itself."""

from __future__ import annotations

import builtins
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from examples import detector
from examples.data.scenes import FashionScenes, overlaps, paste
from examples.models.yolo import YOLO, places
from lightning_wgsef import group_parameters, slim


def boxes(count: int, seed: int = 0, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(0, size, (2, count, 2), generator=generator)
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second) + 1], 1).float()


def covered(box: Tensor, size: int = 80) -> Tensor:
    """The pixels of a box with whole corners."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    x1, y1, x2, y2 = box.int().tolist()
    mask[y1:y2, x1:x2] = True
    return mask


def test_overlaps_are_those_of_counted_pixels() -> None:
    some, others = boxes(30), boxes(20, seed=1)
    found = overlaps(some[:, None], others[None])
    for i, one in enumerate(some):
        for j, other in enumerate(others):
            a, b = covered(one), covered(other)
            expected = float((a & b).sum()) / float((a | b).sum())
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-6)


def test_boxes_of_pasted_items_are_tight() -> None:
    """A white rectangle in a black item: its corners are where the scene becomes white."""
    item = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    item[..., 7:21, :] = 255
    scenes, targets = paste(item, torch.tensor([3]), 20, 64, 1, seed=0)
    for scene, (target,) in zip(scenes, targets, strict=True):
        white = scene[0] > (0.75 - 0.15) / 0.3  # noise alone does not come near
        rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert target[0] == 3
        assert [float(x) for x in target[1:]] == pytest.approx([float(x) for x in seen], abs=2)
        assert 14 <= target[3] - target[1] <= 40


def test_scenes_are_always_the_same_and_their_items_apart(fashion_mnist: Path) -> None:
    data, again = (FashionScenes(fashion_mnist, scenes=(40, 10, 10)) for _ in range(2))
    for each in (data, again):
        each.prepare_data()
        each.setup()
    for name, count in (("train_set", 40), ("val_set", 10), ("test_set", 10)):
        images, targets = getattr(data, name)
        torch.testing.assert_close(getattr(again, name), (images, targets), rtol=0, atol=0)
        assert images.shape == (count, 1, 64, 64)
        assert targets.shape == (count, 4, 5)
        there = targets[..., 0] >= 0
        assert there[:, 0].all()
        assert len({int(n) for n in there.sum(1)}) > 1
        corners = targets[there][:, 1:]
        assert corners.min() >= 0
        assert corners.max() <= 64
        assert (corners[:, 2:] > corners[:, :2]).all()
        for rows, mask in zip(targets[..., 1:], there, strict=True):
            shared = overlaps(rows[mask][:, None], rows[mask][None]).fill_diagonal_(0)
            assert shared.max() <= 0.1
    assert abs(float(data.train_set[0].mean())) < 0.3
    (images, targets) = next(iter(data.train_dataloader()))
    assert (len(images), len(targets)) == (32, 32)


def test_the_network_gives_decoded_boxes_at_every_place() -> None:
    network = YOLO(width=4).eval()
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in YOLO().parameters()) == 929_434
    for head in network.heads:
        nn.init.zeros_(head.boxes[-1].weight)
        nn.init.zeros_(head.boxes[-1].bias)
    found = network(torch.randn(2, 1, 64, 32))
    assert found.shape == (2, 16 * 8 + 8 * 4 + 4 * 2, 14)
    start = 0
    for stride in network.strides:
        for row in range(64 // stride):
            for column in range(32 // stride):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                away = stride * float(softplus(torch.tensor(0.0)))
                expected = torch.tensor([x - away, y - away, x + away, y + away])
                torch.testing.assert_close(found[1, start, :4], expected)
                start += 1


def test_half_of_the_network_is_taken_out() -> None:
    torch.manual_seed(0)
    network, example = YOLO(width=4), torch.randn(2, 1, 64, 64)
    groups = group_parameters(network, "structure", 0.5, example_input=example)
    named = {layer.name for layer in groups.layers}
    assert {"stem.0", "stage3.2.enter.0", "shrink1.0", "heads.2.boxes.0.0"} <= named
    assert not any(name.endswith((".boxes.1", ".classes.1")) for name in named)
    first = [torch.arange(layer.count) < layer.budget for layer in groups.layers]
    groups.scale_(torch.cat(first).to(groups.dtype))
    small = slim(network, example)
    assert not small.slimming.kept
    assert small.stem[0].out_channels == 2
    network.eval()
    torch.testing.assert_close(small.eval()(example), network(example), rtol=1e-4, atol=1e-4)


def test_items_go_to_places_by_size_and_nearness() -> None:
    """Against loops written from the definition."""
    strides = (4, 8, 16)
    targets = torch.full((6, 4, 5), -1.0)
    for image in range(6):
        rows = boxes(image % 4 + 1, seed=image)
        targets[image, : len(rows), 1:] = rows
        targets[image, : len(rows), 0] = torch.arange(len(rows)).float()
    found = detector.assign(64, 64, targets, strides)
    assert found.shape == (6, 336)
    for image, rows in enumerate(targets.tolist()):
        place = 0
        for stride in strides:
            for x, y in places(64 // stride, 64 // stride, stride).tolist():
                best, smallest = -1, float("inf")
                for number, (kind, x1, y1, x2, y2) in enumerate(rows):
                    low, high = detector.SIDES[stride]
                    inside = x1 < x < x2 and y1 < y < y2
                    near = all(
                        abs(a - b) < 1.5 * stride
                        for a, b in ((x, (x1 + x2) / 2), (y, (y1 + y2) / 2))
                    )
                    area = (x2 - x1) * (y2 - y1)
                    fits = low < max(x2 - x1, y2 - y1) <= high
                    if kind >= 0 and inside and near and fits and area < smallest:
                        best, smallest = number, area
                assert int(found[image, place]) == best
                place += 1
    assert {int(x) for x in found.unique()} >= {-1, 0, 1}


def test_the_loss_is_that_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(2, 7, 4 + 3, generator=generator, dtype=torch.float64)
    found[..., :4] = torch.stack([boxes(7, seed=s) for s in (0, 1)]).double()
    targets = torch.full((2, 2, 5), -1.0, dtype=torch.float64)
    targets[:, :, 1:] = torch.stack([boxes(2, seed=s) for s in (2, 3)]).double()
    targets[:, :, 0] = torch.tensor([[2, 0], [1, -1]])
    item = torch.tensor([[-1, 0, 1, -1, 0, -1, -1], [0, -1, -1, -1, -1, -1, -1]])
    total, count = 0.0, 0
    for image in range(2):
        for place in range(7):
            logits, quality = found[image, place, 4:], [0.0] * 3
            if item[image, place] >= 0:
                count += 1
                aimed, box = targets[image, item[image, place]], found[image, place, :4]
                a, b = covered(box), covered(aimed[1:])
                union, ratio = float((a | b).sum()), float((a & b).sum()) / float((a | b).sum())
                low, high = torch.minimum(box, aimed[1:]), torch.maximum(box, aimed[1:])
                hull = float((high[2] - low[0]) * (high[3] - low[1]))
                total += 2 * (1 - (ratio - (hull - union) / hull))
                quality[int(aimed[0])] = ratio
            for logit, y in zip(logits, quality, strict=True):
                p = torch.sigmoid(logit)
                total += float(-((y - p) ** 2) * (y * p.log() + (1 - y) * (1 - p).log()))
    loss = detector.detection_loss(found, targets, item)
    assert float(loss) == pytest.approx(total / count, rel=1e-6)


def test_a_scene_without_a_place_for_its_items_has_a_loss() -> None:
    found = torch.zeros(1, 5, 14, requires_grad=True)
    loss = detector.detection_loss(found, torch.full((1, 4, 5), -1.0), torch.full((1, 5), -1))
    loss.backward()
    assert found.grad is not None
    assert found.grad[..., 4:].min() > 0
    assert not found.grad[..., :4].any()


def test_suppression_keeps_the_best_of_each_class() -> None:
    logits = torch.full((1, 5, 3), -9.0)
    corners = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10.0], [30, 30, 40, 40]])
    found = torch.cat([torch.cat([corners, corners[:1]])[None], logits], 2)
    found[0, 0, 4], found[0, 1, 4] = 2.0, 3.0  # overlap by 0.82: the second is better
    found[0, 2, 5] = 1.0  # another class at the same place
    found[0, 3, 4] = 0.0
    (rows,) = detector.detections(found)
    assert rows[:, 0].tolist() == [0, 1, 0]
    assert rows[:, 1].tolist() == pytest.approx([0.95257, 0.73106, 0.5], abs=1e-5)
    assert rows[:, 2:].tolist() == [corners[i].tolist() for i in (1, 2, 3)]
    (none,) = detector.detections(torch.full((1, 5, 7), -9.0))
    assert none.shape == (0, 6)


def test_average_precision_of_one_box_is_the_share_of_thresholds_that_it_passes() -> None:
    pytest.importorskip("pycocotools")
    target = torch.tensor([[4.0, 10, 10, 50, 50], [-1, -1, -1, -1, -1]])
    exact = torch.tensor([[4.0, 0.9, 10, 10, 50, 50]])
    assert detector.coco_precision([exact], [target]) == pytest.approx(1)
    shifted = torch.tensor([[4.0, 0.9, 10, 10, 50, 41]])  # 0.775 of it: six of ten thresholds
    assert detector.coco_precision([shifted], [target]) == pytest.approx(0.6)
    other = torch.tensor([[3.0, 0.9, 10, 10, 50, 50]])
    assert detector.coco_precision([other], [target]) == 0
    assert detector.coco_precision([exact[:0]], [target]) == 0
    two = [torch.cat([exact, exact + torch.tensor([0, 0.05, 5, 5, 5, 5])])]
    # Three thresholds are passed by the worse box, whose score is better; seven by the second one.
    assert detector.coco_precision(two, [target]) == pytest.approx(0.65)


def test_without_pycocotools_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.startswith("pycocotools"):
            raise ModuleNotFoundError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match="pip install pycocotools"):
        detector.coco_precision([], [])


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_the_example_halves_the_operations(
    fashion_mnist: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("pycocotools")
    monkeypatch.chdir(tmp_path)
    tiny = ["--epochs", "1", "1", "--scenes", "128", "8", "8", "--width", "4"]
    monkeypatch.setattr(sys, "argv", ["detector", "--data-dir", str(fashion_mnist), *tiny])
    try:
        detector.main()
    finally:
        torch.set_flush_denormal(False)
    output = capsys.readouterr().out
    found = re.findall(r"^([\w, ]+): mAP ([\d.]+) %, [\d,]+ weights, ([\d.]+) MFLOPs", output, re.M)
    assert [name for name, *_ in found] == ["dense", "pruned", "slim", "dense, as long"]
    dense, pruned, small, again = (float(flops) for *_, flops in found)
    assert pruned == again == dense
    assert small == pytest.approx(dense / 2, rel=0.05)
    assert (tmp_path / "detector" / "detector.onnx").exists()
