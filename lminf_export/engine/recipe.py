"""How to build the same plan with NVIDIA's own `trtexec`, here or on another machine."""

from __future__ import annotations

import shlex
from pathlib import Path

from lminf_export.bundle.records import EngineRecipe
from lminf_export.engine.common import EngineRequest, Profile, input_ranges, profiles
from lminf_export.engine.plugin import PLUGIN_FILE

_MIB = 2**20


def make_recipe(request: EngineRequest) -> EngineRecipe:
    """Return the recipe of a request whose graph is prepared; its files lie in one folder."""
    return EngineRecipe(
        graph=request.onnx_path.name,
        file=request.plan_path.name,
        profiles=profiles(request),
        needs_plugin=request.with_plugin,
        embed_plugin=request.with_plugin and request.options.embed_plugin,
        options=request.options.described(),
        command=trtexec_line(request),
    )


def trtexec_line(request: EngineRequest) -> str:
    """Return the command; it runs in the folder of the graph."""
    options = request.options
    words = [
        "trtexec",
        f"--onnx={request.onnx_path.name}",
        f"--saveEngine={request.plan_path.name}",
        # The default of 11.x; 10.x needs the flag.
        "--stronglyTyped",
        "--noTF32",
        "--skipInference",
    ]
    if request.with_plugin:
        library = f"./{request.plugin_path.name if request.plugin_path else PLUGIN_FILE}"
        if options.declares_aliases:
            words.append("--preview=+aliasedPluginIO1003")
        words.append(f"--dynamicPlugins={library}")
        if options.embed_plugin:
            words.append(f"--setPluginsToSerialize={library}")
    if options.workspace is not None:
        words.append(f"--memPoolSize=workspace:{int(options.workspace) / _MIB:.6g}M")
    if options.builder_optimization_level is not None:
        words.append(f"--builderOptimizationLevel={options.builder_optimization_level}")
    if options.timing_cache is not None:
        words.append(f"--timingCacheFile={Path(options.timing_cache).name}")
    for index, ranges in enumerate(profiles(request)):
        words.append(f"--profile={index}")
        for which, name in enumerate(("min", "opt", "max")):
            words.append(f"--{name}Shapes={_shapes(request, ranges, which)}")
    return shlex.join(words)


def trtexec_script(recipe: EngineRecipe) -> str:
    """Return a shell script that builds the plan in the folder it lies in.

    `TRTEXEC` in the environment names another trtexec than that of the path.
    """
    _, *words = shlex.split(recipe.command)
    lines = [
        "#!/bin/sh",
        f"# Builds {recipe.file} from {recipe.graph} with NVIDIA's trtexec, of TensorRT "
        f"{'10.3' if recipe.needs_plugin else '10.15'} or",
        "# later, on the machine whose GPU the plan is for. TRTEXEC=PATH names another trtexec.",
        "set -eu",
        'cd -- "$(dirname -- "$0")"',
        'trtexec="${TRTEXEC:-trtexec}"',
        'command -v "$trtexec" >/dev/null || {',
        '  echo "error: $trtexec is not here; it comes with TensorRT, TRTEXEC=PATH names it" >&2',
        "  exit 2",
        "}",
    ]
    if recipe.needs_plugin:
        lines += [
            f"[ -f {PLUGIN_FILE} ] || {{",
            f'  echo "error: {PLUGIN_FILE} must lie beside this script (docs/engines.md)" >&2',
            "  exit 2",
            "}",
        ]
    lines.append(" \\\n  ".join(['"$trtexec"', *map(shlex.quote, words)]))
    plan = shlex.quote(f"lminf add-plan . {shlex.quote('./' + recipe.file)}")
    lines.append(f"echo built, now register it on a machine with lminf-export: {plan}")
    return "\n".join(lines) + "\n"


def _shapes(request: EngineRequest, ranges: Profile, which: int) -> str:
    return ",".join(
        f"{name}:{'x'.join(map(str, shapes[which]))}"
        for name, shapes in input_ranges(request, ranges).items()
    )
