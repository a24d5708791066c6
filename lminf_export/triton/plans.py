"""Plans that a model of Triton may run: by our runtime, or by Triton's TensorRT backend."""

from __future__ import annotations

from lminf_export.bundle.folder import Bundle
from lminf_export.bundle.manifest import Manifest
from lminf_export.bundle.trust import is_trusted, remember, require_hash
from lminf_export.engine.options import TENSORRT
from lminf_export.errors import InputError
from lminf_export.operator.bindings import BATCH


def require_runnable(bundle: Bundle, slots: int, trust_hash: str | None) -> None:
    """Check that a bundle's plan may run here, and takes as many sequences.

    A plan and its library are code: they go into a repository only where `load` would run them.

    Args:
        bundle: opened; it has a plan.
        slots: sequences side by side.
        trust_hash: SHA-256 that somebody vouched for, or None.

    Raises:
        InputError: nobody trusts the plan, or it takes fewer sequences.
        SessionError: the hash is of another bundle.
    """
    manifest = bundle.manifest
    assert manifest.engine is not None, "asked for bundles with a plan"
    if trust_hash is not None:
        require_hash(bundle, trust_hash)
        remember(manifest)
    elif not is_trusted(manifest):
        raise InputError(
            f"{manifest.engine.file} is code, and this bundle was not exported here: if you trust "
            "who made it, give the manifest_sha256 they published: --parameter trust_hash=SHA256"
        )
    most = min(profile[BATCH][2] for profile in manifest.engine.profiles)
    if slots > most:
        raise InputError(
            f"slots={slots}: {manifest.engine.file} takes at most {most}; give fewer, or build it "
            "with a larger --max-batch-size"
        )


def why_not_tensorrt_backend(manifest: Manifest) -> str | None:
    """Return why Triton's TensorRT backend cannot run a plan, or would run it wrongly; else None.

    That backend binds every input and every output to memory of its own. A plan that updates a
    cache in place needs one buffer for both.
    """
    engine = manifest.engine
    assert engine is not None, "asked for bundles with a plan"
    if engine.builder != TENSORRT:
        return (
            f"{engine.file} was built by {engine.builder}, and Triton's TensorRT backend loads "
            f"plans of {TENSORRT} only"
        )
    in_place = updated_in_place(manifest)
    if in_place:
        return (
            f"{engine.file} updates {len(in_place)} caches in place ({in_place[0]}, ...), but "
            "Triton's TensorRT backend gives each tensor its own memory"
        )
    return None


def updated_in_place(manifest: Manifest) -> list[str]:
    """Return the caches whose past and present a plan needs in one buffer, by their past names.

    Rings are, in every plan; sinks where the plan's record says so.
    """
    assert manifest.engine is not None, "asked for bundles with a plan"
    contract = manifest.contract
    sinks = contract.sink_updates() if manifest.engine.sinks_in_place else {}
    return [*contract.ring_updates(), *sinks]
