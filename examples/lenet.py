"""LeNet-5 on Fashion-MNIST, down to a tenth of the channels.

    python -m examples.lenet --data-dir data/fashion-mnist

Reads the four original files from --data-dir; missing ones are downloaded and verified.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.data.modules import FashionMNIST
from examples.models.lenet import LeNet5
from examples.training import compare
from lightning_wgsef import WGSEFCallback


def main() -> None:
    """Train dense and with a tenth of the channels of every layer but the classifier."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--k", type=float, default=0.1, help="share of the channels that stay")
    options = parser.parse_args()
    callback = WGSEFCallback(k=options.k, grouping="channel", exclude="*fc3")
    data = FashionMNIST(options.data_dir, batch_size=128)
    name = "lenet-fashion-mnist"
    compare(LeNet5, data, options.epochs, lr=1e-3, name=name, callback=callback)


if __name__ == "__main__":
    main()
