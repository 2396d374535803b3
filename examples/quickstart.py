"""The main job in under two minutes: train a network on real digits and end with a sparse one.

    python -m examples.quickstart

The digits (1,797 images, 8 x 8) come with scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import argparse

from examples.data.modules import Digits
from examples.models.lenet import SmallConvNet
from examples.training import compare
from lightning_wgsef import WGSEFCallback


def main() -> None:
    """Train dense and with a quarter of every layer's channels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--k", type=float, default=0.25, help="share of the channels that stay")
    options = parser.parse_args()
    callback = WGSEFCallback(k=options.k, grouping="channel", dashboard=True)
    data = Digits(batch_size=64)
    compare(SmallConvNet, data, options.epochs, lr=3e-3, name="quickstart", callback=callback)


if __name__ == "__main__":
    main()
