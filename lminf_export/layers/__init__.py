"""Layers that do the same: traced once, repeated in the graph.

`alike` proves by a full record of what a model computes which of its layers are alike; `repeat`
gives a graph of the first layers copies of them for the others, after checking that nothing but
the stream of tokens and the layer's own weights and caches tells one from the other.
"""

from __future__ import annotations


class UnlikeLayersError(Exception):
    """Why a model's layers are traced one by one instead; never reaches a user."""
