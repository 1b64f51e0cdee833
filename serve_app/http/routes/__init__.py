"""The routes, one module per audience. Each has `router(state)`, which makes its routes for one app."""
