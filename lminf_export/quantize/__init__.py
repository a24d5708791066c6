"""Weight-only quantisation: projections are stored in blocks of 4 or 8 bits, not activations."""
