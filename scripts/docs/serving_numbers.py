"""Tables about serving, for docs/performance.md."""

from __future__ import annotations

from typing import Any

from scripts.docs.tables import MIB, load, table

_PRECISIONS = {"fp32": "float32", "quantized": "4 bits"}


def race() -> str:
    """`lminf serve` beside other servers: rates and latencies of clients side by side."""
    found = load("serving_race")
    rows, missing = [], {}
    for key, section in found["sections"].items():
        threads = key.rsplit("-", 1)[1]
        missing |= section.get("refused", {})
        for name, row in section["rows"].items():
            rows.append(
                [
                    f"{name}, {threads} thread{'s' * (threads != '1')}",
                    f"{row['new_tokens_per_second']:.1f}",
                    _number(row.get("ours_over_this"), ".2f"),
                    f"{row['first_token_ms']:,.0f}",
                    f"{row['between_events_ms']:.0f}",
                    f"{row['between_events_p99_ms']:.0f}",
                    str(row["errors"]),
                ]
            )
    asked = found["settings"]
    head = ["", "new tokens/s", "ours, times", "first token, ms", "next, ms", "next, p99", "errors"]
    told = (
        f"\n\n{asked['clients']} clients at once, prompts of {asked['prompt_tokens']} tokens, "
        f"answers of {asked['new_tokens']}; {asked['model']}. Medians of the rounds; *ours, times* "
        "is the median of the rounds' ratios."
    )
    return table(head, rows) + told + _missing(missing) + _where(found)


def follow_ups() -> str:
    """The first token of a follow-up: behind a history that was kept, and with it."""
    found = load("serving_race")
    rows = [
        [
            f"{name}, {key.rsplit('-', 1)[1]} thread(s)",
            f"{row['follow_up_kept_ms']:.0f}",
            f"{row['follow_up_stateless_ms']:,.0f}",
            f"{row['kept_over_stateless']:.2f}",
        ]
        for key, section in found["sections"].items()
        for name, row in section["rows"].items()
        if "kept_over_stateless" in row and not name.endswith("Engine")
    ]
    asked = found["settings"]
    head = ["ms to the first token", "kept", "stateless", "ratio"]
    return table(head, rows) + (
        f"\n\nA history of {asked['follow_up_history_tokens']} tokens and "
        f"{asked['follow_up_tokens']} more."
    )


def overhead() -> str:
    """Times of an engine beside a bare loop, by who reads its streams."""
    found = load("serving_overhead")
    engine = found["engine"]
    names = {
        "nobody": "streams left unread",
        "threads": "a thread for each stream",
        "asyncio": "streams read by asyncio",
    }
    rows = [
        ["the bare loop", *_turn(engine["bare"]), "", ""],
        *(
            [
                f"an engine, {names[reader]}",
                *_turn(row),
                f"{row['scheduling']:.1%}",
                f"{row['overhead']:+.1%}",
            ]
            for reader, row in engine["readers"].items()
        ),
    ]
    head = ["", "turn, ms", "its step, ms", "the rest, ms", "added, of a step", "of the whole"]
    alone = engine["without_step"]
    text = (
        f"\n\n{found['model']}, {found['slots']} slots. Where a step costs nothing, a turn takes "
        f"{alone['turn_us']:.1f} µs of processor time and the bare loop {alone['bare_us']:.1f} µs."
    )
    if http := found.get("http"):
        rates = http["tokens_per_second"]
        text += (
            f" Over HTTP {http['streams']} streams get {rates['http']:,.0f} tokens/s, read from "
            f"the engine {rates['engine']:,.0f} (median ratio {http['http_over_engine']:.2f})."
        )
    return table(head, rows) + text + _where(engine["environment"], found["threads"])


def _turn(row: dict[str, float]) -> list[str]:
    return [f"{row[part]:.3f}" for part in ("turn_ms", "step_ms", "rest_ms")]


def long_stream() -> str:
    """Memory and rate of a server whose one stream does not end while others come and go."""
    found = load("serving_long_stream")
    answer, memory, visitors = found["answer"], found["memory"], found["visitors"]
    rates = answer["tokens_per_second_by_position"]
    tenth = max(1, len(rates) // 10)
    rows = [
        ["tokens of the stream", f"{answer['tokens']:,}"],
        ["seconds", f"{answer['seconds']:,.0f}"],
        ["tokens/s in its first tenth", f"{sum(rates[:tenth]) / tenth:,.0f}"],
        ["tokens/s in its last tenth", f"{sum(rates[-tenth:]) / tenth:,.0f}"],
        ["others answered meanwhile", f"{visitors['answered']:,}"],
        ["others that hung up", f"{visitors['hung_up']:,}"],
        ["resident memory, MiB, median", f"{memory['median_bytes'] / MIB:.1f}"],
        ["the same, least and most", _span(memory)],
        ["(most − least) / median", f"{memory['spread']:.2%}"],
    ]
    text = f"\n\n{found['model']}, W = {found['lambda_config']['window_size']}."
    return table(["", found["model"]], rows) + text + _where(found, found["threads"])


def _span(memory: dict[str, Any]) -> str:
    return f"{memory['least_bytes'] / MIB:.1f} … {memory['most_bytes'] / MIB:.1f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _missing(missing: dict[str, str]) -> str:
    return "".join(f" {name}: {reason.strip()}." for name, reason in missing.items())


def _where(found: dict[str, Any], threads: int | None = None) -> str:
    names = ("llama-server", "onnxruntime-genai", "onnxruntime")
    known = {name: found["versions"][name] for name in names if name in found["versions"]}
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    count = "" if threads is None else f", {threads} thread{'s' * (threads != 1)}"
    return f" {found['device']}, {found['cores']} cores{count}; {versions}."


TABLES = {
    "serving-race": race,
    "serving-follow-ups": follow_ups,
    "serving-overhead": overhead,
    "serving-long-stream": long_stream,
}
