"""A detector pruned to half of its operations: mean average precision before and after.

    python -m examples.detector --data-dir data/fashion-mnist

A small YOLO finds pasted Fashion-MNIST items. It is trained, pruned while it trains on, made
smaller with `slim`, written as ONNX, and measured: COCO's mean average precision over overlaps from
0.5 to 0.95, by pycocotools, which torchmetrics calls for it, too. To compare with, the
dense network is trained on as long. Seven minutes on one core. What is measured is printed, and
kept in figures.jsonl beside the ONNX file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from examples.benchmark.records import Records, origin
from examples.data.batches import Batches
from examples.data.scenes import FashionScenes, overlaps
from examples.models.yolo import YOLO, places
from examples.training import Batch, quiet_trainer
from lightning_wgsef import WGSEFCallback, export_onnx, measure_latency, slim
from lightning_wgsef.network.flops import layer_flops

# The longer side, in pixels, of what a head of each stride is to find.
SIDES = {4: (0.0, 18.0), 8: (18.0, 28.0), 16: (28.0, float("inf"))}


class Detector(pl.LightningModule):
    """Trains a `YOLO`; logs train/loss and val/map.

    The loss of a place: the quality focal loss of its logits (Li et al., 2020), whose target is the
    overlap of its box and the item that it is to find, and 1 less the generalised overlap of the
    two (Rezatofighi et al., 2019).

    Args:
        network: gives corners and logits.
        lr: of AdamW; it falls along a cosine.
    """

    def __init__(self, network: YOLO, lr: float = 2e-3) -> None:
        super().__init__()
        self.network = network
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        """Returns the network's corners and logits."""
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the batch's loss."""
        images, targets = batch
        found = self(images)
        item = assign(images.shape[2], images.shape[3], targets, self.network.strides)
        loss = detection_loss(found, targets, item)
        self.log("train/loss", loss, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> Any:
        """Returns AdamW and its schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


def assign(rows: int, columns: int, targets: Tensor, strides: Sequence[int]) -> Tensor:
    """Which item every place is to find: FCOS (Tian et al., 2019) with centre sampling.

    A place finds the smallest item whose side fits its head, and whose centre is less than one and
    a half strides away along both axes, within the item.

    Args:
        rows: of the images.
        columns: of the images.
        targets: (n, items, 5), see `FashionScenes`.
        strides: of the heads.

    Returns:
        Numbers of items, or -1, (n, places).
    """
    centres = torch.cat([places(rows // s, columns // s, s) for s in strides]).to(targets)
    heads = [(stride, (rows // stride) * (columns // stride)) for stride in strides]
    reach, lowest, highest = (
        torch.cat([torch.full((count, 1), float(x)) for x, count in values]).to(targets)
        for values in (
            heads,
            [(SIDES[stride][0], count) for stride, count in heads],
            [(SIDES[stride][1], count) for stride, count in heads],
        )
    )
    boxes = targets[:, None, :, 1:]  # (n, 1, items, 4)
    sides = boxes[..., 2:] - boxes[..., :2]
    middle = (boxes[..., 2:] + boxes[..., :2]) / 2
    away = (centres[:, None] - middle).abs()  # (n, places, items, 2)
    longer = sides.amax(-1)
    fits = (targets[:, None, :, 0] >= 0) & (longer > lowest) & (longer <= highest)
    fits = fits & (away < 1.5 * reach[..., None]).all(-1) & (away < sides / 2).all(-1)
    area = torch.where(fits, sides.prod(-1), torch.inf)
    return torch.where(fits.any(-1), area.argmin(-1), -1)


def detection_loss(found: Tensor, targets: Tensor, item: Tensor) -> Tensor:
    """The mean loss of the places that are to find something.

    Args:
        found: corners and logits, (n, places, 4 + classes).
        targets: (n, items, 5), see `FashionScenes`.
        item: which one a place is to find, or -1, (n, places).
    """
    boxes, logits = found[..., :4], found[..., 4:]
    positive = item >= 0
    aimed = targets.gather(1, item.clamp(min=0)[..., None].expand(-1, -1, 5))
    count = positive.sum().clamp(min=1)
    overlap = overlaps(boxes[positive], aimed[positive][:, 1:])
    quality = torch.zeros_like(logits)
    classes = one_hot(aimed[positive][:, 0].long().clamp(min=0), logits.shape[-1])
    quality[positive] = classes * overlap.detach()[:, None].to(logits)
    weight = (quality - logits.sigmoid()).square()
    focal = (weight * binary_cross_entropy_with_logits(logits, quality, reduction="none")).sum()
    aside = 1 - overlap + _empty_share(boxes[positive], aimed[positive][:, 1:])
    return (focal + 2 * aside.sum()) / count


def _empty_share(boxes: Tensor, others: Tensor) -> Tensor:
    """Of the smallest box around both, the share that neither covers."""
    around = torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])
    hull = around.prod(-1).clamp(min=1e-9)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (boxes, others)]
    ratio = overlaps(boxes, others)
    union = (areas[0] + areas[1]) / (1 + ratio)
    return (hull - union) / hull


def detections(found: Tensor, score: float = 0.05, overlap: float = 0.6) -> list[Tensor]:
    """What is left of every image after greedy non-maximum suppression, class by class.

    Args:
        found: corners and logits, (n, places, 4 + classes).
        score: what is below is not looked at.
        overlap: what overlaps a better one of its class by more is left out.

    Returns:
        For every image rows of class, score, x1, y1, x2, y2; the best first, 100 at most.
    """
    kept = []
    for image in found:
        scores, index = image[:, 4:].sigmoid().flatten().sort(descending=True, stable=True)
        index = index[scores > score][:300]
        place, kind = index // (image.shape[1] - 4), index % (image.shape[1] - 4)
        boxes = image[place, :4]
        covers = (overlaps(boxes[:, None], boxes[None]) > overlap) & (kind[:, None] == kind)
        alive = torch.ones(len(index), dtype=torch.bool)
        for i in range(len(index)):
            if alive[i]:
                alive[i + 1 :] &= ~covers[i, i + 1 :]
        rows = torch.cat([kind[:, None].to(boxes), scores[: len(index), None], boxes], 1)
        kept.append(rows[alive][:100])
    return kept


@torch.no_grad()
def mean_average_precision(network: nn.Module, scenes: Batches) -> float:
    """COCO's mean average precision in percent, in evaluation mode; the mode is restored."""
    training = network.training
    network.eval()
    found = [rows for images, _ in scenes for rows in detections(network(images))]
    network.train(training)
    return 100 * coco_precision(found, list(scenes.labels))


def coco_precision(found: list[Tensor], targets: list[Tensor]) -> float:
    """Mean average precision in [0, 1] over overlaps 0.5, 0.55, .., 0.95, by pycocotools.

    Args:
        found: for every image rows of class, score, x1, y1, x2, y2.
        targets: for every image rows of class, x1, y1, x2, y2; class -1 is none.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "mean average precision needs pycocotools: pip install pycocotools"
        ) from error
    truth = [
        {"image_id": image, **_coco_box(row[0], row[1:]), "iscrowd": 0}
        for image, rows in enumerate(targets)
        for row in rows
        if row[0] >= 0
    ]
    guesses = [
        {"image_id": image, **_coco_box(row[0], row[2:]), "score": float(row[1])}
        for image, rows in enumerate(found)
        for row in rows
    ]
    for number, box in enumerate(truth, start=1):
        box["id"] = number
    if not guesses or not truth:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # it tells how long it took
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(targets))],
            "annotations": truth,
            "categories": [{"id": kind} for kind in sorted({x["category_id"] for x in truth})],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(guesses), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def _coco_box(kind: Tensor, corners: Tensor) -> dict[str, Any]:
    x1, y1, x2, y2 = corners.tolist()
    width, height = x2 - x1, y2 - y1
    return {"category_id": int(kind) + 1, "bbox": [x1, y1, width, height], "area": width * height}


def main() -> None:
    """Train, prune, make smaller, export; print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/fashion-mnist"))
    parser.add_argument("--width", type=int, default=8, help="filters of the first convolution")
    parser.add_argument("--epochs", type=int, nargs=2, default=(12, 8), help="dense, and pruning")
    parser.add_argument("--operations", type=float, default=0.5, help="the share that stays")
    parser.add_argument("--scenes", type=int, nargs=3, default=(4_000, 500, 500))
    parser.add_argument("--folder", type=Path, default=Path("detector"))
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    options.folder.mkdir(parents=True, exist_ok=True)
    data = FashionScenes(options.data_dir, scenes=tuple(options.scenes))
    data.prepare_data()
    data.setup()
    example = torch.zeros(2, *data.image_shape)

    records = Records(options.folder / "figures.jsonl")

    def show(name: str, network: nn.Module) -> None:
        weights = sum(int(parameter.count_nonzero()) for parameter in network.parameters())
        flops = layer_flops(network, example)[1] / len(example)
        score = mean_average_precision(network, data.test_dataloader())
        print(f"{name}: mAP {score:.1f} %, {weights:,} weights, {flops / 1e6:.1f} MFLOPs an image")
        figures: dict[str, Any] = {"map": score, "weights": weights, "flops": flops}
        if name == "slim":
            times = measure_latency(network, example, against=dense, batch_sizes=(1, 32))
            print(times)
            figures["latency"] = [batch.ratio.median for batch in times.batches if batch.ratio]
        records.append({"name": name, **figures, **origin()})

    pl.seed_everything(0, verbose=False)
    model = Detector(YOLO(width=options.width))
    quiet_trainer(options.epochs[0], []).fit(model, data)
    dense = copy.deepcopy(model.network)
    show("dense", dense)

    # Of one image; every layer keeps the same share of its channels, whatever that is.
    size = options.operations * layer_flops(dense, example)[1] / len(example)
    pruning = WGSEFCallback(f"{size:.0f} FLOPs", grouping="structure", example_input=example)
    quiet_trainer(options.epochs[1], [pruning]).fit(model, data)
    show("pruned", model.network)
    small = slim(model.network, example)
    print(small.slimming)
    show("slim", small)
    quiet_trainer(options.epochs[1], []).fit(trained_on := Detector(dense), data)
    show("dense, as long", trained_on.network)
    export_onnx(small, options.folder / "detector.onnx", example)
    print(f"{options.folder / 'detector.onnx'}: run and compared")


if __name__ == "__main__":
    main()
