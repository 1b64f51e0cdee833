"""Text generation for all routes: what a request asks for, its updates from the engine, and its reply."""
