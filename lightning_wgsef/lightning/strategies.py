"""Strategies of Lightning: which are refused, and which restore weights late.

To support another one, see `lightning_wgsef.network.sharding` (weights of which every process has a
part) and `lightning_wgsef.groups.sharding` (groups of such weights).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


_UNSUPPORTED = ("FSDPStrategy", "DeepSpeedStrategy")


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which the weights cannot be edited.

    Raises:
        ValueError: it is one of them; the message names what to use instead.
    """
    names = {base.__name__ for base in type(trainer.strategy).__mro__}
    for unsupported in _UNSUPPORTED:
        if unsupported in names:
            raise ValueError(
                f"strategy={unsupported} flattens the weights of several layers into one "
                "vector, in which WGSEFCallback finds no groups; use 'ddp', or "
                "ModelParallelStrategy with fully_shard (FSDP2) in configure_model"
            )


def restores_later(trainer: Trainer) -> bool:
    """Return whether a checkpoint is restored between the start of the fit and of training."""
    return trainer.strategy.restore_checkpoint_after_setup and trainer.ckpt_path is not None
