"""Files of the demo models that training writes and measurements read."""

# Held-out text by corpus; `lminf validate` looks for the first name in a model's folder.
HELDOUT_FILES = {"kjv": "heldout.txt", "austen": "heldout-austen.txt"}
