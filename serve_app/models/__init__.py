"""The models of a replica: loaded from their sources, and replaced when a registry alias moves."""
