"""`lminf push`: a bundle into a repository of the Hugging Face hub."""

from __future__ import annotations

import click

from lminf_export.cli.common import handle_errors, verbosity_options


@click.command("push")
@click.argument("bundle", type=click.Path())
@click.argument("repository", metavar="ORG/NAME")
@click.option(
    "--private/--public",
    default=None,
    help="Whether others see a repository that is made.  [default: as the hub decides]",
)
@click.option("--revision", metavar="BRANCH", help="Commit to this branch, made if missing.")
@click.option("--message", help="Message of the commit.")
@verbosity_options
@handle_errors
def push_command(
    bundle: str, repository: str, private: bool | None, revision: str | None, message: str | None
) -> None:
    """Put BUNDLE into the repository ORG/NAME of the Hugging Face hub, in one commit.

    Every file is hashed first. Log in before with `hf auth login`. Anybody who may read the
    repository runs it with load("ORG/NAME") or `lminf generate ORG/NAME`.
    """
    from lminf_export.bundle.hub import push_to_hub

    click.echo(push_to_hub(bundle, repository, private=private, revision=revision, message=message))
