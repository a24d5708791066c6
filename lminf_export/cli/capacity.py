"""`lminf capacity`: how many sessions servers of a bundle hold and answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lminf_export.bundle.files import human_bytes
from lminf_export.capacity.options import CapacityOptions, ReplicaSpeed, SessionActivity
from lminf_export.capacity.plan import plan_capacity
from lminf_export.capacity.report import CapacityPlan, Fleet, ServerLoad, ServerMemory
from lminf_export.cli.byte_sizes import ByteSize
from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.cli.progress_bar import progress_bar
from lminf_export.cli.session_options import kernels_option, threads_option
from lminf_export.cli.terminal import echo_json
from lminf_export.errors import InputError
from lminf_export.runtime.kernels import AUTO

if TYPE_CHECKING:
    from rich.table import Table

_BYTES = ByteSize()
_POSITIVE = click.IntRange(min=1)
_SOME = click.FloatRange(min=0, min_open=True)


@click.command("capacity")
@click.argument("bundle", type=click.Path())
@click.option(
    "--slots",
    type=_POSITIVE,
    default=CapacityOptions.slots,
    show_default=True,
    help="Slots of a server.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    default=CapacityOptions.max_waiting,
    show_default=True,
    help="Sequences that may wait for a slot, as of lminf serve.",
)
@click.option("--memory", type=_BYTES, help="Memory of a server: how many slots fit.")
@click.option(
    "--session-bytes",
    type=_BYTES,
    default=CapacityOptions.session_bytes,
    show_default=True,
    help="Memory of a server's kept conversations, as of lminf serve.",
)
@click.option("--no-prefix-reuse", is_flag=True, help="As of lminf serve.")
@click.option(
    "--reserve-bytes",
    type=_BYTES,
    default=CapacityOptions.reserve_bytes,
    show_default=True,
    help="Memory of interpreter and libraries.",
)
@click.option(
    "--bandwidth",
    type=_SOME,
    default=CapacityOptions.bandwidth_gbits,
    show_default=True,
    metavar="GBIT/S",
    help="Of the network between a server and a store, 10⁹ bits a second.",
)
@click.option(
    "--tokens",
    type=_POSITIVE,
    multiple=True,
    help="Length of a session whose size is shown; may be repeated.  [default: the window, where "
    "a state is full, 1000000]",
)
@click.option("--sessions", type=_POSITIVE, help="Sessions of all users: servers and store.")
@click.option("--tokens-per-second", type=_SOME, help="New tokens of all slots of a busy server.")
@click.option(
    "--prompt-tokens-per-second", type=_SOME, help="Tokens of prompts that a server reads."
)
@click.option("--measure", is_flag=True, help="Measure both on this machine.")
@click.option(
    "--answers-per-hour",
    type=_SOME,
    default=SessionActivity.answers_per_hour,
    show_default=True,
    help="Of one session, on average.",
)
@click.option(
    "--answer-tokens",
    type=_SOME,
    default=SessionActivity.answer_tokens,
    show_default=True,
    help="Tokens of an answer.",
)
@click.option(
    "--prompt-tokens",
    type=click.FloatRange(min=0),
    default=SessionActivity.prompt_tokens,
    show_default=True,
    help="New tokens of a question.",
)
@click.option(
    "--wait-seconds",
    type=click.FloatRange(min=0),
    default=SessionActivity.wait_seconds,
    show_default=True,
    help="Longest wait for a slot, but for one answer in a hundred.",
)
@threads_option
@kernels_option
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@verbosity_options
@handle_errors
def capacity_command(
    bundle: str,
    slots: int,
    max_waiting: int,
    memory: int | None,
    session_bytes: int,
    no_prefix_reuse: bool,
    reserve_bytes: int,
    bandwidth: float,
    tokens: tuple[int, ...],
    sessions: int | None,
    tokens_per_second: float | None,
    prompt_tokens_per_second: float | None,
    measure: bool,
    answers_per_hour: float,
    answer_tokens: float,
    prompt_tokens: float,
    wait_seconds: float,
    threads: int | None,
    kernels: str,
    as_json: bool,
) -> None:
    """Reckon how many sessions servers of BUNDLE hold and answer.

    Bytes follow from the bundle. How many sessions a server answers is estimated by a queue, from
    its speed (--tokens-per-second, or --measure) and from how active a session is.
    """
    options = CapacityOptions(
        slots=slots,
        max_waiting=max_waiting,
        session_bytes=session_bytes,
        prefix_reuse=not no_prefix_reuse,
        memory=memory,
        reserve_bytes=reserve_bytes,
        bandwidth_gbits=bandwidth,
        sessions=sessions,
        tokens=tokens,
    )
    activity = SessionActivity(answers_per_hour, answer_tokens, prompt_tokens, wait_seconds)
    given = None
    if tokens_per_second is not None:
        given = ReplicaSpeed(tokens_per_second, prompt_tokens_per_second)
    elif prompt_tokens_per_second is not None:
        raise InputError("--prompt-tokens-per-second goes with --tokens-per-second")
    if measure and given is not None:
        raise InputError("--measure and --tokens-per-second: a speed is measured or given")
    if not measure and (threads is not None or kernels != AUTO):
        raise InputError("--threads and --kernels say how to --measure, which was not asked for")
    speed = _measured(bundle, slots, threads, kernels) if measure else given
    plan = plan_capacity(bundle, options, activity, speed)
    if as_json:
        echo_json(plan.to_dict(), allow_nan=False)
    else:
        _print_tables(plan)


def _measured(bundle: str, slots: int, threads: int | None, kernels: str) -> ReplicaSpeed:
    from lminf_export.capacity.measured import measured_speed

    with progress_bar() as progress:
        return measured_speed(bundle, slots, threads=threads, kernels=kernels, progress=progress)


def _print_tables(plan: CapacityPlan) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_sizes_table(plan))
    console.print(_facts_table("a server", _memory_rows(plan.memory, plan)))
    if plan.load is not None:
        console.print(_facts_table("what it answers, estimated", _load_rows(plan.load, plan)))
    if plan.fleet is not None:
        console.print(_facts_table("all sessions", _fleet_rows(plan.fleet)))


def _sizes_table(plan: CapacityPlan) -> Table:
    from rich.table import Table

    table = Table(
        title=f"a session of {plan.bundle}, window {plan.window_size}, full at {plan.full_at} "
        "tokens",
        title_justify="left",
    )
    bandwidth = f"{plan.options.bandwidth_gbits:g} Gbit/s"
    heads = (
        *("tokens read", "state", "stored, at most", "in 1 GiB of memory"),
        *("in 1 GiB of store", f"moved at {bandwidth}", "full cache"),
    )
    rows = [
        (
            f"{row.tokens:,}",
            human_bytes(row.state_bytes),
            human_bytes(row.stored_bytes),
            f"{row.per_gib_memory:,}",
            f"{row.per_gib_store:,}",
            f"{row.move_ms:.2f} ms",
            human_bytes(row.full_cache_bytes),
        )
        for row in plan.sizes
    ]
    for head, *cells in zip(heads, *rows, strict=True):
        # Words of a head go to the next line, a number and its unit stay together.
        table.add_column(head, justify="right", width=max(map(len, [*cells, *head.split()])))
    for row in rows:
        table.add_row(*row)
    return table


def _memory_rows(memory: ServerMemory, plan: CapacityPlan) -> list[tuple[str, str]]:
    rows = [
        ("weights", human_bytes(memory.weights)),
        (
            f"{plan.options.slots} slots of {human_bytes(plan.slot_bytes)}",
            human_bytes(memory.slots),
        ),
        ("a spare slot", human_bytes(memory.spare)),
        (
            f"states of {plan.options.max_waiting:,} sequences that wait, at most",
            human_bytes(memory.waiting),
        ),
        ("states that prompts begin with, at most", human_bytes(memory.prefixes)),
        (
            f"conversations, {memory.sessions_kept:,} full-grown ones",
            human_bytes(memory.sessions),
        ),
        ("interpreter and libraries", human_bytes(memory.reserve)),
        ("together", human_bytes(memory.total)),
    ]
    if memory.slots_that_fit is not None and plan.options.memory is not None:
        rows.append(
            (
                f"slots that fit into {human_bytes(plan.options.memory)}",
                f"{memory.slots_that_fit:,}",
            )
        )
    return rows


def _load_rows(load: ServerLoad, plan: CapacityPlan) -> list[tuple[str, str]]:
    speed, activity = load.speed, plan.activity
    reading = ""
    if speed.prompt_tokens_per_second is not None:
        reading = f", {speed.prompt_tokens_per_second:,.0f} of prompts"
    return [
        (f"tokens/s, {speed.source}", f"{speed.tokens_per_second:,.0f}{reading}"),
        (
            f"answers/s, at most 1% of which {_waiting(activity.wait_seconds)}",
            f"{load.answers_per_second:.2f}",
        ),
        ("slots busy", f"{load.utilization:.0%}"),
        ("mean wait", f"{load.mean_wait_seconds * 1e3:.0f} ms"),
        (f"sessions of {activity.answers_per_hour:g} answers an hour", f"{load.sessions:,}"),
        ("written to a shared store", f"{load.store_gbits:.2f} Gbit/s"),
        ("limited by", load.limited_by),
    ]


def _waiting(seconds: float) -> str:
    return f"wait over {seconds:g} s" if seconds else "wait for a slot"


def _fleet_rows(fleet: Fleet) -> list[tuple[str, str]]:
    servers = "unknown; give --tokens-per-second, or --measure"
    return [
        ("sessions", f"{fleet.sessions:,}"),
        ("servers", servers if fleet.servers is None else f"{fleet.servers:,}"),
        ("store, all of them full grown", human_bytes(fleet.store_bytes)),
        ("full caches of a million tokens each", human_bytes(fleet.full_cache_bytes)),
    ]


def _facts_table(title: str, rows: list[tuple[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("name")
    table.add_column("value", justify="right")
    for row in rows:
        table.add_row(*row)
    return table
