"""A conversation that moves between two servers: time, bytes, and whether it goes on unchanged.

    python -m benchmarks.scaling.session_moves --bundle BUNDLE \\
        --out benchmarks/results/session_moves.json

Two `lminf serve` share a folder. `moves`: a turn that is answered by the server that answered the
one before, beside a turn answered by the other, by turns in pairs; what the second costs more is
the move: it finds the latest turn, reads the object, checks its seal and takes the state. `store`:
the same without HTTP, for states of several lengths: to save and to load, beside writing (with
fsync) and reading a file of as many bytes. A line is laid through the times of `move`, that is
reading by the other server: its slope is time for each byte, and its constant what each move costs.
`unchanged`: the texts of a conversation that moved at every turn, beside one model by itself.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import lminf_export
from benchmarks.serving import servers
from benchmarks.support.conversations import offline_turns
from benchmarks.support.result import write_result
from benchmarks.support.script import run_script
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.parking.session_store import SessionStore

PARTS = 8  # of a ring, whose lengths are measured
QUESTIONS = ("Tell me of Elizabeth.", "And of her sister?", "And then?", "Who said so?")


def measured_store(lm: LanguageModel, folder: Path, rounds: int) -> dict[str, Any]:
    """Time saving and loading states of several lengths, and plain files of as many bytes."""
    secret = secrets.token_hex(32)
    here, there = (SessionStore(folder / "store", [secret]) for _ in range(2))
    capacity = lm.bundle.manifest.contract.ring_capacities[-1]
    rows = []
    rng = np.random.default_rng(0)
    for part in range(1, PARTS + 1):
        count = capacity * part // PARTS
        state = lm.new_state(1)
        lm.forward(rng.integers(5, lm.vocab_size, (1, count)), state, logits="none")
        snapshot = state.snapshot()
        name, plain = f"of {count}", folder / "plain"
        times: dict[str, list[float]] = {key: [] for key in ("save", "load", "write", "read")}
        for turn in range(1, rounds + 1):
            times["save"].append(seconds(here.save, name, turn, snapshot))
            times["load"].append(seconds(there.load, name, lm))
            (file,) = (folder / "store").rglob(f"{turn:012d}")
            content = file.read_bytes()
            times["write"].append(seconds(written, plain, content))
            times["read"].append(seconds(plain.read_bytes))
        found = there.load(name, lm)
        assert found is not None
        assert all(
            np.array_equal(found.snapshot.caches[key], array)
            for key, array in snapshot.caches.items()
        )
        here.drop(name)
        medians = {
            f"{key}_ms": round(statistics.median(each) * 1e3, 3) for key, each in times.items()
        }
        rows.append({"tokens": count, "bytes": len(content), **medians})
    loads = [row["load_ms"] for row in rows]
    slope, constant = np.polyfit([row["bytes"] for row in rows], loads, 1)
    return {
        "rounds": rounds,
        "states": rows,
        "load_line": {
            "bytes_per_second": round(1e3 / slope) if slope > 0 else None,
            "constant_ms": round(float(constant), 3),
        },
        "equal_bit_for_bit": True,  # or the assertion above would have ended this
    }


def written(path: Path, content: bytes) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Return how long something takes."""
    begun = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begun


def asked(http: httpx.Client, name: str, text: str, tokens: int) -> tuple[str, float]:
    """Ask in a session; return the answer and how long it took."""
    body = {
        "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0,
    }  # fmt: skip
    begun = time.perf_counter()
    found = http.post("chat/completions", json=body, headers={"x-session-id": name})
    took = time.perf_counter() - begun
    text = found.raise_for_status().json()["choices"][0]["message"]["content"]
    return text, took


def measured_moves(bundle: Path, lm: LanguageModel, folder: Path, pairs: int) -> dict[str, Any]:
    """Time turns that stay and turns that move, over HTTP."""
    secret = folder / "secret"
    secret.write_text(secrets.token_hex(32))
    more = (
        "--session-store", str(folder / "sessions"), "--session-secret-file", str(secret),
        "--no-prefix-reuse",
    )  # fmt: skip
    with ExitStack() as stack:
        both = []
        for name in ("here", "there"):
            server = stack.enter_context(servers.ours(name, bundle, 1, 2, *more))
            both.append(stack.enter_context(httpx.Client(base_url=server.url, timeout=120)))
        # A conversation whose state is as large as it gets.
        window = lm.bundle.manifest.lambda_config.window_size
        asked(both[0], "moves", "word " * (window + 64), 1)
        at = 0
        stays, moves = [], []
        for _ in range(pairs):
            stays.append(asked(both[at], "moves", "More.", 1)[1])
            at = 1 - at
            moves.append(asked(both[at], "moves", "More.", 1)[1])
        files = [path for path in (folder / "sessions").rglob("0*") if path.is_file()]
        nbytes = max(path.stat().st_size for path in files)
        told = [
            asked(both[turn % 2], "unchanged", text, 48)[0] for turn, text in enumerate(QUESTIONS)
        ]
    alone = offline_turns(lm, *([{"role": "user", "content": q}] for q in QUESTIONS), count=48)
    differences = [move - stay for move, stay in zip(moves, stays, strict=True)]
    return {
        "pairs": pairs,
        "bytes": nbytes,
        "stays_ms": round(statistics.median(stays) * 1e3, 2),
        "moves_ms": round(statistics.median(moves) * 1e3, 2),
        "a_move_costs_ms": round(statistics.median(differences) * 1e3, 2),
        "texts_equal_to_one_model_s": told == alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=21, help="of each length")
    parser.add_argument("--pairs", type=int, default=101, help="of turns over HTTP")
    parser.add_argument("--no-chat", action="store_true", help="the bundle cannot chat: no `moves`")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lm = lminf_export.load(arguments.bundle, threads=1)
    result: dict[str, Any] = {
        "benchmark": "session_moves",
        **describe_bundle(Bundle.open(arguments.bundle).manifest),
    }
    with tempfile.TemporaryDirectory() as folder:
        result["store"] = measured_store(lm, Path(folder), arguments.rounds)
        if not arguments.no_chat:
            result["moves"] = measured_moves(arguments.bundle, lm, Path(folder), arguments.pairs)
    write_result(arguments.out, result | {"environment": environment()})


if __name__ == "__main__":
    run_script(main)
