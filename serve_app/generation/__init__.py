"""From a checked body to the engine and back."""
