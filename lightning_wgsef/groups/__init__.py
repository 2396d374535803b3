"""Groups of weights: where they lie, their norms and scaling, who shares a budget."""
