"""Stages of onnxruntime_gpu over small models: is it right, with the operator and without?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.gpu.onnxruntime_gpu import ROOT, Run

if TYPE_CHECKING:
    from lminf_export.runtime.options import Provider

LMINF = "from lminf_export.cli.main import main; main()"
# Between two runs of one float32 bundle: largest difference of logits by their range. What an
# export is held to against the unmodified model (export/spot_check.py).
FLOAT32_LIMIT = 1e-3
_LIMITS = {"float32": FLOAT32_LIMIT, "float16": 8 * 2.0**-10, "bfloat16": 8 * 2.0**-7}
# Shapes whose heads the CUDA kernels take: name → layers, heads, key/value heads, head dimension.
SHAPES = {"gqa-64": (3, 8, 2, 64), "mha-128": (2, 3, 3, 128)}
PROMPTS = ("In the beginning", "The sea was", "She said that")
_CHUNKS = (41, 1, 1, 7, 1, 1, 1, 64, *(1,) * 40)


def operator(run: Run) -> list[str]:
    """One node against float64: the function body, and our operator, in float32 and float16."""
    import torch

    from scripts.gpu import onnx_check

    provider = "CUDAExecutionProvider" if run.on_gpu else "CPUExecutionProvider"
    problems = []
    for name, library in (("body", None), ("operator", run.library())):
        limit = onnx_check.KERNEL_RATIO if library else onnx_check.BODY_RATIO
        for dtype in (torch.float32, torch.float16):
            found = onnx_check.errors(provider, library, dtype)
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            run.note(**{label: {"error": found.error, "times_torchs": found.ratio}})
            in_float32 = dtype == torch.float32
            if (found.error > onnx_check.TOLERANCE) if in_float32 else (found.ratio > limit):
                problems.append(f"{label}: error {found.error:.2g}, {found.ratio:.2f} × torch's")
    return problems


def kernels(run: Run) -> list[str]:
    """Models with heads that the kernels take: validated, graph against no graph, in place."""
    import torch

    from benchmarks.support.checkpoints import write_checkpoint

    problems: list[str] = []
    settings = {"window_size": 64, "chunk_size": 32}
    for name, (layers, heads, kv_heads, head_dim) in list(SHAPES.items())[
        : 1 if run.quick else None
    ]:
        shape = {
            "vocab_size": 512, "hidden_size": heads * head_dim, "intermediate_size": 256,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        }  # fmt: skip
        source = run.work / name
        if not (source / "config.json").is_file():
            write_checkpoint(source, shape, torch.float32, 2**20)
        kinds: dict[str, dict[str, Any]] = {
            "float32": {"dtype": "float32"},
            "float16": {"dtype": "float16"},
            "int4": {"dtype": "float16", "quantize": "int4"},
            "int8-cache": {"dtype": "float16", "kv_cache_dtype": "int8"},
        }
        if run.on_gpu:  # onnxruntime has no bfloat16 on a CPU
            kinds["bfloat16"] = {"dtype": "bfloat16"}
        for kind, options in kinds.items():
            bundle = export_to(run, source, f"{name}-{kind}", **settings, **options)
            for which in ("auto", "none"):
                label = f"{name} {kind}, kernels {which}"
                problems += _one_way(run, label, bundle, which)
    return problems


def _one_way(run: Run, label: str, bundle: Path, which: str) -> list[str]:
    from lminf_export import load
    from lminf_export.errors import LminfError
    from lminf_export.verify.validate import validate

    problems = []
    try:
        report = validate(bundle, provider=run.provider, kernels=which)
        if not report.passed:
            problems.append(f"{label}: validation failed")
        model = load(bundle, provider=run.provider, kernels=which)
        plain = load(bundle, provider=run.provider, kernels=which, cuda_graphs=False)
        recorded, enqueued = (_logits_of(m) for m in (model, plain))
    except LminfError as error:
        run.note(**{label: {"error": str(error)}})
        return [f"{label}: {error}"]
    equal = bool(np.array_equal(recorded, enqueued))
    apart = float(np.abs(recorded - enqueued).max() / np.ptp(enqueued))
    moved = _moved_caches(model)
    session: Any = model.session
    run.note(
        **{
            label: {
                "passed": report.passed,
                "errors": {c.name: [c.max_error, c.tolerance] for c in report.comparisons},
                "attention": session.attention,
                "cuda_graph": session.cuda_graph,
                "graph_equals_no_graph": equal,
                "graph_from_no_graph": apart,
                "caches_that_moved": moved,
            }
        }
    )
    if not apart <= _LIMITS[model.bundle.manifest.dtype]:
        problems.append(
            f"{label}: with and without a CUDA graph differ by {apart:.2g} of the range"
        )
    if moved:
        problems.append(f"{label}: caches are not updated in place: {moved[:3]}")
    if run.on_gpu and session.cuda_graph != "yes":
        problems.append(f"{label}: CUDA graph: {session.cuda_graph}")
    return problems


def _logits_of(model: Any) -> np.ndarray:
    """Return the logits (T, 2, V) of two streams, chunks and single tokens mixed."""
    rng = np.random.default_rng(3)
    state, found = model.new_state(2), []
    for width in _CHUNKS:
        tokens = rng.integers(0, model.vocab_size, (2, width))
        found.append(np.array(model.forward(tokens, state, logits="last"))[:, -1])
    return np.stack(found)


def _moved_caches(model: Any) -> list[str]:
    """Return the caches whose past and present, as onnxruntime bound them, are not one address."""
    state = model.new_state(1)
    for _ in range(3):
        model.forward([[1]], state, logits="last")
    call = state._bound.latest
    outputs = dict(
        zip((x.name for x in state.session.get_outputs()), call.binding.get_outputs(), strict=False)
    )
    moved = []
    for cache in state._bound.caches:
        value = getattr(cache, "_value", None) or cache.value
        if outputs[cache.present].data_ptr() != value.data_ptr():
            moved.append(cache.present)
    return moved


def demo(run: Run) -> list[str]:
    """The demo models: validate, bench, and the text that a CPU generates."""
    problems: list[str] = []
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("demo-llama", "float32", {"dtype": "float32"}),
        ("demo-llama", "float16", {"dtype": "float16"}),
        ("demo-llama", "int4", {"dtype": "float16", "quantize": "int4"}),
        ("demo-mpt", "float16", {"dtype": "float16"}),
    ]
    for name, kind, options in kinds[: 2 if run.quick else None]:
        label = f"{name} {kind}"
        bundle = export_to(run, ROOT / "examples" / name, f"{name}-{kind}", **options)
        found: dict[str, Any] = {}
        done = lminf("validate", str(bundle), "--provider", run.provider, "--json")
        if done.returncode:
            problems.append(f"{label}: lminf validate: {(done.stdout + done.stderr)[-300:]}")
        else:
            found["validate"] = json.loads(done.stdout)
        arguments = ["--provider", run.provider, "--decode-tokens", "30", "--json"]
        done = lminf("bench", str(bundle), *arguments, "--prefill-tokens", "512")
        if done.returncode:
            problems.append(f"{label}: lminf bench: {done.stderr.strip()[-300:]}")
        else:
            found["bench"] = json.loads(done.stdout)
        providers: tuple[Provider, ...] = ("cpu", run.provider)
        texts = {p: _texts(bundle, p) for p in dict.fromkeys(providers)}
        pairs = zip(texts["cpu"], texts[run.provider], strict=True)
        found["same_tokens_as_a_cpu"] = [_common(a, b) for a, b in pairs]
        found["text"] = texts[run.provider][0][0]
        found["operators"] = _operators(bundle, run.provider)
        run.note(**{label: found})
        if kind == "float32" and texts["cpu"] != texts[run.provider]:
            same = ", ".join(found["same_tokens_as_a_cpu"])
            problems.append(f"{label}: the text differs from the CPU's: {same} tokens are equal")
        if kind == "int4" and run.on_gpu and not found["operators"].get("MatMulNBits"):
            problems.append(f"{label}: no MatMulNBits ran")
    return problems


def _texts(bundle: Path, provider: Provider) -> list[tuple[str, list[int]]]:
    from lminf_export import load

    model = load(bundle, provider=provider)
    found = []
    for prompt in PROMPTS:
        ids = list(model.generate(model.codec.encode(prompt), max_new_tokens=96))
        found.append((model.codec.tokenizer.decode(ids), ids))
    return found


def _common(left: tuple[str, list[int]], right: tuple[str, list[int]]) -> str:
    pairs = zip(left[1], right[1], strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(left[1]))
    return f"{same} of {len(left[1])}"


def _operators(bundle: Path, provider: Provider) -> dict[str, float]:
    """Return operator → calls in a decoding step, by onnxruntime's profile."""
    from lminf_export.bench.profile import profile_decoding
    from lminf_export.bundle.folder import Bundle

    rows = profile_decoding(Bundle.open(bundle), 1000, 5, provider, None, "auto")
    return {row.kind: row.calls_per_step for row in rows}


