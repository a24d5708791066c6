"""Prefill and decoding of a model in a GGUF file beside llama.cpp, at several numbers of threads.

llama.cpp reads the file itself, and its weights in float32, which are written from it; ours are
bundles exported from it. Contestants take turns. Whatever is not given is left out and named.

    python -m benchmarks.peers.gguf_race --work FOLDER --gguf model-q4_k_m.gguf \
        --fp32 BUNDLE --int4 BUNDLE --threads 1 2 --out benchmarks/results/gguf_race.json

Where llama-cpp-python has an environment of its own, LMINF_LLAMA_PYTHON names its Python.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers import race
from benchmarks.support.result import write_result
from lminf_export.bench.floor import cache_bytes_per_step, weight_bytes_per_step
from lminf_export.bundle.folder import Bundle

GROUPS = {
    "fp32": ("llama.cpp f32", "ours fp32"),
    "quantized": ("llama.cpp q4_k_m", "ours int4"),
}
NAMES = [name for group in GROUPS.values() for name in group]


def prepare(arguments: argparse.Namespace) -> None:
    """Put what was given where contestants look for it."""
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    for name in ("ours-fp32", "ours-int4", "llama-q4_k_m.gguf"):
        (work / name).unlink(missing_ok=True)
    for name, given in (
        ("ours-fp32", arguments.fp32),
        ("ours-int4", arguments.int4),
        ("llama-q4_k_m.gguf", arguments.gguf),
    ):
        if given is not None and given.exists():
            (work / name).symlink_to(given.resolve())
    whole = work / "llama-f32.gguf"
    if arguments.gguf is not None and arguments.gguf.is_file() and not whole.exists():
        partial = work / "partial.gguf"
        write_float32(arguments.gguf, partial)
        partial.rename(whole)


def write_float32(source: Path, to: Path) -> None:
    """Write a GGUF file's weights in float32, with all else it holds."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(source)
    kept = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    writer = GGUFWriter(to, kept.pop("general.architecture").contents())
    for key, field in kept.items():
        if key == "general.file_type":
            writer.add_file_type(0)
        elif field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        writer.add_tensor(
            tensor.name, dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype("f4")
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measured(threads: int, group: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One group at one number of threads."""
    peer, ours = GROUPS[group]
    settings = argparse.Namespace(
        **{**vars(arguments), "threads": threads},
        contestants=[peer, ours],
        peers_at_once=None,
        read_limit=max(arguments.contexts),
    )
    found: dict[str, Any] = {
        "prefill": race.prefill([peer, ours], settings),
        "decode": race.decode([peer, ours], settings),
    }
    times = [found["prefill"]["rows"][name].get("turns_seconds") for name in (peer, ours)]
    if all(times):
        pairs = zip(*times, strict=True)
        found["prefill"]["ours_against_llama_cpp"] = round(
            statistics.median(a / b for a, b in pairs), 3
        )
    precision = ours.removeprefix("ours ")
    if (arguments.work / f"ours-{precision}").exists():
        bundle = Bundle.open(arguments.work / f"ours-{precision}")
        found["decode"]["share_of_streaming_bandwidth"] = {
            context: share_of_bandwidth(
                weight_bytes_per_step(bundle, 1) + cache_bytes_per_step(bundle, int(context)),
                found["decode"]["turns_bandwidth_bytes_per_second"][context],
                cell["turns_ms"],
            )
            for context, cell in found["decode"]["rows"][ours].items()
            if "turns_ms" in cell
        }
    return found


def share_of_bandwidth(size: int, streamed: list[float], milliseconds: list[float]) -> float:
    """Return the part of a step that streaming its bytes takes, median of the rounds' shares.

    Args:
        size: bytes of a step.
        streamed: bytes a second that memory yielded in each round.
        milliseconds: of a step in each round.
    """
    rounds = zip(streamed, milliseconds, strict=True)
    return round(statistics.median(size / rate * 1e3 / ms for rate, ms in rounds), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="for links and llama-f32.gguf")
    parser.add_argument("--gguf", type=Path, help="the model, quantised")
    parser.add_argument("--fp32", type=Path, help="a bundle of it in float32")
    parser.add_argument("--int4", type=Path, help="a bundle of it in int4")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--prefill-tokens", type=int, default=2048)
    parser.add_argument("--prefill-rounds", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prepare(arguments)
    bundles = {name: arguments.work / f"ours-{name}" for name in ("fp32", "int4")}
    result = {
        "benchmark": "gguf_race",
        "model": arguments.gguf.name if arguments.gguf is not None else None,
        "bundles": {
            name: {
                "lambda_config": manifest.lambda_config.model_dump(),
                "quantization": manifest.quantization and manifest.quantization.description,
            }
            for name, path in bundles.items()
            if path.exists()
            for manifest in (Bundle.open(path).manifest,)
        },
        "threads": {
            str(threads): {group: measured(threads, group, arguments) for group in GROUPS}
            for threads in arguments.threads
        },
        **race.environment_with_peers(),
    }
    print(f"raced at {arguments.threads} threads", file=sys.stderr)
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
