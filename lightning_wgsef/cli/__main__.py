"""``python -m lightning_wgsef.cli``."""

import sys

from lightning_wgsef.cli.commands import main

sys.exit(main())