def twin(run: Run) -> list[str]:
    """A stream read to position 1,000,000, and another that read only its beginning and its end.

    Behind a warm-up nothing before it is in any layer's reach but the sinks, which both have; the
    operator sees distances only, so both must give the same logits at positions a million apart.
    """
    from lminf_export import load

    end, compared = (40_000, 300) if run.quick or not run.on_gpu else (1_000_000, 2_000)
    bundle = export_to(run, ROOT / "examples" / "demo-llama", "demo-llama-float32", dtype="float32")
    model = load(bundle, provider=run.provider)
    layers = model.bundle.manifest.contract.layers
    reach = 1 + sum(layer.window_size - 1 for layer in layers)
    near = max(layer.window_size + layer.num_sink_tokens for layer in layers)
    text = (ROOT / "examples" / "demo-llama" / "heldout.txt").read_text(encoding="utf-8")
    ids = np.array(model.codec.encode(text))
    ids = np.resize(ids, end + compared)
    far, short = model.new_state(), model.new_state()
    model.forward(ids[None, :end], far, logits="none")
    model.forward(ids[None, :near], short, logits="none")
    model.forward(ids[None, end - reach : end], short, logits="none")
    largest = spread = 0.0
    same = 0
    for token in ids[end:]:
        a, b = (np.array(model.forward([[token]], s, logits="last"))[0, 0] for s in (far, short))
        largest = max(largest, float(np.abs(a - b).max()))
        spread = max(spread, float(np.ptp(a)))
        same += int(a.argmax() == b.argmax())
    run.note(
        positions=[int(far.past_length[0]), int(short.past_length[0])],
        tokens_compared=compared,
        largest_difference=largest,
        range_of_logits=spread,
        same_argmax=same / compared,
        cuda_graph=getattr(model.session, "cuda_graph", None),
    )
    if not largest <= FLOAT32_LIMIT * spread:
        return [f"logits differ by {largest:.2g} of a range of {spread:.2g}"]
    return []


def export_to(run: Run, source: Path, name: str, **options: Any) -> Path:
    """Export a model into the work folder unless that was done; return the bundle."""
    import lminf_export

    bundle = run.work / "bundles" / name
    if not (bundle / "lminf.json").is_file():
        bundle.parent.mkdir(parents=True, exist_ok=True)
        lminf_export.export(source, bundle, force=True, **options)
    return bundle


def lminf(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command lminf with this interpreter."""
    command: Sequence[str] = [sys.executable, "-c", LMINF, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
