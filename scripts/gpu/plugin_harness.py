"""The TensorRT plugin's whole life, played by plugin_harness, against the float64 mathematics.

    python -m scripts.gpu.plugin_harness --harness build/plugins/plugin_harness \\
        --plugin build/plugins/liblminf_tensorrt.so --device cuda [--graph]

prints one line of JSON and ends with 0 if every stream is right:
    {"ok": true, "device": "cuda", "streams": 9, "worst_ratio": 1.1, "problems": []}
`worst_ratio` is the largest error in units of torch's error in the same precision.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.support.operator_case import Case, History, shared_inputs
from lminf_export.operator import contract, reference
from scripts.gpu.check import Outcome, Stream, same_precision

MAX_RATIO = 2.0  # the error allowed, in units of torch's in the same precision
_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_SMALL = Case(window_size=13, num_sink_tokens=5, chunk_size=7, head_dim=64, rotary_dim=64)
_FEW_STEPS = ((1, 1, 1), (1, 0, 1), (3, 1, 2))
_STEPS = ((1, 1, 1), (7, 3, 0), (1, 0, 1), (5, 7, 2), *[(1, 1, 1)] * 3, (7, 7, 7), (2, 7, 4)) * 2


def streams() -> list[Stream]:
    """Several laps of the ring in both profiles, odd chunks, every kind of layer."""
    bases = (0, 10**6 + 3, 2 * 10**8)
    cases = {
        "half_rotation": (_SMALL, torch.float16),
        "interleaved": (_SMALL.with_(interleaved=True, rotary_dim=20), torch.bfloat16),
        "alibi": (_SMALL.with_(rotary_dim=0, alibi=True), torch.float32),
        "everything": (
            _SMALL.with_(softcap=3.0, sink_logits=True, distance_limit=51, head_dim=80),
            torch.float16,
        ),
        "demo_heads": (_SMALL.with_(head_dim=32, rotary_dim=32), torch.float16),
        "no_sinks": (_SMALL.with_(num_sink_tokens=0), torch.float16),
        "more_sinks_than_window": (
            _SMALL.with_(num_sink_tokens=53, window_size=11),
            torch.bfloat16,
        ),
    }
    long = _SMALL.with_(window_size=1511, chunk_size=3, num_heads=4)
    split = Stream("split_keys-in place", long, (10**9, 700, 5), _FEW_STEPS, torch.float16)
    every = [
        Stream(f"{name}-{where}", case, bases, _STEPS, dtype, in_place=where == "in place")
        for name, (case, dtype) in cases.items()
        for where in ("in place", "apart")
    ]
    rounded = [
        replace(stream, name=f"int8_{stream.name}", int8_rings=True)
        for stream in (split, *every)
        if stream.dtype != torch.float32
    ]
    return [split, *every, *rounded]


@dataclass
class Reply:
    """The harness's answer and the errors of its outputs.

    Attributes:
        json: its line.
        outcome: errors against float64; empty if the plugin failed.
    """

    json: dict[str, Any]
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def problems(self) -> list[str]:
        """Everything that was wrong, in words."""
        if not self.json["ok"]:
            messages = "; ".join(self.json["messages"])
            return [f"{self.json['stage']}: {self.json['what']} ({messages})"]
        found = list(self.outcome.problems)
        if self.outcome.ratio > MAX_RATIO:
            found.append(f"the error is {self.outcome.ratio:.2f} times torch's")
        return found


@dataclass(frozen=True)
class Harness:
    """The built harness and the plugin it plays with.

    Attributes:
        binary: plugin_harness.
        plugin: liblminf_tensorrt.so.
        device: "cpu" or "cuda".
        graph: record every step in a CUDA graph.
    """

    binary: Path
    plugin: Path
    device: str = "cpu"
    graph: bool = False

    def play(
        self, folder: Path, *, apart: bool = False, misaligned: bool = False
    ) -> dict[str, Any]:
        """Run the case in a folder; returns the harness's line."""
        words = [str(self.binary), "--plugin", str(self.plugin), "--case", str(folder)]
        words += ["--device", self.device, *["--apart"] * apart, *["--graph"] * self.graph]
        words += ["--misaligned"] * misaligned
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        try:
            return json.loads(done.stdout)  # type: ignore[no-any-return]
        except json.JSONDecodeError:
            what = f"ended with status {done.returncode}"
            return {"ok": False, "stage": "crash", "what": what, "messages": [done.stderr[-500:]]}

    def run(self, stream: Stream, folder: Path) -> Reply:
        """Play a stream and compare every step."""
        feed = Feed(stream)
        feed.write(folder)
        reply = Reply(self.play(folder, apart=not stream.in_place))
        if reply.json["ok"]:
            feed.compare(folder, reply.outcome)
        return reply


