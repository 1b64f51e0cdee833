"""What the docs are made of: each module here writes a file of this folder anew."""
