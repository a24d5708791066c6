"""Measures how fast a bundle runs here, and compares it with the memory's bandwidth."""
