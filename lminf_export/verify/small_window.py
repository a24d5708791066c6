"""A bundle's graph with a smaller window, so that its rings wrap within a short stream.

The window is an attribute of each attention node, and the rings are inputs of any size. So the
bundle's own graph, over its own weights, runs with other numbers in its nodes: everything else
stays as it was exported. A ring that is written past its end, a token that leaves the window and
becomes a sink, and the mask around both do not depend on how large the window is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import Manifest
from lminf_export.bundle.tables import io_tables
from lminf_export.errors import InputError
from lminf_export.models.base import AttentionPlan
from lminf_export.operator.bindings import LayerSpec
from lminf_export.operator.contract import INT8_CACHE_OP_TYPE, KEY_BIAS_OP_TYPE, OP_TYPE
from lminf_export.operator.settings import ring_capacity
from lminf_export.runtime.load import names_plan

# Bytes of weights → the largest window that is tested as it is; the last for larger bundles.
_LIMITS = ((2**28, 512), (2**31, 128), (math.inf, 32))


@dataclass(frozen=True)
class SmallWindow:
    """A bundle as it is tested.

    Attributes:
        own: the bundle on disk.
        bundle: the same with a manifest of the window that is tested.
        graph: the graph with that window, serialised; None for the bundle's own.
        windows: the bundle's own window of a layer → the one that is tested.
    """

    own: Bundle
    bundle: Bundle
    graph: bytes | None
    windows: dict[int, int]

    @property
    def chunk_size(self) -> int:
        """Largest number of tokens in one step of the test."""
        return self.bundle.manifest.settings.chunk_size

    @property
    def common_length(self) -> int:
        """Tokens up to which the unmodified model, with its own windows, computes the same."""
        layers = zip(self.bundle.manifest.layers, self.own.manifest.layers, strict=True)
        changed = [
            layer.window_size
            for layer, own in layers
            if layer.kind == "lambda" or layer.window_size != own.window_size
        ]
        return min([*changed, self.bundle.manifest.settings.window_size])

    def plan(self, plan: AttentionPlan) -> AttentionPlan:
        """Return how a model's layers attend in the test."""
        return replace(plan, layers=tuple(self._layer(layer) for layer in plan.layers))

    def _layer(self, layer: LayerSpec) -> LayerSpec:
        window = self.windows[layer.window_size]
        capacity = ring_capacity(window, self.chunk_size)
        return replace(layer, window_size=window, ring_capacity=capacity)


def default_window(manifest: Manifest) -> int:
    """Return the largest window of a layer in a test of reasonable length."""
    size = sum(manifest.files[name].bytes for name in manifest.files_of("weights"))
    limit = next(limit for most, limit in _LIMITS if size <= most)
    return min(limit, largest_window(manifest))


def tested_window(path: str | Path, bundle: Bundle, window: int | None) -> int:
    """Return the largest window that a bundle is tested with.

    Args:
        path: the bundle as it was named: a plan's window cannot be changed.
        bundle: opened from it.
        window: the one asked for, or None.

    Raises:
        InputError: another window than that of the plan.
    """
    largest = largest_window(bundle.manifest)
    if not names_plan(path, bundle):
        return default_window(bundle.manifest) if window is None else window
    if window not in (None, largest):
        raise InputError(f"window {window}: the plan's is {largest}, and is part of the engine")
    return largest


def largest_window(manifest: Manifest) -> int:
    """Return the largest window of a bundle's layers."""
    return max(layer.window_size for layer in manifest.layers)


def with_window(bundle: Bundle, window: int) -> SmallWindow:
    """Return a bundle whose largest window is another one; smaller ones of layers may follow.

    Args:
        bundle: as it is on disk.
        window: tokens, at most the bundle's own.

    Raises:
        InputError: a window that the bundle cannot be tested with.
    """
    manifest = bundle.manifest
    largest = largest_window(manifest)
    if not 1 <= window <= largest:
        raise InputError(
            f"window {window}: expected 1 … {largest}, the bundle's own; a larger one is another "
            f"export"
        )
    known = sorted({layer.window_size for layer in manifest.layers})
    if window == largest:
        return SmallWindow(bundle, bundle, None, {size: size for size in known})
    windows = _shrunk(known, window)
    # Small chunks make small rings, which wrap more often.
    chunk_size = min(manifest.settings.chunk_size, max(1, window // 2))
    return SmallWindow(
        bundle,
        Bundle(bundle.path, _changed(manifest, windows, chunk_size)),
        _with_attributes(bundle, windows),
        windows,
    )


def _shrunk(known: list[int], largest: int) -> dict[int, int]:
    """Make windows smaller, and keep different ones different as far as that is possible."""
    count = len(known)
    return {
        size: max(1, min(size, largest * (place + 1) // count)) for place, size in enumerate(known)
    }


def _changed(manifest: Manifest, windows: dict[int, int], chunk_size: int) -> Manifest:
    layers = tuple(
        layer.model_copy(
            update={
                "window_size": windows[layer.window_size],
                "ring_capacity": ring_capacity(windows[layer.window_size], chunk_size),
            }
        )
        for layer in manifest.layers
    )
    own = manifest.lambda_config
    settings = own.model_copy(
        update={
            # No layer need have it: all may slide by training.
            "window_size": windows.get(own.window_size, max(windows.values())),
            "chunk_size": chunk_size,
        }
    )
    draft = manifest.model_copy(update={"layers": layers, "lambda_config": settings})
    inputs, outputs = io_tables(draft.contract)
    return draft.model_copy(update={"inputs": inputs, "outputs": outputs})


def _with_attributes(bundle: Bundle, windows: dict[int, int]) -> bytes:
    model = onnx.load(str(bundle.graph_path), load_external_data=False)
    for node in model.graph.node:
        if node.op_type in (OP_TYPE, INT8_CACHE_OP_TYPE, KEY_BIAS_OP_TYPE):
            for attribute in node.attribute:
                if attribute.name == "window_size":
                    attribute.i = windows[attribute.i]
    return bytes(model.SerializeToString())
