"""Tensors of checkpoints and weights files: read, described and written block by block."""
