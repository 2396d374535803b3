"""From a network to its groups: the groupings by name, and their weights, costs and budgets."""

from lightning_wgsef.network.attention import ProjectionNames as ProjectionNames
from lightning_wgsef.network.attention import register_projections as register_projections
