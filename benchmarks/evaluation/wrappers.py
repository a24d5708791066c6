"""Try every multimodal model type of transformers: its text model, or the reason why not.

    python -m benchmarks.evaluation.wrappers             all of them
    python -m benchmarks.evaluation.wrappers gemma3      some, the others' rows are kept

A type with a case in benchmarks/support/wrappers.py is built small and random, saved in the names
of the hub and in those of transformers 5, and read as an export reads it; then it is exported. The
row has the largest differences of a logit, of the text model in torch and of the graph, from the
whole model's on text, relative to their range. Any other type is tried with transformers' default
configuration, without weights: the row has the text model, or the reason by which it is refused.
Writes benchmarks/results/wrappers.json, from which `scripts/docs/write_all.py` writes
docs/models.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from benchmarks.support.wrappers import BY_NAME, WrapperCase, text_logits, whole_logits
from lminf_export import LambdaConfig, LminfError, export, load
from lminf_export.checkpoint.source import open_source
from lminf_export.models.registry import find_family
from lminf_export.models.transformers_tables import wrapper_class_name

RESULTS = Path(__file__).resolve().parents[1] / "results" / "wrappers.json"
# What the defaults of a type lack or have otherwise than every file of it.
_FILES: dict[str, dict[str, Any]] = {
    "lfm2_vl": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
}
_BEFORE, _AFTER = "cannot be exported: ", "; `lminf families`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="model types; default: all")
    names = parser.parse_args().names
    rows = json.loads(RESULTS.read_text())["rows"] if names and RESULTS.is_file() else {}
    for name in names or multimodal_types():
        with tempfile.TemporaryDirectory() as folder:
            case = BY_NAME.get(name)
            rows[name] = measured(case, Path(folder)) if case else tried(name, Path(folder))
        print(name, rows[name], flush=True)
        content = {"versions": versions(), "rows": dict(sorted(rows.items()))}
        RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def multimodal_types() -> list[str]:
    """Return transformers' model types of several parts that read or write more than text."""
    return sorted(name for name in CONFIG_MAPPING if wrapper_class_name(name) and _has_parts(name))


def _has_parts(name: str) -> bool:
    try:
        content = CONFIG_MAPPING[name]().to_dict()
    except (StrictDataclassError, ValueError):
        return False  # its own defaults are no configuration
    return any(key.endswith("_config") and isinstance(x, dict) for key, x in content.items())


def measured(case: WrapperCase, folder: Path) -> dict[str, Any]:
    """Compare a case's text model with the whole model, saved in both sets of names."""
    whole = case.build()
    tokens = torch.randint(3, 100, (1, 40), generator=torch.Generator().manual_seed(1))
    wanted = whole_logits(case, whole, tokens)
    errors = {}
    for is_old, name in ((True, "hub"), (False, "transformers")):
        case.write(whole, folder / name, is_old=is_old)
        found = text_logits(folder / name, tokens)
        errors[name] = difference(found, wanted)
    export(folder / "hub", folder / "b", window_size=48, num_sink_tokens=4, chunk_size=16)
    model = load(folder / "b")
    logits = model.forward(tokens.numpy(), model.new_state())
    assert logits is not None
    errors["graph"] = difference(torch.from_numpy(logits[0]), wanted)
    return {"text": case.text_type, "scale": case.scale or None, "errors": errors}


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / (wanted.max() - wanted.min()))


def tried(name: str, folder: Path) -> dict[str, Any]:
    """Plan a type's default configuration as an export does."""
    CONFIG_MAPPING[name]().save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    if name in _FILES:
        content["text_config"] |= _FILES[name]
    path.write_text(json.dumps(content))
    try:
        source = open_source(folder)
        find_family(source.model_type).plan(source.config, LambdaConfig(8))
    except LminfError as error:
        reason = str(error).partition(_BEFORE)[2] or str(error)
        return {"reason": reason.partition(_AFTER)[0].replace(str(folder), "…")}
    return {"text": source.model_type}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("transformers", "torch")}


if __name__ == "__main__":
    main()
