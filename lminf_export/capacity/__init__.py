"""How many sessions a bundle's servers hold and answer, from its numbers."""
