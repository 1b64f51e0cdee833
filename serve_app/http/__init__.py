"""The HTTP app of one replica: routes, request bodies, limits, errors and logs."""
