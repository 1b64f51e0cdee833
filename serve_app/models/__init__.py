"""The models that a replica holds: loaded from the registry, followed as aliases move."""
