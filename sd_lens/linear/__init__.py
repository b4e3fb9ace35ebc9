"""Blocks as matrix-free linear maps, and their leading singular triples."""
