"""Every edit of a graph: one pass in a file, and the pipelines that run them."""
