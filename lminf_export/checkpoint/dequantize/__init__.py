"""Quantised checkpoints, decoded tensor by tensor while they are read."""
