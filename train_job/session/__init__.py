"""The driver's side of a run: its folder, its console, how it begins and how it ends."""
