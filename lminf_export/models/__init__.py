"""Model families: how each is opened for Λ-attention, and every fact that holds for one alone."""
