"""`lminf serve` beside llama-server and onnxruntime-genai: many clients, and kept conversations.

The same checkpoint in each one's own form, the same prompts as token ids, answers of exactly as
many tokens (`ignore_eos`; onnxruntime-genai: a shortest length), the same number of threads.
Contestants take turns, all others are stopped meanwhile. onnxruntime-genai has no server: its
prompts go in by Python, without HTTP (`genai_worker.py`).

    python -m benchmarks.serving.race --work FOLDER --gguf model-q4_k_m.gguf --fp32 BUNDLE \\
        --int4 BUNDLE --llama-server BINARY --genai-python PYTHON --checkpoint FOLDER \\
        --out benchmarks/results/serving_race.json

A follow-up is timed alone: a history is read once, then comes more. `kept` sends more to where the
history was read (the header x-session-id; llama-server's own cache of its slot, for which all is
sent again; onnxruntime-genai's generator), `stateless` sends a history of that length that nobody
has read, and more. The result file is read first: a run that was cut off goes on with the rounds
that are missing. Who is not there is in the file with the reason.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.race import version_in
from benchmarks.serving import servers
from benchmarks.serving.contestants import Contestant, Refused, entered, prepare
from benchmarks.support.result import write_result
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.environment import describe_bundle, environment

GROUPS = {
    "fp32": ("ours fp32", "llama-server f32", "genai fp32, one batch", "genai fp32, Engine"),
    "quantized": ("ours int4", "llama-server q4_k_m", "genai int4, one batch"),
}


def section(
    arguments: argparse.Namespace,
    group: str,
    threads: int,
    found: dict[str, Any],
    write: Callable[[], None],
) -> None:
    """Race a group at one number of threads into `found`, which is written after each round."""
    rounds, follows = found.setdefault("rounds", []), found.setdefault("follow_ups", [])
    refused = found.setdefault("refused", {})
    with ExitStack() as stack:
        racing: dict[str, Contestant] = {}
        for name in GROUPS[group]:
            try:
                contestant = entered(stack, name, arguments, threads)
                with contestant.awake():
                    contestant.load(1, arguments.prompt_tokens, 4, seed=99)
            except (Refused, servers.ServerError) as error:
                refused[name] = str(error)
                say(name, error)
            else:
                racing[name] = contestant
        while len(rounds) < arguments.rounds:
            rounds.append({})
            for name in turns(racing, len(rounds)):
                with racing[name].awake():
                    rounds[-1][name] = racing[name].load(
                        arguments.clients, arguments.prompt_tokens, arguments.new_tokens,
                        seed=len(rounds),
                    )  # fmt: skip
                say(f"{group} {threads} {name}", rounds[-1][name].get("new_tokens_per_second"))
            write()
        while len(follows) < arguments.follow_rounds:
            follows.append({})
            for name in turns(racing, len(follows)):
                with racing[name].awake():
                    follows[-1][name] = racing[name].follow(
                        arguments.prompt_tokens + arguments.new_tokens, arguments.more_tokens,
                        seed=1000 + len(follows), name=uuid.uuid4().hex,
                    )  # fmt: skip
                say(f"{group} {threads} {name}", follows[-1][name])
            write()


def turns(racing: dict[str, Contestant], number: int) -> list[str]:
    """The order of a round: every other one is the other way round."""
    names = list(racing)
    return names if number % 2 else names[::-1]


def say(who: str, what: Any) -> None:
    print(f"{who}: {what}", file=sys.stderr, flush=True)


def summarised(group: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return medians of a section's rounds, and ratios within them."""
    rounds, follows = found["rounds"], found["follow_ups"]
    ours = GROUPS[group][0]
    rows = {}
    for name in GROUPS[group]:
        loads = [turn[name] for turn in rounds if "seconds" in turn.get(name, {})]
        if not loads:
            continue
        row: dict[str, Any] = {
            "new_tokens_per_second": _median(x["new_tokens_per_second"] for x in loads),
            "first_token_ms": _median(x["first_token_ms"]["median"] for x in loads),
            "between_events_ms": _median(x["between_events_ms"]["median"] for x in loads),
            "between_events_p99_ms": _median(x["between_events_ms"]["p99"] for x in loads),
            "errors": sum(len(x["errors"]) for x in loads),
        }
        if pairs := [turn[name] for turn in follows if name in turn]:
            row |= {f"follow_up_{way}_ms": _median(p[way] for p in pairs) for way in pairs[0]}
            row["kept_over_stateless"] = _median(p["kept"] / p["stateless"] for p in pairs)
        if name != ours:
            both = [turn for turn in rounds if {name, ours} <= turn.keys()]
            both = [turn for turn in both if "seconds" in turn[name] and "seconds" in turn[ours]]
            if both:
                row["ours_over_this"] = _median(
                    turn[ours]["new_tokens_per_second"] / turn[name]["new_tokens_per_second"]
                    for turn in both
                )
        rows[name] = row
    return rows


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a result; one with others is begun anew."""
    return {
        "clients": arguments.clients,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "follow_up_history_tokens": arguments.prompt_tokens + arguments.new_tokens,
        "follow_up_tokens": arguments.more_tokens,
        "exactly_so_many_tokens_by": {
            "ours, llama-server": "ignore_eos", "onnxruntime-genai": "a shortest length",
        },
        "model": arguments.gguf.name if arguments.gguf is not None else None,
        "bundles": {
            name: describe_bundle(Bundle.open(path).manifest)
            for name in ("fp32", "int4")
            if (path := arguments.work / f"ours-{name}").exists()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="links, GGUF and genai folders")
    parser.add_argument("--gguf", type=Path, help="the model, quantised; llama.cpp reads it")
    parser.add_argument("--fp32", type=Path, help="a bundle of it in float32")
    parser.add_argument("--int4", type=Path, help="a bundle of it in int4")
    parser.add_argument("--checkpoint", type=Path, help="its folder, for onnxruntime-genai")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument("--genai-python", help="a Python that has onnxruntime-genai")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--more-tokens", type=int, default=32, help="of a follow-up")
    parser.add_argument("--first-id", type=int, default=2, help="that begins every prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--follow-rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    # So that a run which is cut off ends the servers it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    prepare(arguments)
    result: dict[str, Any] = {}
    if arguments.out.is_file():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    about = {"settings": settings(arguments)} | environment_with_peers(arguments)
    if any(result.get(key) != value for key, value in about.items()):
        result = {"benchmark": "serving_race", **about, "sections": {}}
    for threads in arguments.threads:
        for group in arguments.groups:
            found = result["sections"].setdefault(f"{group}-{threads}", {})
            write = partial(save, arguments.out, result, found, group)
            section(arguments, group, threads, found, write)
            write()
    write_result(arguments.out, result)


def save(path: Path, result: dict[str, Any], found: dict[str, Any], group: str) -> None:
    found["rows"] = summarised(group, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial_path.replace(path)


def environment_with_peers(arguments: argparse.Namespace) -> dict[str, Any]:
    found = environment()
    found["versions"]["llama-server"] = servers.version_of(arguments.llama_server)
    python = arguments.genai_python
    found["versions"]["onnxruntime-genai"] = (
        version_in(python, "onnxruntime-genai") if python else "not given"
    )
    return found


if __name__ == "__main__":
    main()
