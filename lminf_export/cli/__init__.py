"""The command lines: `lminf-export` and `lminf`."""
