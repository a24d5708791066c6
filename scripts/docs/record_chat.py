"""Run the commands of docs/chat.md, and record what they print.

python -m scripts.docs.record_chat            writes benchmarks/results/chat.json
python -m scripts.docs.record_chat --check    writes nothing, compares
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from scripts.docs.recording import place_with_demo, record
from scripts.docs.tables import RESULTS

FILE = RESULTS / "chat.json"
_DRAWN = "--temperature 0.7 --top-p 0.9 --threads 1"
_SYSTEM = "Answer as a prophet of old would have answered, and be brief."
# Name → command. `demo` is the exported examples/demo-llama; commands run in its parent.
STEPS = {
    "saved": "printf 'Who was the father of David?\\n/save talk.state\\n' | lminf chat demo "
    f"{_DRAWN} --seed 1 --stop $'\\n'",
    "loaded": "printf 'And of Solomon?\\n/stats\\n' | lminf chat demo --load-state talk.state "
    f"{_DRAWN} --seed 1 --stop $'\\n'",
    "system": f'echo "Who art thou?" | lminf chat demo --system "{_SYSTEM}" '
    f"{_DRAWN} --seed 1 --stop $'\\n'",
    "pinned": f'lminf chat demo --pin-system --system "{_SYSTEM}" < /dev/null',
    "followed": "printf 'In the beginning\\nIt is a truth universally\\n' | lminf generate demo "
    f"--follow --max-new-tokens 24 --stats {_DRAWN} --seed 3",
}
_SPEED = re.compile(r"[\d.]+ tokens/s")


def main() -> None:
    record(__doc__, FILE, recorded, differences)


def recorded(folder: Path, bundle: Path | None = None) -> list[dict[str, str]]:
    """Run all commands; return them with their output.

    Args:
        folder: to run in.
        bundle: the exported demo model; made by default.
    """
    tools = place_with_demo(folder, bundle)
    steps = []
    for name, command in STEPS.items():
        found = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=tools, text=True, timeout=120,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        steps.append({"name": name, "command": command, "output": found.stdout})
    return steps


def differences(steps: list[dict[str, str]]) -> list[str]:
    """Return one line for each command that prints other than recorded, speeds apart."""
    before = json.loads(FILE.read_text(encoding="utf-8"))["steps"]
    if [(s["name"], s["command"]) for s in before] != [(s["name"], s["command"]) for s in steps]:
        return ["other commands were recorded; run python -m scripts.docs.record_chat"]
    return [
        f"{new['name']} prints {new['output']!r}, recorded was {old['output']!r}"
        for old, new in zip(before, steps, strict=True)
        if _SPEED.sub("", old["output"]) != _SPEED.sub("", new["output"])
    ]


if __name__ == "__main__":
    main()
