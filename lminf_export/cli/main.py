"""`lminf`: what can be done with a bundle."""

from __future__ import annotations

import click

import lminf_export
from lminf_export.cli.common import LazyGroup, handle_errors, run_command

_COMMANDS = {
    "generate": (
        "lminf_export.cli.generate:generate_command",
        "Continue a text, for as long as you like.",
    ),
    "chat": (
        "lminf_export.cli.chat:chat_command",
        "Talk with a model, for as long as you like.",
    ),
    "validate": (
        "lminf_export.cli.validate:validate_command",
        "Compare a bundle with the reference, logit by logit.",
    ),
    "serve": (
        "lminf_export.cli.serve:serve_command",
        "Serve bundles over HTTP, as OpenAI's API.",
    ),
    "export-triton": (
        "lminf_export.cli.export_triton:export_triton_command",
        "Write a model repository for NVIDIA's Triton.",
    ),
    "bench": (
        "lminf_export.cli.bench:bench_command",
        "Measure speed and memory, and how far from the floor they are.",
    ),
    "eval": (
        "lminf_export.cli.eval:eval_group",
        "Measure what a bundle does with long texts.",
    ),
    "inspect": (
        "lminf_export.cli.inspect:inspect_command",
        "Show what is inside a bundle and what its cache costs.",
    ),
    "capacity": (
        "lminf_export.cli.capacity:capacity_command",
        "Reckon how many sessions servers hold and answer.",
    ),
    "families": (
        "lminf_export.cli.families:families_command",
        "Show which model types are tested, and what becomes of the others.",
    ),
    "push": (
        "lminf_export.cli.push:push_command",
        "Put a bundle into a repository of the Hugging Face hub.",
    ),
    "add-plan": (
        "lminf_export.cli.add_plan:add_plan_command",
        "Register an engine that was built on another machine.",
    ),
}


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"lminf {lminf_export.__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    lazy=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="Show the version and exit.",
)  # fmt: skip
def cli() -> None:
    """Run and inspect bundles written by lminf-export.

    A BUNDLE is the folder lminf-export wrote, or a file in it.
    """


@handle_errors
def main() -> None:
    """Entry point of `lminf`."""
    run_command(cli, "lminf")


if __name__ == "__main__":
    main()
