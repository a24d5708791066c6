"""The gain of the CPU kernel over the graph's function body, in one run, taking turns.

The same bundle is loaded with `kernels="none"` and `kernels="auto"`, and once for each slower
instruction set this processor has, which the kernel can be told to use. Decoding positions are
set, not read: rings hold random numbers. With --genai a model folder of onnxruntime-genai made
from the same checkpoint takes its turns, too (as far as it goes); with --before a library of other
sources, such as those before a change, on the same instruction sets.

    python -m benchmarks.kernels.cpu_kernel --bundle B --out benchmarks/results/cpu_kernel.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import lminf_export
from benchmarks.support.result import write_result
from benchmarks.support.stream import Stream
from lminf_export.bench.floor import streaming_bandwidth
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.environment import environment
from lminf_export.runtime.kernels import INSTALLED
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.onnxruntime import OnnxRuntimeSession

INSTRUCTION_SETS = ("avx512", "avx2", "portable")  # fastest first
STEPS = 6  # tokens decoded in one go before the next contestant's turn


class Kernels:
    """A library of kernels and the instruction set it is to use; no library: the body."""

    def __init__(self, path: Path | None, instruction_set: str = "") -> None:
        self.path, self.instruction_set = path, instruction_set

    @property
    def option(self) -> str:
        """The value of `kernels` for `load`."""
        return "none" if self.path is None else str(self.path)

    def use(self) -> bool:
        """Choose the instruction set; a library has one at a time. False: not on this processor."""
        if self.path is None:
            return True
        library = ctypes.CDLL(str(self.path))
        return bool(library.lminfUseInstructionSet(self.instruction_set.encode()))


def forms(before: Path | None) -> dict[str, Kernels]:
    """Name every form of the operator: the body, the kernel, the kernel on slower vectors."""
    found = {"function_body": Kernels(None)}
    libraries = {"kernel": INSTALLED, **({"before": before.resolve()} if before else {})}
    for name, path in libraries.items():
        sets = [x for x in INSTRUCTION_SETS if Kernels(path, x).use()]
        for rank, instruction_set in enumerate(sets):
            key = name if rank == 0 else f"{name}_{instruction_set}"
            found[key] = Kernels(path, instruction_set)
    return found


class Ours(Stream):
    """One form of the bundle.

    Instruction sets of one library share a loaded model: where its memory lies is a matter of
    luck, worth some percent.
    """

    def __init__(self, model: LanguageModel, kernels: Kernels) -> None:
        super().__init__(model, ready=kernels.use)
        self.kernels = kernels

    @property
    def attention(self) -> str:
        """The name of the attention's implementation."""
        library = self.kernels.instruction_set
        return f"liblminf_ort.so ({library})" if library else self.model.session.attention


