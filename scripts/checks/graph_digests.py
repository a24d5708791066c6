"""Digests of what an export writes, to show that a change of the code changes no file.

    graph_digests.py models DIR                     write the tested families' tiny models
    graph_digests.py digest DIR OUT [--tree TREE]   export each in several ways, write OUT (JSON)
    graph_digests.py compare OLD NEW                exit with 1 where two such files differ

Models are made once and exported by each tree of the code: `--tree` names a checkout whose package
is imported instead of this one's.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"window_size": 23, "num_sink_tokens": 5, "chunk_size": 7}
VERSIONS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
# What every model is exported to.
EVERYWHERE: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16-int8-cache": {"dtype": "float16", "kv_cache_dtype": "int8"},
    "int4": {"quantize": "int4"},
    "engine": {"out": "engine.plan", "builder": "none"},
}
# What some are exported to besides; a Llama, one of two windows, one with experts, one of ALiBi.
SOMEWHERE: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "no-sinks": {"num_sink_tokens": 0},
    "many-sinks": {"num_sink_tokens": 31, "distance_limit": 41},
    "all-layers": {"lambda_layers": "all"},
    "int8": {"quantize": "int8", "kv_cache_dtype": "int8"},
    "link": {"weights": "link"},
    "engine-int4": {"out": "engine.plan", "builder": "none", "quantize": "int4"},
    "engine-float32": {"out": "engine.plan", "builder": "none", "dtype": "float32"},
}
MORE = ("llama", "gemma3_text", "gpt_oss", "mpt", "qwen3_moe", "falcon-rw")
# Differs from run to run.
VOLATILE = ("created", "created_at")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    models = commands.add_parser("models")
    models.add_argument("folder", type=Path)
    digest = commands.add_parser("digest")
    digest.add_argument("folder", type=Path)
    digest.add_argument("out", type=Path)
    digest.add_argument("--tree", type=Path, default=ROOT)
    compare = commands.add_parser("compare")
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    options = parser.parse_args()
    if options.command == "models":
        write_models(options.folder)
    elif options.command == "digest":
        write_digests(options.folder, options.out, options.tree.resolve())
    else:
        sys.exit(report(json.loads(options.old.read_text()), json.loads(options.new.read_text())))


def write_models(folder: Path) -> None:
    """Save a model of every tested family, under its name in the tests."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.support import own_families as own
    from benchmarks.support.families import CASES

    for case in CASES:
        case.save(folder / case.model_type)
    for name in own.CASES:
        own.save(name, folder / name)


def write_digests(models: Path, out: Path, tree: Path) -> None:
    """Export every model with a tree's package and write digests of all files."""
    sys.path.insert(0, str(tree))
    import lminf_export

    assert Path(lminf_export.__file__).is_relative_to(tree), lminf_export.__file__
    found: dict[str, Any] = {}
    for model in sorted(path for path in models.iterdir() if path.is_dir()):
        ways = {**EVERYWHERE, **(SOMEWHERE if model.name in MORE else {})}
        for way, settings in ways.items():
            found[f"{model.name}/{way}"] = digests(lminf_export, model, settings)
        print(model.name, flush=True)
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    out.write_text(json.dumps({"versions": versions, "exports": found}, indent=1) + "\n")


def digests(package: Any, model: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Export once; return each file's digest, or the one line of the error."""
    # Beside the models: links need one disk.
    with tempfile.TemporaryDirectory(dir=model.parent.parent) as folder:
        bundle = Path(folder) / "bundle"
        asked = {**SETTINGS, **settings}
        out = bundle / asked.pop("out", "")
        try:
            package.export(model, out, **asked)
        except (package.LminfError, TypeError) as error:  # an old tree's bug is a result, too
            return {"error": f"{type(error).__name__}: {error}"}
        return {
            path.relative_to(bundle).as_posix(): _digest(path)
            for path in sorted(bundle.rglob("*"))
            if path.is_file()
        }


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.name == "lminf.json":
        content = json.loads(data)
        data = json.dumps({k: v for k, v in content.items() if k not in VOLATILE}).encode()
    return hashlib.sha256(data).hexdigest()


def report(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print every difference; return 1 if there is one."""
    exports = {
        name: (old["exports"].get(name), new["exports"].get(name))
        for name in {**old["exports"], **new["exports"]}
    }
    for name, (before, after) in exports.items():
        if before == after:
            continue
        files = {**(before or {}), **(after or {})}
        for file in files:
            one, other = (before or {}).get(file), (after or {}).get(file)
            if one != other:
                print(f"{name}: {file}: {one} -> {other}")
    differ = sum(before != after for before, after in exports.values())
    refused = sum("error" in (after or {}) for _, after in exports.values())
    graphs = sum("model.onnx" in (after or {}) for _, after in exports.values())
    print(
        f"{len(exports)} exports, {graphs} with a model.onnx, {refused} refused alike or not: "
        f"{differ} differ"
    )
    return int(differ > 0)


if __name__ == "__main__":
    main()
