"""Which caches one node of the plugin updates in place, in a graph or in a parsed network."""

from __future__ import annotations

from collections.abc import Sequence

from lminf_export.operator import bindings, contract

# The operators that the plugin's library has a creator for.
OPERATORS = (contract.OP_TYPE, contract.INT8_CACHE_OP_TYPE)

_CACHES = (*bindings.RING_KINDS, *bindings.SINK_KINDS, *bindings.SCALE_KINDS)
# Places of the caches among the node's inputs and outputs; scales are behind all others.
_INPUTS, _OUTPUTS = contract.input_names(int8_cache=True), contract.output_names(int8_cache=True)
CACHE_INPUTS = {kind: _INPUTS.index(f"past_{kind}") for kind in _CACHES}
CACHE_OUTPUTS = {kind: _OUTPUTS.index(f"present_{kind}") for kind in _CACHES}


def cache_updates(inputs: Sequence[str | None], outputs: Sequence[str | None]) -> dict[str, str]:
    """Return past name → present name of one node, from the names of its inputs and outputs."""
    pairs = (
        (inputs[CACHE_INPUTS[kind]], outputs[CACHE_OUTPUTS[kind]])
        for kind in _CACHES
        if CACHE_INPUTS[kind] < len(inputs)
    )
    return {past: present for past, present in pairs if past and present}
