"""The tables of docs/scaling.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lminf_export.bundle.files import human_bytes
from scripts.docs.tables import load, table

_HEADS = {
    "store": "bounded states in a store",
    "store, nothing fails": "the same, nothing fails",
    "store, any server": "the same, any server takes a turn",
    "full caches in a store": "full caches in a store",
    "no store": "no store, histories read again",
    "no store, nothing fails": "the same, nothing fails",
}
_KEPT = ("memory", "store", "reread", "asked again")


def plan() -> dict[str, Any]:
    """Return the plan of benchmarks/scaling/capacity.py."""
    return load("scaling_capacity")["plan"]


def command() -> str:
    """Return the command line that prints the plan."""
    found = plan()
    speed, options = found["load"]["speed"], found["options"]
    return (
        "```\n"
        f"lminf capacity demo --slots {options['slots']} --memory {options['memory'] >> 30}GiB "
        f"--sessions {options['sessions']} \\\n"
        f"    --tokens-per-second {speed['tokens_per_second']} "
        f"--prompt-tokens-per-second {speed['prompt_tokens_per_second']}\n"
        "```"
    )


def sizes() -> str:
    """Bytes of a session, and how many of it there is room for, by what it has read."""
    found = plan()
    rows = [
        [
            f"{row['tokens']:,}",
            human_bytes(row["state_bytes"]),
            human_bytes(row["stored_bytes"]),
            f"{row['per_gib_memory']:,}",
            f"{row['per_gib_store']:,}",
            f"{row['move_ms']:.2f}",
            human_bytes(row["full_cache_bytes"]),
        ]
        for row in found["sizes"]
    ]
    bandwidth = f"{found['options']['bandwidth_gbits']:g} Gbit/s"
    head = ["tokens read", "state", "stored, at most", "in a GiB of memory", "in a GiB of store"]
    head += [f"moved at {bandwidth}, ms", "full cache"]
    return table(head, rows) + (
        f"\n\nThe demo Llama, W = {found['window_size']}: a session does not grow any more behind "
        f"{found['full_at']} tokens."
    )


def server() -> str:
    """Memory of one server, its sessions, and the fleet."""
    result = load("scaling_capacity")
    found = result["plan"]
    memory, load_, fleet = found["memory"], found["load"], found["fleet"]
    activity, options = found["activity"], found["options"]
    rows = [
        ["weights", human_bytes(memory["weights"])],
        [f"{options['slots']} slots", human_bytes(memory["slots"])],
        ["a spare slot", human_bytes(memory["spare"])],
        [
            f"states of {options['max_waiting']:,} sequences that wait, at most",
            human_bytes(memory["waiting"]),
        ],
        ["states that prompts begin with, at most", human_bytes(memory["prefixes"])],
        [
            f"conversations in memory, {memory['sessions_kept']:,} full-grown ones",
            human_bytes(memory["sessions"]),
        ],
        ["interpreter and libraries, as given", human_bytes(memory["reserve"])],
        ["together", human_bytes(memory["total"])],
        [
            f"slots that would fit into {human_bytes(options['memory'])}",
            f"{memory['slots_that_fit']:,}",
        ],
        [
            f"answers/s of which at most 1% wait over {activity['wait_seconds']:g} s",
            f"{load_['answers_per_second']:.1f}",
        ],
        ["slots busy then", f"{load_['utilization']:.0%}"],
        [
            f"sessions of {activity['answers_per_hour']:g} answers an hour",
            f"{load_['sessions']:,}",
        ],
        ["written to the store by one server", f"{load_['store_gbits']:.2f} Gbit/s"],
        [f"servers for {fleet['sessions']:,} sessions", f"{fleet['servers']:,}"],
        ["store for all of them, full grown", human_bytes(fleet["store_bytes"])],
    ]
    speed = load_["speed"]
    return table(["one server", ""], rows) + (
        f"\n\nAnswers of {activity['answer_tokens']:g} tokens to questions of "
        f"{activity['prompt_tokens']:g}. Speed: {speed['tokens_per_second']:,} new tokens a second "
        f"with all slots busy, {speed['prompt_tokens_per_second']:,} of prompts; "
        f"{result['measured_on']}, {result['threads']} thread."
    )


def times() -> str:
    """Times of one server that the simulation is made of."""
    found = load("scaling_parameters")
    steps, prompts = found["step_ms"], found["prompt_ms"]
    rows = [[f"a step of {count} streams", f"{steps[count]:.2f}"] for count in ("1", "2", "4", "8")]
    rows += [[f"reading a prompt of {count} tokens", f"{ms:.1f}"] for count, ms in prompts.items()]
    full = found["states"][-1]
    size = human_bytes(full["bytes"])
    rows += [
        [f"a full-grown state ({size}) out of a slot", f"{full['snapshot_ms']:.2f}"],
        ["the same into a slot", f"{full['restore_ms']:.2f}"],
        ["the same saved to a store on the local disk, sealed", f"{full['save_ms']:.1f}"],
        ["the same loaded from there, checked", f"{full['load_ms']:.1f}"],
        ["from the start of a process to its first token", f"{found['start_seconds'] * 1e3:.0f}"],
    ]
    return table(["the demo Llama", "ms"], rows) + _where(found)


def settings() -> str:
    """The assumptions of the simulation."""
    found = load("scaling_simulation")
    asked = found["settings"]
    hours = asked["lifetime"] / 3600
    rows = [
        ["servers, of slots", f"{asked['hosts']:,}, {asked['slots']} each"],
        ["sessions", f"{asked['sessions']:,}"],
        ["answers an hour of a session, on average", f"{asked['answers_per_hour']:g}"],
        [
            "weight of the session of rank r",
            f"(r + {asked['zipf_shift']:,})^−{asked['zipf_exponent']:g}",
        ],
        ["new tokens of an answer, geometric", f"{asked['answer_tokens']:,.0f}"],
        ["new tokens of a question, geometric", f"{asked['prompt_tokens']:,.0f}"],
        [
            "tokens read before, log-normal",
            f"median {asked['history_median']:,.0f}, σ {asked['history_sigma']:g}",
        ],
        ["arrivals that count", f"{asked['seconds'] / 60:.0f} minutes"],
        ["before them", f"{asked['warm_up'] / 60:.0f} minutes"],
        ["memory of a server for conversations", human_bytes(asked["session_bytes"])],
        ["a server's network", f"{asked['bandwidth'] / 1e9:g} Gbit/s"],
        ["one request to the store", f"{asked['store_latency'] * 1e3:g} ms"],
        ["life of a server, exponential", f"{hours:g} hours on average"],
        ["until its end is noticed", f"{asked['noticed']:g} s"],
        ["until it is back", f"{asked['recovery']:g} s"],
        ["replaced, all of them in turn", f"{asked['drain_share']:.0%} at a time"],
        ["time to finish answers before that", f"{asked['drain_grace']:g} s"],
        [
            "turns that a server takes at once",
            f"as many as slots, or {asked['load_bound']:g} × the mean if more",
        ],
    ]
    return table(["assumed", ""], rows)


def simulation() -> str:
    """A row for each thing that is counted, a column for each scenario."""
    found = load("scaling_simulation")
    runs = found["scenarios"]
    seconds = found["settings"]["seconds"]
    counted: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("turns answered", lambda run: f"{run['events']['answered']:,}"),
        ("refused", lambda run: f"{_refused(run):,}"),
        ("first token, p50, ms", lambda run: _ms(run, "all", "p50_ms")),
        ("first token, p99, ms", lambda run: _ms(run, "all", "p99_ms")),
        *((f"of them {_kind(name)}", _share(name)) for name in _KEPT),
        ("p99 of those asked again, s", lambda run: _seconds(run, "asked again")),
        ("slots busy", lambda run: f"{run['busy_slots'] / run['slots']:.0%}"),
        ("servers failed", lambda run: _event(run, "servers that failed")),
        ("servers replaced", lambda run: _event(run, "servers that were replaced")),
        (
            "conversations that no server and no store has any more",
            lambda run: _event(run, "conversations lost, but for their clients' copies"),
        ),
        ("tokens read again, millions", lambda run: _millions(run, "tokens read again")),
        ("from the store, GB/s", lambda run: _rate(run, "read", seconds)),
        ("to the store, GB/s", lambda run: _rate(run, "written", seconds)),
    ]
    rows = [[name, *(shown(run) for run in runs.values())] for name, shown in counted]
    return table(["simulated", *(_HEADS[name] for name in runs)], rows) + (
        f"\n\nA simulation (simpy {found['simpy']}, seed {found['settings']['seed']}); times of a "
        f"server measured on {found['measured_on']}."
    )


def _refused(run: dict[str, Any]) -> int:
    return sum(count for name, count in run["events"].items() if name.startswith("refused"))


def _kind(name: str) -> str:
    return {
        "memory": "resumed from memory",
        "store": "resumed from the store",
        "reread": "after reading the history again",
        "asked again": "asked again, for a server's end",
    }[name]


def _share(name: str) -> Callable[[dict[str, Any]], str]:
    def shown(run: dict[str, Any]) -> str:
        found = run["first_token"].get(name)
        return "–" if found is None else f"{found['turns']:,}"

    return shown


def _ms(run: dict[str, Any], kind: str, quantile: str) -> str:
    return f"{run['first_token'][kind][quantile]:,.0f}"


def _seconds(run: dict[str, Any], kind: str) -> str:
    found = run["first_token"].get(kind)
    return "–" if found is None else f"{found['p99_ms'] / 1e3:,.1f}"


def _event(run: dict[str, Any], name: str) -> str:
    return f"{run['events'].get(name, 0):,}"


def _millions(run: dict[str, Any], name: str) -> str:
    return f"{run['events'].get(name, 0) / 1e6:,.0f}"


def _rate(run: dict[str, Any], way: str, seconds: float) -> str:
    return f"{run['network_bytes'].get(way, 0) / seconds / 1e9:.2f}"


def _where(found: dict[str, Any]) -> str:
    made = found["environment"]
    return (
        f"\n\n{made['device']}, {found['threads']} thread; onnxruntime "
        f"{made['versions']['onnxruntime']}. Medians of {found['rounds']} rounds."
    )


TABLES = {
    "scaling_command": command,
    "scaling_sizes": sizes,
    "scaling_server": server,
    "scaling_times": times,
    "scaling_settings": settings,
    "scaling_simulation": simulation,
}
