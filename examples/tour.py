"""A tour in cells: group, train, freeze, make smaller, export, fine-tune. Two minutes.

    python -m examples.tour

Editors that know ``# %%`` run it cell by cell. Real handwritten digits (8 x 8, with scikit-learn);
everything is written to the folder ``tour``.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from examples.data.modules import Digits
from examples.models.lenet import SmallConvNet
from examples.training import Classifier
from lightning_wgsef import (
    WGSEFCallback,
    export_program,
    group_parameters,
    load_slim,
    measure_latency,
    network_report,
    plot_report,
    plot_sparsity,
    save_slim,
    slim,
)

FOLDER = Path("tour")
FOLDER.mkdir(exist_ok=True)
EXAMPLE = torch.zeros(1, 1, 8, 8)
warnings.filterwarnings("ignore", ".*does not have many workers.*")
warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning 2.6 on torch 2.13
torch.set_flush_denormal(True)  # shrinking weights become denormal, which is slow


def trainer(epochs: int, name: str, *callbacks: pl.Callback) -> pl.Trainer:
    """A Trainer as anybody would make it."""
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=TensorBoardLogger(FOLDER, name=name, version=""),
        log_every_n_steps=10,
        num_sanity_val_steps=0,
    )


# %% Which groups are there? The same network under three groupings. A quarter shall stay.
pl.seed_everything(0)
data = Digits(batch_size=64)
model = Classifier(SmallConvNet(), lr=3e-3)
for grouping in ("channel", "structure", "element"):
    print(f"\n{grouping}\n{group_parameters(model, grouping, k=0.25, example_input=EXAMPLE)}")

# %% Train. "structure" takes everything that makes one channel, so that it can be removed. The
# table above comes again, then a line when the mask is fixed, then the report.
pruning = WGSEFCallback(k=0.25, grouping="structure", example_input=EXAMPLE, dashboard=True)
training = trainer(20, "pruned", pruning)
training.fit(model, data)
training.save_checkpoint(FOLDER / "pruned.ckpt")
training.test(model, data)

# %% What happened to the groups? Also in the browser: tensorboard --logdir tour
plot_sparsity(FOLDER / "pruned").savefig(FOLDER / "sparsity.png")

# %% The weights are zero and still there. Take them out: the outputs stay the same.
small = slim(model.network, EXAMPLE)
print(small.slimming)
images, _ = next(iter(data.test_dataloader()))
model.eval()
difference = (model(images) - small.eval()(images)).abs().max()
print(f"largest difference of the outputs on test images: {difference:.1e}")
save_slim(small, FOLDER / "small.safetensors")

# %% What is it worth?
report = network_report({"masked": model.network, "slim": small}, EXAMPLE, batch_sizes=(1, 64))
print(report)
plot_report(report).savefig(FOLDER / "networks.png")

# %% Export. The file is run and compared before it gets its name. Also: export_onnx.
export_program(small, FOLDER / "small.pt2", EXAMPLE)
print(measure_latency(small, EXAMPLE, against=model.network, batch_sizes=(64,)))

# %% Fine-tune, either the network with its zeros, which stay zeros ..
model = Classifier(SmallConvNet(), lr=1e-3)
checkpoint = torch.load(FOLDER / "pruned.ckpt", weights_only=True)
model.load_state_dict(checkpoint["state_dict"])
keep = WGSEFCallback(grouping="structure", example_input=EXAMPLE, masks=FOLDER / "pruned.ckpt")
tuning = trainer(5, "tuned", keep)
tuning.fit(model, data)
tuning.test(model, data)

# %% .. or the one without them, which is a plain smaller network.
smaller = Classifier(load_slim(FOLDER / "small.safetensors", SmallConvNet).train(), lr=1e-3)
tuning = trainer(5, "tuned-small")
tuning.fit(smaller, data)
tuning.test(smaller, data)
