"""Every figure that the README claims, and the command that makes it again. Each prints one JSON line last."""
