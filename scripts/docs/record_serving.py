"""Run the commands of docs/serving.md against a real server, and record what they print.

python -m scripts.docs.record_serving            writes benchmarks/results/serving.json
python -m scripts.docs.record_serving --check    writes nothing, compares

What differs each time (ids, dates, the free port) is compared as if it were equal.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

from scripts.docs.recording import place_with_demo, record
from scripts.docs.tables import RESULTS

PORT = 8000
FILE = RESULTS / "serving.json"
_SERVE = "lminf serve demo --slots 4 --session-folder sessions"
# Name → command. `demo` is the exported examples/demo-llama; commands run in its parent.
STEPS = {
    "models": "curl -s localhost:8000/v1/models",
    "completion": """curl -s localhost:8000/v1/completions -H 'content-type: application/json' -d '
{"model": "demo", "prompt": "It is a truth", "max_tokens": 16, "temperature": 0}'""",
    "stream": """curl -sN localhost:8000/v1/chat/completions -d '{
"model": "demo", "messages": [{"role": "user", "content": "Tell me of Elizabeth."}],
"max_tokens": 3, "temperature": 0, "stream": true, "stream_options": {"include_usage": true}}'""",
    "python": """python -c '
from openai import OpenAI
client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
stream = client.chat.completions.create(
    model="demo", messages=[{"role": "user", "content": "Tell me of Elizabeth."}],
    max_tokens=24, temperature=0, stream=True)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="")
'""",
    "logprobs": """curl -s localhost:8000/v1/completions -d '{"prompt": "It is a truth",
"max_tokens": 2, "temperature": 0, "logprobs": 2}'""",
    "first": """curl -si localhost:8000/v1/chat/completions -H 'x-session-id: tea-time' -d '{
"messages": [{"role": "user", "content": "Tell me of Elizabeth."}], "max_tokens": 12,
"temperature": 0}' | grep -e '^x-cached' -e '^x-session' -e '{'""",
    "second": """curl -si localhost:8000/v1/chat/completions -H 'x-session-id: tea-time' -d '{
"messages": [{"role": "user", "content": "And of her sister?"}], "max_tokens": 12,
"temperature": 0}' | grep -e '^x-cached' -e '^x-session' -e '{'""",
    "sessions": "curl -s localhost:8000/v1/sessions",
    "delete": "curl -s -X DELETE localhost:8000/v1/sessions/tea-time",
    "refused": """curl -s localhost:8000/v1/chat/completions -d '{
"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}'""",
    "tokenize": """curl -s localhost:8000/tokenize -d '{"text": "It is a truth"}'""",
    "detokenize": """curl -s localhost:8000/detokenize -d '{"ids": [0, 1258, 332, 259, 1531]}'""",
    "health": "curl -s localhost:8000/healthz; curl -s localhost:8000/readyz",
    "metrics": "curl -s localhost:8000/metrics | grep -e '^lminf_slots' -e '^lminf_new_tokens'",
}
REFUSED = {"address": "lminf serve demo --host 0.0.0.0"}
# From one text of a stream to the next.
_BETWEEN_TEXTS = re.compile(
    r'"},"logprobs":null,"finish_reason":null}\],"usage":null}\n\n'
    r'data: {[^}]*?"choices":\[{"index":0,"delta":{"content":"'
)


def main() -> None:
    record(__doc__, FILE, recorded, differences)


def recorded(folder: Path, bundle: Path | None = None) -> list[dict[str, str]]:
    """Run all commands; return them with their output.

    Args:
        folder: to run in.
        bundle: the exported demo model; made by default.
    """
    tools = place_with_demo(folder, bundle)
    steps = [_step(name, command, folder, tools, PORT) for name, command in REFUSED.items()]
    server = subprocess.Popen(
        f"exec {_SERVE} --port 0", shell=True, cwd=folder, env=tools, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        port = int(line.rsplit(":", 1)[1])
        steps.append(
            {"name": "serve", "command": _SERVE, "output": line.replace(str(port), str(PORT))}
        )
        for name, command in STEPS.items():
            steps.append(_step(name, command, folder, tools, port))
            # Files of conversations are written behind an answer.
            time.sleep(0.3 if name == "second" else 0)
        server.terminate()
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()
    return steps


def differences(steps: list[dict[str, str]]) -> list[str]:
    """Return one line for each command that prints other than recorded."""
    before = json.loads(FILE.read_text(encoding="utf-8"))["steps"]
    if [(s["name"], s["command"]) for s in before] != [(s["name"], s["command"]) for s in steps]:
        return ["other commands were recorded; run python -m scripts.docs.record_serving"]
    return [
        f"{new['name']} prints {new['output']!r}, recorded was {old['output']!r}"
        for old, new in zip(before, steps, strict=True)
        if comparable(old["output"]) != comparable(new["output"])
    ]


def comparable(output: str) -> str:
    """Return an output without what differs each time."""
    # Tokens that came together are one event.
    output = re.sub(_BETWEEN_TEXTS, "", output)
    output = re.sub(r"(cmpl-)[0-9a-f]+", r"\1", output)
    # The last digits of a logarithm depend on the processor.
    output = re.sub(r"-\d+\.\d+", lambda match: f"{float(match[0]):.2f}", output)
    return re.sub(r'("created":)\d+', r"\1", output)


def _step(
    name: str, command: str, folder: Path, tools: dict[str, str], port: int
) -> dict[str, str]:
    found = subprocess.run(
        ["bash", "-c", command.replace(str(PORT), str(port))],
        cwd=folder, env=tools, text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output = found.stdout.replace("\r", "").replace(str(port), str(PORT))
    return {"name": name, "command": command, "output": output}


if __name__ == "__main__":
    main()
