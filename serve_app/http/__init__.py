"""The HTTP app of one replica: routes, request bodies, middleware and logs."""
