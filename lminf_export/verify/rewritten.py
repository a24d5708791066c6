"""Comparisons of a bundle that was rewritten from an ONNX model."""

from __future__ import annotations

from lminf_export.bundle.manifest import Manifest
from lminf_export.bundle.records import OnnxOrigin
from lminf_export.errors import InputError


def require_weights(manifest: Manifest, model: str | None) -> None:
    """Check that a torch model of a bundle can be built, where it was rewritten.

    Its weights have the names and layouts of the ONNX model, so none can be read back from it.

    Raises:
        InputError: no other model is given to take weights from.
    """
    origin = manifest.source.rewritten
    if origin is not None and (model is None or model.endswith(".onnx")):
        raise InputError(
            f"the bundle was rewritten from {origin.file} and has no checkpoint to take weights "
            f"from; give --model CHECKPOINT, the model that the graph was made "
            f"of{_compared(origin)}"
        )


def require_comparable(manifest: Manifest, model: str | None) -> None:
    """Check that a bundle computes what a reference does, where it was rewritten.

    Raises:
        InputError: there is no model to take weights from, or the bundle's are not those.
    """
    require_weights(manifest, model)
    origin = manifest.source.rewritten
    if origin is not None and origin.integer_products:
        raise InputError(
            f"the bundle was rewritten from {origin.file}, whose weights are integers, and the "
            f"reference of a checkpoint would have others{_compared(origin)}"
        )


def _compared(origin: OnnxOrigin) -> str:
    """Say whether the two graphs were compared when the bundle was written."""
    if origin.compared is None:
        return ""
    if origin.compared:
        return "; the bundle was compared with that graph when it was written"
    return (
        "; the bundle was written without comparing it with that graph (--no-check); rewrite the "
        "graph without --no-check to have it compared"
    )
