"""One base class for the callbacks of both packages that Lightning is published as."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    # pytorch_lightning and lightning.pytorch are two class hierarchies; a Trainer of one rejects a
    # callback of the other. One class that inherits from both works in both.
    _packages = [name for name in ("pytorch_lightning", "lightning") if find_spec(name)]
    _modules = {"pytorch_lightning": "pytorch_lightning", "lightning": "lightning.pytorch"}
    _bases = tuple(import_module(_modules[name]).Callback for name in _packages)
    Callback = type("Callback", _bases, {})

__all__ = ["Callback"]
