"""Quantised weights: what may be asked for, how they are stored and what room they take."""
