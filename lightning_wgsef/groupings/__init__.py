"""Groupings of a network's weights, by name, with penalty weights, costs and budgets."""

from lightning_wgsef.network.attention import ProjectionNames as ProjectionNames
from lightning_wgsef.network.attention import register_projections as register_projections
