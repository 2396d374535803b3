"""Prune networks while PyTorch Lightning trains them, to a budget named beforehand.

The method is the Weighted Group Sparse Envelope Function of Refael, Arbel and Huleihel (2022, arXiv
2212.12921): groups of weights compete through the exact proximal step of the envelope.
"""

from lightning_wgsef.export.runtimes import export_onnx, export_program
from lightning_wgsef.export.sparse_storage import load_sparse, to_sparse
from lightning_wgsef.groupings.group_parameters import group_parameters
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Member
from lightning_wgsef.lightning.callback import WGSEFCallback
from lightning_wgsef.network.latency import measure_latency
from lightning_wgsef.penalties.envelope import (
    Envelope,
    envelope_conjugate,
    envelope_value,
    prox_multipliers,
    sparsity_gap,
)
from lightning_wgsef.penalties.group_lasso import GroupLasso
from lightning_wgsef.penalties.preconditioned import prox_metric
from lightning_wgsef.reports.networks import network_report
from lightning_wgsef.reports.plots import plot_report, plot_sparsity
from lightning_wgsef.reports.sensitivity import sensitivity
from lightning_wgsef.reports.sparsity import sparsity_report
from lightning_wgsef.slimming.files import load_slim, save_slim
from lightning_wgsef.slimming.prune import prune
from lightning_wgsef.slimming.slim import slim
from lightning_wgsef.training.half_space import HalfSpace
from lightning_wgsef.training.masks import masks_from_zeros
from lightning_wgsef.training.preconditioners import register_preconditioner
from lightning_wgsef.training.regularizer import WGSEF
from lightning_wgsef.training.schedules import Constant, CubicRamp, Homotopy, Warmup

__version__ = "0.1.0"
__all__ = [
    "WGSEF",
    "Constant",
    "CubicRamp",
    "Envelope",
    "GroupLasso",
    "GroupedLayer",
    "Groups",
    "HalfSpace",
    "Homotopy",
    "Member",
    "WGSEFCallback",
    "Warmup",
    "envelope_conjugate",
    "envelope_value",
    "export_onnx",
    "export_program",
    "group_parameters",
    "load_slim",
    "load_sparse",
    "masks_from_zeros",
    "measure_latency",
    "network_report",
    "plot_report",
    "plot_sparsity",
    "prox_metric",
    "prox_multipliers",
    "prune",
    "register_preconditioner",
    "save_slim",
    "sensitivity",
    "slim",
    "sparsity_gap",
    "sparsity_report",
    "to_sparse",
]


def __dir__() -> list[str]:
    """List the public names; the packages below are found as modules."""
    return [*__all__, "__version__"]
