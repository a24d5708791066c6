"""The tables of docs/triton.md."""

from __future__ import annotations

from collections.abc import Callable

from lminf_export.bundle.files import human_bytes
from lminf_export.triton.interface import INPUTS, OUTPUTS
from scripts.docs.tables import load, table

_NAMES = {"demo": "demo Llama, W = 256", "gemma": "Gemma 3 270M, int4, W = 1,024"}


def tensors() -> str:
    """Tensors of the python backend's model."""
    rows = [
        [
            f"`{spec.name}`",
            "in" if spec in INPUTS else "out",
            spec.dtype.removeprefix("TYPE_"),
            f"[{', '.join(map(str, spec.dims))}]",
            spec.meaning,
        ]
        for spec in (*INPUTS, *OUTPUTS)
    ]
    return table(["tensor", "", "type", "shape", "meaning"], rows, numbers=False)


def run() -> str:
    """A run of a real tritonserver."""
    found = load("triton_run")
    streams, sessions, rate = found["streams"], found["sessions"], found["rate"]
    rows = [
        ["clients that stream side by side", str(streams["clients"])],
        [
            "texts and token ids equal to those of the model by itself",
            f"{streams['equal_to_offline']} of {streams['clients']}",
        ],
        [
            "a text written in three requests of a sequence is that of one",
            _yes(sessions["text_in_three_requests_equal"]),
        ],
        ["START begins a sequence anew", _yes(sessions["start_begins_anew"])],
        [
            "sampling as parameters, by gRPC, `generate` and `generate_stream`, gives that text",
            _yes(all(found["parameters"]["equal"].values())),
        ],
        [
            "configurations of the other backends are loaded",
            _yes(all(found["configs"].values())),
        ],
        [
            "a model is unloaded while a gRPC stream that has asked it is open, and behind it",
            f"{_yes(found['unloading']['while_a_stream_is_open'])}, "
            f"{_yes(found['unloading']['behind_it'])}",
        ],
        [
            "the slot of a client that was killed (SIGKILL) is free after",
            f"{found['departure']['free_after_s']:.2f} s, as the metric shows it",
        ],
        [
            "a session goes on after the server's restart, with the same text",
            _yes(found["restart"]["text_equal"]),
        ],
        [
            f"tokens/s of {rate['streams']} streams, over those of the bare engine",
            f"{rate['triton_over_engine']:.2f}",
        ],
    ]
    seen = found["environment"]
    return table(["", ""], rows, numbers=False) + (
        f"\n\n{found['server'].replace('==', ' ')}, tritonclient {found['tritonclient']}, "
        f"onnxruntime {seen['versions']['onnxruntime']}, {seen['device']}, {seen['cores']} cores, "
        "the demo model with one thread. Each response passes between two processes, and the "
        "clients share the cores: a model that takes longer for a step loses less."
    )


def implicit() -> str:
    """The cost of carrying the state."""
    rows, device = [], ""
    for name, found in load("implicit_state")["models"].items():
        device = found["environment"]["device"]
        rows += [
            [
                _NAMES[name],
                str(batch["rows"]),
                f"{batch['step_ms']['runtime']:.2f}",
                f"{batch['step_ms']['carried']:.2f}",
                f"{batch['carried_over_runtime']:.2f}",
                human_bytes(batch["idle_row_bytes"]),
            ]
            for batch in found["batches"]
        ]
    head = ["model", "rows", "runtime, ms", "carried, ms", "ratio", "state of a row, idle or not"]
    return table(head, rows) + f"\n\n{device}, one thread."


def _yes(value: bool) -> str:
    return "yes" if value else "no"


TABLES: dict[str, Callable[[], str]] = {
    "triton_tensors": tensors,
    "triton_run": run,
    "implicit_state": implicit,
}
