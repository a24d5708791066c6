"""From a bundle on disk to a language model."""

from __future__ import annotations

from pathlib import Path

from lminf_export.bundle.folder import Bundle, Verify
from lminf_export.bundle.hub import find_bundle
from lminf_export.bundle.trust import require_trust
from lminf_export.errors import SessionError, shown
from lminf_export.operator.settings import require_one_of
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.memory import require_memory
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession
from lminf_export.runtime.options import PROVIDERS, Provider
from lminf_export.runtime.session import Session


def load(
    path: str | Path,
    *,
    provider: Provider = "cpu",
    threads: int | None = None,
    cuda_graphs: bool = True,
    kernels: str | Path = AUTO,
    verify: Verify = "fast",
    trust_plan: bool | str = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> LanguageModel:
    """Load a bundle.

    Args:
        path: the bundle's folder or a file in it. Its plan is run by TensorRT, on a GPU;
            anything else means its graph, run by onnxruntime. Text such as "org/name", where
            there is no such folder, is a bundle on the Hugging Face hub, fetched into its cache.
        provider: "cpu" or "cuda", for onnxruntime.
        threads: threads of one operator in onnxruntime; its own choice by default.
        cuda_graphs: on a GPU: play single tokens from a CUDA graph. A plan without the plugin
            has none; a graph says in `session.cuda_graph` whether onnxruntime could.
        kernels: what computes Λ-attention in onnxruntime: "auto" takes the library built and
            installed with this package, if any, "none" the graph's own function body, anything
            else is a library's path. A library is code that runs: name only one you trust.
        verify: "fast" hashes what decides what runs and checks the sizes of the weights;
            "full" hashes every file.
        trust_plan: a plan is code, and so is the library beside it. One that was not exported
            or added by this user runs after True, or the SHA-256 of its manifest, was given
            once; SECURITY.md says where that is remembered. A graph needs no trust.
        revision: branch, tag or commit of a bundle on the hub.
        cache_dir: folder in which the hub's files are kept.

    Raises:
        BundleError: the bundle is missing, incomplete or altered, or the hub cannot be reached.
        SessionError: graph or plan cannot run here, nobody trusts the plan, or the caches exceed
            this machine's memory, or an argument is none of its values.
    """
    if not isinstance(trust_plan, bool | str):
        raise SessionError(f"trust_plan={shown(trust_plan)}: must be True, False or a SHA-256")
    if not isinstance(cuda_graphs, bool):
        raise SessionError(f"cuda_graphs={shown(cuda_graphs)}: must be True or False")
    require_one_of("provider", provider, PROVIDERS, SessionError)
    path = find_bundle(path, revision=revision, cache_dir=cache_dir)
    bundle = Bundle.open(path, verify)
    session: Session
    if names_plan(path, bundle):
        require_trust(bundle, trust_plan)
        from lminf_export.runtime.tensorrt import TensorRTSession

        session = TensorRTSession(bundle, cuda_graphs=cuda_graphs)
        return LanguageModel(bundle, session)
    if provider == "cpu":
        require_memory(bundle.manifest, None, batch_size=1)
    session = OnnxRuntimeSession(
        bundle, provider=provider, threads=threads, kernels=kernels, cuda_graphs=cuda_graphs
    )
    return LanguageModel(bundle, session)


def names_plan(path: str | Path, bundle: Bundle) -> bool:
    """Return whether a path names a bundle's plan; otherwise it names what its graph stands for.

    Args:
        path: the bundle's folder or a file in it.
        bundle: opened from it.

    Raises:
        SessionError: it is a plan or a graph that is not run.
    """
    if bundle.plan_path is not None and _is_same_file(path, bundle.plan_path):
        return True
    if Path(path).suffix == ".plan":
        raise SessionError(f"{path} is not the plan of this bundle; it has {bundle.plan_path}")
    if Path(path).suffix == ".onnx" and not _is_same_file(path, bundle.graph_path):
        raise SessionError(
            f"{path} is not the graph that onnxruntime runs; name the bundle's folder or "
            f"{bundle.graph_path}"
        )
    return False


def _is_same_file(left: str | Path, right: Path) -> bool:
    return Path(left).resolve() == right.resolve()