class Genai:
    """onnxruntime-genai reads a prompt of that length and goes on."""

    def __init__(self, folder: str, threads: int, longest: int) -> None:
        import onnxruntime_genai as genai

        self.genai, self.longest = genai, longest
        with tempfile.TemporaryDirectory() as temporary:
            config = json.loads((Path(folder) / "genai_config.json").read_text())
            decoder = config["model"]["decoder"]
            decoder["session_options"]["intra_op_num_threads"] = threads
            for source in Path(folder).iterdir():
                (Path(temporary) / source.name).symlink_to(source.resolve())
            (Path(temporary) / "genai_config.json").unlink()
            (Path(temporary) / "genai_config.json").write_text(json.dumps(config))
            # External data must not leave its folder by a link: a hard link stays inside.
            data = Path(temporary) / f"{decoder['filename']}.data"
            data.unlink()
            data.hardlink_to((Path(folder) / data.name).resolve())
            self.model = genai.Model(temporary)

    def _generator(self, count: int) -> Any:
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.longest + 1024, do_sample=False)
        generator = self.genai.Generator(self.model, parameters)
        generator.append_tokens(np.random.default_rng(0).integers(3, 999, count).tolist())
        generator.generate_next_token()
        return generator

    def stand_at(self, position: int) -> None:
        self.generator = self._generator(position - 1)

    def decode(self, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            self.generator.generate_next_token()
        return (time.perf_counter() - start) / count

    def prefill(self, count: int) -> float:
        start = time.perf_counter()
        self._generator(count)
        return count / (time.perf_counter() - start)


def nodes_of_a_step(bundle: str, kernels: str) -> dict[str, int]:
    """How often each kind of operator runs in one decoding step."""
    with tempfile.TemporaryDirectory() as folder:
        session = OnnxRuntimeSession(
            Bundle.open(bundle), threads=1, kernels=kernels, profile=Path(folder) / "p"
        )
        one, zero = np.ones(1, np.int64), np.zeros((1, 1), np.int64)
        session.step(session.new_state(1), zero, one, zero)
        events = json.loads(session.end_profiling().read_text())
    names = [e["args"]["op_name"] for e in events if e.get("name", "").endswith("kernel_time")]
    return dict(Counter(names).most_common())


def compare(contestants: dict[str, Any], position: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a token at one position, taking turns, and ratios of each round."""
    for one in contestants.values():
        one.stand_at(position)
        one.decode(2)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, one in contestants.items():
            times[name].append(one.decode(STEPS) * 1e3)
    row: dict[str, Any] = {"position": position, "rounds": rounds}
    for name, found in times.items():
        row[name] = {
            "ms_per_token": round(statistics.median(found), 3),
            "best": round(min(found), 3),
            "times_the_kernels": round(
                statistics.median(a / b for a, b in zip(found, times["kernel"], strict=True)), 3
            ),
        }
    print(row, file=sys.stderr)
    return row


def prefill_speeds(contestants: dict[str, Any], count: int, rounds: int) -> dict[str, float]:
    """Tokens a second of reading a prompt, taking turns."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, one in contestants.items():
            found[name].append(one.prefill(count))
    return {name: round(statistics.median(speeds), 1) for name, speeds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--genai", help="model folder of onnxruntime-genai, same checkpoint")
    parser.add_argument("--before", type=Path, help="another build of liblminf_ort.so")
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 2048, 4096, 1_000_000])
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--prefill-rounds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    shapes = forms(arguments.before)
    models = {
        option: lminf_export.load(arguments.bundle, kernels=option, threads=arguments.threads)
        for option in dict.fromkeys(kernels.option for kernels in shapes.values())
    }
    contestants: dict[str, Any] = {
        name: Ours(models[kernels.option], kernels) for name, kernels in shapes.items()
    }
    attention = {name: one.attention for name, one in contestants.items()}
    reached = 2 * bundle.manifest.lambda_config.window_size
    if arguments.genai:
        longest = max(p for p in arguments.positions if p <= reached)
        contestants["onnxruntime_genai"] = Genai(arguments.genai, arguments.threads, longest)
    prefill = prefill_speeds(contestants, arguments.prefill, arguments.prefill_rounds)
    rows = []
    for position in arguments.positions:
        present = {n: c for n, c in contestants.items() if n in shapes or position <= reached}
        rows.append(compare(present, position, arguments.rounds))
    result = {
        "benchmark": "cpu_kernel",
        "model": bundle.manifest.source.name,
        "parameters_bytes": sum(
            bundle.manifest.files[name].bytes for name in bundle.manifest.files_of("weights")
        ),
        "lambda_config": bundle.manifest.lambda_config.model_dump(),
        "dtype": bundle.manifest.dtype,
        "threads": arguments.threads,
        "attention": attention,
        "bandwidth_bytes_per_second": streaming_bandwidth(arguments.threads),
        "prefill_tokens": arguments.prefill,
        "prefill_tokens_per_second": prefill,
        "decode": rows,
        "nodes_of_a_step": {
            name: nodes_of_a_step(arguments.bundle, shapes[name].option)
            for name in ("function_body", "kernel")
        },
        **environment(),
    }
    if arguments.genai:
        result["versions"]["onnxruntime-genai"] = version("onnxruntime-genai")
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
