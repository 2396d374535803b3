"""The command line ``lightning-wgsef``."""

from lightning_wgsef.cli.commands import main as main
