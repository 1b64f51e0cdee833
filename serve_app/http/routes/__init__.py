"""The routes, one module per kind of client. Each module's `router(state)` returns the routes of one app."""
