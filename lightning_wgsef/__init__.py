"""Prune networks while PyTorch Lightning trains them, to a budget named beforehand.

The method is the Weighted Group Sparse Envelope Function of Refael, Arbel and Huleihel (2022, arXiv
2212.12921): groups of weights compete through the exact proximal step of the envelope.
"""

from lightning_wgsef.callback import WGSEFCallback as WGSEFCallback
from lightning_wgsef.envelope import envelope_conjugate as envelope_conjugate
from lightning_wgsef.envelope import envelope_value as envelope_value
from lightning_wgsef.envelope import prox_multipliers as prox_multipliers
from lightning_wgsef.envelope import sparsity_gap as sparsity_gap
from lightning_wgsef.export import export_onnx as export_onnx
from lightning_wgsef.export import export_program as export_program
from lightning_wgsef.grouped_layer import GroupedLayer as GroupedLayer
from lightning_wgsef.groupings.parameters import group_parameters as group_parameters
from lightning_wgsef.groups import Groups as Groups
from lightning_wgsef.half_space import HalfSpace as HalfSpace
from lightning_wgsef.latency import measure_latency as measure_latency
from lightning_wgsef.masks import masks_from_zeros as masks_from_zeros
from lightning_wgsef.members import Member as Member
from lightning_wgsef.metric import prox_metric as prox_metric
from lightning_wgsef.network_comparison import network_report as network_report
from lightning_wgsef.penalties import Envelope as Envelope
from lightning_wgsef.penalties import GroupLasso as GroupLasso
from lightning_wgsef.plots import plot_report as plot_report
from lightning_wgsef.plots import plot_sparsity as plot_sparsity
from lightning_wgsef.preconditioners import register_preconditioner as register_preconditioner
from lightning_wgsef.regularizer import WGSEF as WGSEF
from lightning_wgsef.report import sparsity_report as sparsity_report
from lightning_wgsef.schedules import Constant as Constant
from lightning_wgsef.schedules import CubicRamp as CubicRamp
from lightning_wgsef.schedules import Homotopy as Homotopy
from lightning_wgsef.schedules import Warmup as Warmup
from lightning_wgsef.slim_files import load_slim as load_slim
from lightning_wgsef.slim_files import save_slim as save_slim
from lightning_wgsef.slimming import slim as slim
from lightning_wgsef.sparse_storage import load_sparse as load_sparse
from lightning_wgsef.sparse_storage import to_sparse as to_sparse

__version__ = "0.1.0"
