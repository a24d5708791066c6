"""`lminf add-plan`: a plan built on another machine joins its bundle."""

from __future__ import annotations

import click

from lminf_export.cli.common import handle_errors, verbosity_options
from lminf_export.cli.session_options import trust_options


@click.command("add-plan")
@click.argument("bundle", type=click.Path())
@click.argument("plan", type=click.Path())
@click.option(
    "--target",
    metavar="sm_XX",
    help="The GPU the plan was built on, such as sm_90.  [default: this machine's]",
)
@click.option(
    "--plugin",
    type=click.Path(),
    metavar="PATH",
    help="The plugin's library it was built with.  [default: the bundle's]",
)
@click.option("--force", is_flag=True, help="Replace a plan the bundle has.")
@trust_options
@verbosity_options
@handle_errors
def add_plan_command(
    bundle: str,
    plan: str,
    target: str | None,
    plugin: str | None,
    force: bool,
    trust_plan: bool | str,
) -> None:
    """Register PLAN, built by TensorRT from the recipe of BUNDLE, so that BUNDLE runs it.

    The recipe comes from lminf-export --builder none. Files and hashes go into the manifest; a
    plan is executable code, so add only one you or somebody you trust has built.
    """
    from lminf_export.engine.add_plan import add_plan

    opened = add_plan(
        bundle, plan, target=target, plugin=plugin, force=force, trust_plan=trust_plan
    )
    engine = opened.manifest.engine
    assert engine is not None
    click.echo(
        f"{opened.plan_path}: {engine.builder} {engine.version} for {engine.target}, {engine.note}"
    )
