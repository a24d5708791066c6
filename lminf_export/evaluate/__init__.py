"""Measures what an exported model does with long texts: perplexity, retrieval, fluency."""
