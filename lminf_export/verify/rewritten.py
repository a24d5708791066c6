"""What can be said of a bundle that was rewritten from an ONNX model."""

from __future__ import annotations

from lminf_export.bundle.manifest import Manifest
from lminf_export.errors import InputError


def require_comparable(manifest: Manifest, model: str | None) -> None:
    """Check that a reference can be built for a bundle, where it was rewritten.

    Its weights have the names and layouts of the ONNX model, so none can be read back from it.

    Raises:
        InputError: there is no model to take weights from, or the bundle's are not those.
    """
    origin = manifest.source.rewritten
    if origin is None:
        return
    compared = "it was compared with that graph when it was written"
    if model is None or model.endswith(".onnx"):
        raise InputError(
            f"the bundle was rewritten from {origin.file} and has no checkpoint to build a "
            f"reference of; {compared}; --model CHECKPOINT compares it with the model that the "
            f"graph was made of"
        )
    if origin.integer_products:
        raise InputError(
            f"the bundle was rewritten from {origin.file}, whose weights are integers, and the "
            f"reference of a checkpoint would have others; {compared}"
        )
