"""What an nn.Module is made of, costs, and how it is cut; nothing here knows of groups."""
