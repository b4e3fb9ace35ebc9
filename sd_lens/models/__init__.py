"""A model in, one view of its blocks out."""
