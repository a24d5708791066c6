"""A bundle given as a model: its weights, if they are plain, can be exported once more."""

from __future__ import annotations

from lminf_export.bundle.manifest import Manifest, read_manifest
from lminf_export.bundle.records import MANIFEST_NAME
from lminf_export.checkpoint.source import Source
from lminf_export.errors import BundleError, ModelError


def bundle_notice(source: Source) -> str | None:
    """Return what to tell the user about a model that is a bundle; None for any other model.

    Raises:
        ModelError: the bundle's weights are quantised, or its manifest cannot be read.
    """
    path = source.folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = read_manifest(path.read_bytes(), str(path))
    except (BundleError, OSError) as error:
        raise ModelError(f"model {source.name!r} is a bundle: {error}") from error
    if manifest.quantization is not None:
        kind = manifest.quantization.weights
        raise ModelError(
            f"model {source.name!r} is a bundle of quantised weights ({kind}); give the model it "
            f"was made from: {_origin(manifest)}"
        )
    return (
        f"the model is a bundle, exported from {_origin(manifest)}: its weights are taken as they "
        f"are there, in {manifest.dtype}"
    )


def _origin(manifest: Manifest) -> str:
    source = manifest.source
    adapter = f" and adapter {source.adapter!r}" if source.adapter else ""
    return f"{source.name!r}{adapter}"
