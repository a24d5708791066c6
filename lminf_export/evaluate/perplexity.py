"""Perplexity by position of a bundle and of the methods it is compared with, on one text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lminf_export.bundle.folder import Bundle
from lminf_export.evaluate.buckets import Bucket, log_buckets
from lminf_export.evaluate.perplexity_options import LAMBDA, Options
from lminf_export.evaluate.perplexity_reading import read_recomputing, read_with
from lminf_export.evaluate.perplexity_result import make_result
from lminf_export.evaluate.resume_file import ResumeFile
from lminf_export.evaluate.scorers import BundleScorer, Scorer
from lminf_export.evaluate.text import TokenStream, read_stream
from lminf_export.progress import Progress, silent
from lminf_export.runtime.kernels import AUTO
from lminf_export.runtime.load import load
from lminf_export.runtime.options import Provider


def evaluate_perplexity(
    bundle: str | Path,
    files: Sequence[str | Path],
    *,
    max_tokens: int | None = None,
    repeat: bool = False,
    start_tokens: bool = True,
    options: Options | None = None,
    state_file: str | Path | None = None,
    provider: Provider = "cpu",
    threads: int | None = None,
    kernels: str | Path = AUTO,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Stream texts through a bundle and return its perplexity by context length.

    Args:
        bundle: the bundle's folder.
        files: UTF-8 texts, read one after the other as one stream.
        max_tokens: where to stop; the end of the text by default.
        repeat: read the text again and again until max_tokens.
        start_tokens: whether the tokenizer's start tokens come first.
        options: comparisons and their settings.
        state_file: save progress there, and resume from it.
        provider: onnxruntime's provider.
        threads: threads of one operator, in onnxruntime and torch.
        kernels: what computes Λ-attention in onnxruntime: see `load`.
        progress: called with each phase and its fraction.

    Returns:
        The result as JSON can hold it: buckets, and for each method its perplexities.

    Raises:
        InputError: a text or a setting that cannot be used.
        BundleError: the bundle is damaged, or has no tokenizer.
    """
    options = options or Options()
    opened = Bundle.open(bundle)
    model = load(bundle, provider=provider, threads=threads, kernels=kernels)
    progress("tokenizing", None)
    stream = read_stream(
        model.codec, files, max_tokens=max_tokens, repeat=repeat, start_tokens=start_tokens
    )
    resume = ResumeFile.open(
        None if state_file is None else Path(state_file),
        {
            "bundle": opened.manifest.manifest_sha256,
            "text": stream.sha256,
            "start tokens": stream.num_start_tokens,
            "repetition": repeat,
            "model": options.model or "",
            **({"runs": "plan"} if Path(bundle).suffix == ".plan" else {}),
        },
    )
    buckets = log_buckets(
        len(stream.ids), opened.manifest.training_length, options.buckets_per_octave
    )
    with ExitStack() as stack:
        stack.callback(resume.save)
        read_with(LAMBDA, BundleScorer(model), stream, resume, None, progress)
        if options.compare:
            _compare(opened, stream, buckets, resume, options, threads, progress)
    result = make_result(opened, stream, buckets, resume, options, repeat)
    return {**result, "attention": model.session.attention}


def _compare(
    bundle: Bundle,
    stream: TokenStream,
    buckets: list[Bucket],
    resume: ResumeFile,
    options: Options,
    threads: int | None,
    progress: Progress,
) -> None:
    import torch

    from lminf_export.evaluate import torch_scorers

    if threads is not None:
        torch.set_num_threads(threads)

    progress("loading the model in torch", None)
    torch_model = torch_scorers.TorchModel(
        bundle, options.model, trust_remote_code=options.trust_remote_code
    )
    makers: dict[str, Callable[[torch_scorers.TorchModel], Scorer]] = {
        "stock": torch_scorers.stock_scorer,
        "window": torch_scorers.window_scorer,
        "streaming": torch_scorers.streaming_scorer,
        "reference": torch_scorers.ReferenceScorer,
    }
    for name in dict.fromkeys(options.compare):
        if name == "recompute":
            read_recomputing(torch_model, stream, buckets, resume, options, progress)
        else:
            scorer = makers[name](torch_model)
            read_with(name, scorer, stream, resume, options.budget_seconds, progress)
