"""Training with torch alone: the loop, its optimizer, evaluation and checkpoints."""
