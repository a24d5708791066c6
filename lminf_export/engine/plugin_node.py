"""Which caches one node of the plugin updates in place, in a graph or in a parsed network."""

from __future__ import annotations

from collections.abc import Sequence

from lminf_export.operator import bindings, contract

_CACHES = (*bindings.RING_KINDS, *bindings.SINK_KINDS)
# Places of the caches among the node's inputs and outputs.
CACHE_INPUTS = {kind: contract.input_names().index(f"past_{kind}") for kind in _CACHES}
CACHE_OUTPUTS = {kind: contract.output_names().index(f"present_{kind}") for kind in _CACHES}


def cache_updates(inputs: Sequence[str | None], outputs: Sequence[str | None]) -> dict[str, str]:
    """Return past name → present name of one node, from the names of its inputs and outputs."""
    pairs = ((inputs[CACHE_INPUTS[kind]], outputs[CACHE_OUTPUTS[kind]]) for kind in CACHE_INPUTS)
    return {past: present for past, present in pairs if past and present}
