"""All edits of graphs: one pass a file, its contract executed; `pipelines` puts them in order."""
