"""`lminf families`: which model types are tested, and what becomes of the others."""

from __future__ import annotations

import json
import textwrap

import click

from lminf_export.cli.common import handle_errors

# Kinds that are refused, as `models/kinds.py` and `models/structure.py` name them.
REFUSED_KINDS = (
    "latent attention (MLA)",
    "recurrent models and hybrids",
    "encoder–decoders and encoders",
    "two-way attention and prefix LMs",
    "chunked attention",
    "attention temperature",
    "sparse attention by an index",
    "shared keys and values",
    "differential attention",
    "absolute positions, learned or not",
    "relative position biases",
)


@click.command("families")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@handle_errors
def families_command(as_json: bool) -> None:
    """Show which model types are tested, and what becomes of the others.

    The model type is `model_type` in a model's config.json.
    """
    from lminf_export.checkpoint.gguf.architectures import ARCHITECTURES
    from lminf_export.models.registry import FAMILIES
    from lminf_export.models.wrappers import TESTED_WRAPPERS

    tested, wrappers = sorted(FAMILIES), sorted(TESTED_WRAPPERS)
    of_gguf = sorted(ARCHITECTURES)
    if as_json:
        found = {"tested": tested, "text_models_of": wrappers, "gguf": of_gguf}
        click.echo(json.dumps({**found, "refused": list(REFUSED_KINDS)}, indent=1))
        return
    click.echo(_paragraph(f"Tested ({len(tested)}): {', '.join(tested)}."))
    click.echo(
        _paragraph(
            f"Multimodal, tested, of which the text model is exported ({len(wrappers)}): "
            f"{', '.join(wrappers)}."
        )
    )
    click.echo(
        _paragraph(
            "Other types with rotary embeddings behind transformers' attention interface are "
            "probed with a small random model when they are exported; what passes is exported "
            "with a notice."
        )
    )
    click.echo(_paragraph(f"Architectures read from GGUF files: {', '.join(of_gguf)}."))
    click.echo(_paragraph(f"Refused, each by its name: {'; '.join(REFUSED_KINDS)}."))


def _paragraph(text: str) -> str:
    return textwrap.fill(text, width=98, break_on_hyphens=False)
