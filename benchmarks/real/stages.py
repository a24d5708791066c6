"""The stages of the evidence on a real model; each writes one JSON in benchmarks/results/real/."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.real import generation, pictures, readings, speed, texts
from benchmarks.real.checkpoint import RealModel

RESULTS = Path(__file__).resolve().parents[1] / "results" / "real"
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "real-perplexity.svg"
TRIALS = 10
# From the GGUF, whose own blocks the export keeps. Top-p at 0.95 and the full cache are there to
# tell what comes from drawing, and what from the bounded cache.
STREAMS = [
    generation.Stream("generation", 100_000, 1.0, readings.DEFAULT),
    generation.Stream("generation-top-p", 25_000, 0.95, readings.DEFAULT),
    generation.Stream("generation-full-cache", 25_000, 1.0, readings.STOCK),
    generation.Stream("generation-full-cache-top-p", 25_000, 0.95, readings.STOCK),
]


@dataclass(frozen=True)
class Run:
    """Settings of every stage.

    Attributes:
        model: the real model; None for stages that only read results.
        work: folder of what is made on the way.
        results: folder of the JSON files.
        threads: of every operator.
        only: names of rows or sections of a stage, or None for all.
        tokens: rows are read no further.
    """

    model: RealModel | None
    work: Path
    results: Path
    threads: int
    only: list[str] | None
    tokens: int = readings.LONG


def _readings(run: Run, rows: list[readings.Reading]) -> None:
    made = _made(run)
    wanted = [row for row in rows if run.only is None or row.name in run.only]
    made.make_all(wanted, run.threads, run.tokens)


def _task(run: Run, task: str) -> None:
    """Keys or records in a text, by its length and the depth; a command that anybody can run."""
    out = run.results / f"{task}.json"
    if out.is_file() and json.loads(out.read_text(encoding="utf-8"))["trials"] >= TRIALS:
        print(f"{task}: is there", file=sys.stderr)
        return
    bundle = _default(run)
    words = [
        *("lminf", "eval", task, str(bundle), "--threads", str(run.threads), "--out", str(out)),
        *("--lengths", "0.5,1,2,4", "--depths", "0,50,75,90,100", "--trials", str(TRIALS)),
    ]
    print("$", *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "lminf_export.cli.main", *words[1:]], check=True)


def _generation(run: Run) -> None:
    text = texts.path_of("austen", run.work)
    for stream in STREAMS:
        if run.only is None or stream.name in run.only:
            bundle = _made(run).bundle({**stream.settings, "quantize": "int4"})
            out = run.results / f"{stream.name}.json"
            generation.generate(stream, bundle, text, run.work, out, run.threads)


def _speed(run: Run) -> None:
    assert run.model is not None
    speed.measure(_made(run), run.model, run.results / "speed.json", run.threads, run.only)


def _default(run: Run) -> Path:
    return _made(run).bundle(readings.DEFAULT)


def _made(run: Run) -> readings.Readings:
    assert run.model is not None
    return readings.Readings(run.model, run.work, run.results / "readings.json")


def _picture(run: Run) -> None:
    pictures.draw(run.results / "readings.json", PICTURE)


STAGES: dict[str, Callable[[Run], None]] = {
    "perplexity": lambda run: _readings(run, readings.PERPLEXITY),
    "ablation": lambda run: _readings(run, readings.ABLATION),
    "passkey": lambda run: _task(run, "passkey"),
    "lookup": lambda run: _task(run, "lookup"),
    "generation": _generation,
    "speed": _speed,
    "picture": _picture,
}
# Stages that only read results.
WITHOUT_MODEL = ("picture",)
