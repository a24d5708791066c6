"""The tables of docs/scaling.md that were measured with servers on one machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lminf_export.bundle.files import human_bytes
from scripts.docs.tables import load, table

_MODELS = {"demo": "demo Llama", "gemma": "Gemma 3 270M, int4, W = 1,024"}


def moves() -> str:
    """A conversation that goes on at another server."""
    result = load("session_moves")
    found, line = result["moves"], result["store"]["load_line"]
    rows = [
        ["bytes of its object", f"{found['bytes']:,}"],
        ["a turn of one token, at the server that answered before, ms", f"{found['stays_ms']:.1f}"],
        ["the same at the other server, ms", f"{found['moves_ms']:.1f}"],
        [
            f"so the move costs, median of the differences of {found['pairs']} pairs, ms",
            f"{found['a_move_costs_ms']:.1f}",
        ],
        [
            "loading from the store: for each move, ms",
            f"{line['constant_ms']:.1f}",
        ],
        ["and bytes a second", f"{line['bytes_per_second']:,}"],
        [
            "texts of a conversation that moved at every turn, against one model by itself",
            "equal" if found["texts_equal_to_one_model_s"] else "NOT EQUAL",
        ],
    ]
    return table(["the demo Llama, its state full grown", ""], rows) + _where(result)


def parked() -> str:
    """Many parked sessions."""
    result = load("parked_sessions")
    found = result["many"]
    times = found["answer_ms"]
    rss = [sample["rss"] for sample in found["rss_bytes"]]
    rows = [
        ["sessions parked", f"{found['sessions']:,}"],
        ["memory of the server for sessions", human_bytes(found["session_bytes"])],
        ["its whole memory behind a twentieth of them", human_bytes(rss[0])],
        ["behind all of them, and those resumed", human_bytes(rss[-1])],
        ["growth behind the first tenth", f"{found['rss_growth_percent']:.1f}%"],
        [
            f"{found['resumed_sessions']:,} resumed: answer of one token, p50 / p99, ms",
            f"{times['resumed']['p50']:.0f} / {times['resumed']['p99']:.0f}",
        ],
        [
            "as many new ones, p50 / p99, ms",
            f"{times['new']['p50']:.0f} / {times['new']['p99']:.0f}",
        ],
    ]
    return table(["", ""], rows) + _where(result)


def tampered() -> str:
    """Objects that were changed."""
    result = load("parked_sessions")
    found = result["mutations"]
    rows = [[answer, f"{count:,}"] for answer, count in sorted(found["answers"].items())]
    rows.append(["tokens that the engine read meanwhile", f"{found['tokens_read_meanwhile']:.0f}"])
    return table([f"{found['mutations']:,} changed objects, each asked for", ""], rows)


def ray() -> str:
    """A fleet on Ray Serve whose replicas are killed and replaced."""
    result = load("ray_fleet")
    failed, updated = result["failure"], result["update"]
    rows = [
        ["replicas, on one machine", str(failed["replicas"])],
        [
            "conversations, turns of each",
            f"{failed['conversations']}, {failed['turns_each']}",
        ],
        ["turns complete when one replica was killed (SIGKILL)",
         str(failed["turns_complete_when_killed"])],
        ["conversations that had to ask a turn again", str(failed["turns_asked_again"])],
        ["longest time for one answer, s", f"{failed['longest_answer_s']:.1f}"],
        ["conversations whose texts are those of an undisturbed one",
         f"{failed['conversations_equal_to_undisturbed']} of {failed['conversations']}"],
        ["requests during a rolling update, all replicas replaced", str(updated["requests"])],
        ["of them failed", str(updated["failed"])],
        ["a client that hung up: its slot is free after, ms",
         str(result["departure"]["free_after_ms"])],
    ]  # fmt: skip
    return table([f"Ray {result['ray']}", ""], rows) + _where(result)


def loaded() -> str:
    """The server under locust's load, beside the bare engine."""
    rows, machine = [], ""
    for name, found in load("load_report")["models"].items():
        made = found["environment"]
        machine = (
            f"{made['device']}, {made['cores']} cores; the model has {found['threads']} thread"
        )
        rates, rows_ = found["tokens_per_second"], found["locust"]
        rows.append(
            [
                _MODELS[name],
                f"{found['users']}, {found['slots']}",
                f"{found['new_tokens']}",
                f"{rates['engine']:,.0f}",
                f"{rates['http']:,.0f}",
                f"{found['http_over_engine']:.2f}",
                f"{rows_['first event']['p50_ms']:.0f} / {rows_['first event']['p99_ms']:.0f}",
                f"{rows_['answer']['requests']:,}",
                str(rows_["answer"]["failures"] + rows_["headers"]["failures"]),
            ]
        )
    head = ["model", "users, slots", "tokens of an answer", "engine, tokens/s", "over HTTP"]
    head += ["ratio", "first event, p50 / p99, ms", "answers of the last round", "failures"]
    return table(head, rows) + f"\n\n{machine}."


def _where(result: dict[str, Any]) -> str:
    found = result["environment"]
    return f"\n\n{found['device']}, {found['cores']} cores, a local disk."


TABLES: dict[str, Callable[[], str]] = {
    "session_moves": moves,
    "parked_sessions": parked,
    "tampered_sessions": tampered,
    "ray_fleet": ray,
    "load_report": loaded,
}
