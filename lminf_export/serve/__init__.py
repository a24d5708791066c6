"""Serving a bundle over HTTP: the interface of OpenAI's API, kept conversations, metrics."""
