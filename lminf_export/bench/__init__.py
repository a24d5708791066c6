"""How fast a bundle runs here, and how far that is from what the memory allows."""