class Feed:
    """A stream as the harness reads it, and what must come of it."""

    def __init__(self, stream: Stream) -> None:
        case, rings = stream.case, stream.rings
        length = max(sum(chunk[row] for chunk in stream.chunks) for row in range(len(stream.bases)))
        history = History(case, list(stream.bases), length, stream.dtype)
        self.stream, self.truth = stream, history.oracle()
        self.input_names = contract.input_names(int8_cache=stream.int8_rings)
        self.output_names = contract.output_names(int8_cache=stream.int8_rings)
        self.steps: list[list[Tensor]] = []
        self.expected: list[tuple[Tensor, ...]] = []
        past, caches = torch.tensor(stream.bases), rings.caches(history, case.capacity)
        for chunk in stream.chunks:
            new, width = torch.tensor(chunk), max(1, *chunk)
            shared = shared_inputs(case, past, new, width, case.capacity)
            state = (*history.chunk(past, new, width), *caches[:4], *shared, *caches[4:])
            inputs = [x.contiguous() for x in state]
            self.steps.append(inputs)
            self.expected.append(rings.expected(case, inputs))
            caches = list(self.expected[-1][1:])
            if not case.num_sink_tokens:
                caches[2:4] = inputs[5:7]
            past = past + new

    def write(self, folder: Path) -> None:
        """Write case.txt and the inputs of every step."""
        rows, widest = len(self.stream.bases), self.stream.case.chunk_size
        lines = [
            *(_attribute(name, value) for name, value in self.stream.case.attributes().items()),
            f"type {_TYPES[self.stream.dtype]}",
            *["rings int8"] * self.stream.int8_rings,
            f"profile 1 {rows} {rows} 1 1 1",
            f"profile 1 {rows} {rows} 1 {widest} {widest}",
        ]
        for number, inputs in enumerate(self.steps):
            lines.append(f"step {int(inputs[0].shape[2] > 1)}")
            carried = {self.input_names[place] for place in self.stream.rings.places}
            for name, tensor in zip(self.input_names, inputs, strict=True):
                lines.append(f"tensor {name} {' '.join(map(str, tensor.shape))}")
                if name not in carried or number == 0:
                    path = folder / f"{number}.{name}.bin"
                    path.write_bytes(tensor.view(torch.uint8).numpy().tobytes())
        (folder / "case.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def compare(self, folder: Path, outcome: Outcome) -> None:
        """Compare the outputs of every step, and the caches wherever a later query looks."""
        for number, (inputs, expected) in enumerate(zip(self.steps, self.expected, strict=True)):
            past, new = inputs[7], inputs[8]
            output = self._read(folder, number, "output", inputs[0])
            self._compare_output(number, output, expected, outcome)
            for name, want in zip(self.output_names[1:], expected[1:], strict=True):
                if "sink" in name and not self.stream.case.num_sink_tokens:
                    continue
                got = self._read(folder, number, name, want)
                if not self._same_cache(name, got, want, past + new):
                    outcome.problems.append(f"step {number}: {name} differs")

    def _compare_output(
        self, number: int, output: Tensor, expected: tuple[Tensor, ...], outcome: Outcome
    ) -> None:
        past, new = self.steps[number][7], self.steps[number][8]
        of_step = self.stream.rings.truth(self.stream.case, self.steps[number], list(expected))
        torch_output = expected[0]
        if of_step is not None:
            present = self.stream.rings.in_model_type(expected, self.stream.dtype)
            inputs = self.steps[number]
            torch_output = same_precision(self.stream.case, inputs, [torch_output, *present])
        if not torch.isfinite(output).all():
            outcome.problems.append(f"step {number}: the output is not finite")
        for row, base in enumerate(self.stream.bases):
            count, start = int(new[row]), int(past[row]) - base
            if not count:
                continue
            truth = self.truth[row, :, start : start + count]
            if of_step is not None:  # over what the rings hold
                truth = of_step[row, :, :count]
            found = (output, torch_output)
            errors = [(x[row, :, :count].double() - truth).abs().max() for x in found]
            outcome.error = max(outcome.error, float(errors[0]))
            outcome.torch_error = max(outcome.torch_error, float(errors[1]))

    def _same_cache(self, name: str, got: Tensor, want: Tensor, total: Tensor) -> bool:
        """Equal up to one unit in the last place, where a query at or after `total` may look.

        Of int8 it is one step, since a rounding next to a tie falls to either side.
        """
        positions = reference.slot_positions(total, torch.zeros_like(total), want.shape[2])
        live = positions > (total - self.stream.case.window_size)[:, None]
        live &= positions >= 0
        if "sink" in name:
            live = torch.arange(want.shape[2]) < total[:, None]
        unit = torch.ones(())
        if want.dtype != torch.int8:
            unit = torch.finfo(want.dtype).eps * want.abs().float() + 1e-7
        near = (got.float() - want.float()).abs() <= unit
        return bool((near | ~live[:, None, :, None]).all())

    def _read(self, folder: Path, number: int, name: str, like: Tensor) -> Tensor:
        content = bytearray((folder / f"{number}.{name}.bin").read_bytes())
        return torch.frombuffer(content, dtype=like.dtype).view(like.shape)


def _attribute(name: str, value: float) -> str:
    kind = "float" if isinstance(value, float) else "int"
    return f"{kind} {name} {value!r}" if kind == "float" else f"{kind} {name} {int(value)}"


def main() -> int:
    """Play every stream; print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--harness", type=Path, required=True)
    parser.add_argument("--plugin", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--graph", action="store_true")
    arguments = parser.parse_args()
    harness = Harness(
        arguments.harness, arguments.plugin.resolve(), arguments.device, arguments.graph
    )
    worst, problems, played = 0.0, [], streams()
    for stream in played:
        with tempfile.TemporaryDirectory() as folder:
            reply = harness.run(stream, Path(folder))
        worst = max(worst, reply.outcome.ratio)
        problems += [f"{stream.name}: {problem}" for problem in reply.problems]
    line = {"ok": not problems, "device": arguments.device, "graph": arguments.graph}
    print(json.dumps({**line, "streams": len(played), "worst_ratio": worst, "problems": problems}))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
