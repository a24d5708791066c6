"""Run examples/dynamo behind Dynamo's frontend on this machine, and check what clients get.

    python -m scripts.checks.dynamo_run --work /tmp/dynamo              results kept
    python -m scripts.checks.dynamo_run --work /tmp/dynamo --out ''     nothing kept

An environment with Dynamo is made in the folder unless it is there. Frontend and worker listen at
127.0.0.1, find each other through files, and are stopped at the end. Results are kept in
benchmarks/results/dynamo_run.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai

import lminf_export
from benchmarks.support.result import write_result
from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.language_model import LanguageModel
from scripts.checks.dynamo_processes import GRACE_SECONDS, Dynamo, dynamo_running, make_dynamo
from scripts.checks.overlays import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "dynamo_run.json"
MODEL = ROOT / "examples" / "demo-llama"
SLOTS, WAITING, STREAMS = 4, 4, 8
CONTEXT_LENGTH = 393_216  # the worker's default
PROMPTS = (
    "In the beginning",
    "It is a truth",
    "The sea",
    "Elizabeth was",
    "And God said",
    "My lord",
    "There was no",
    "She walked",
)
TOKENS = 64
# It takes longer than the worker's grace period before it drains.
LONG_ANSWER = 4_000
ENDLESS_ANSWER = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of environment and logs")
    parser.add_argument("--bundle", type=Path, help="default: examples/demo-llama, exported")
    parser.add_argument("--out", default=str(RESULTS), help="'' keeps nothing")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    python, versions = make_dynamo(options.work / "environment")
    with tempfile.TemporaryDirectory() as scratch:
        bundle = options.bundle or exported(Path(scratch) / "demo")
        lm = lminf_export.load(bundle)
        alone: tuple[object, ...] = ("--slots", SLOTS, "--max-waiting", WAITING)
        with dynamo_running(python, bundle, options.work, worker_options=alone) as dynamo:
            checks = checked(ONE_WORKER, dynamo, lm)
        affinity = ("--router-session-affinity-ttl-secs", 600)
        with dynamo_running(
            python, bundle, options.work, frontend_options=affinity, num_workers=2
        ) as dynamo:
            checks |= checked(TWO_WORKERS, dynamo, lm)
    result = {
        **environment(),
        "dynamo": versions,
        "bundle": describe_bundle(lm.bundle.manifest),
        "slots": SLOTS,
        "checks": checks,
    }
    write_result(Path(options.out) if options.out else None, result)
    sys.exit(int(not all(check["ok"] for check in checks.values())))


def exported(folder: Path) -> Path:
    """Export the demo model as `make demo` does."""
    return lminf_export.export(MODEL, folder, window_size=256).path


def checked(checks: dict[str, Check], dynamo: Dynamo, lm: LanguageModel) -> dict[str, Any]:
    """Return for each check whether it holds, the seconds it took and, where not, why."""
    found = {}
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            check(dynamo, lm)
            outcome: dict[str, Any] = {"ok": True}
        except (AssertionError, TimeoutError, httpx.HTTPError, openai.OpenAIError) as error:
            outcome = {"ok": False, "why": f"{type(error).__name__}: {error}"[:500]}
        found[name] = {**outcome, "seconds": round(time.perf_counter() - start, 1)}
        print(f"{name}: {'ok' if outcome['ok'] else outcome['why']}", file=sys.stderr)
    return found


def listens_here_only(dynamo: Dynamo, lm: LanguageModel) -> None:
    addresses = dynamo.addresses()
    assert len(addresses) >= 3, addresses
    assert {address for address, _ in addresses} == {"127.0.0.1"}, addresses


def curl_equals_offline(dynamo: Dynamo, lm: LanguageModel) -> None:
    body = {"model": dynamo.model, "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}
    command = ["curl", "--silent", "--show-error", f"{dynamo.url}/v1/completions"]
    command += ["-H", "content-type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    choice = json.loads(done.stdout)["choices"][0]
    require_equal(choice["text"], offline(lm, PROMPTS[0]))
    require_equal(choice["finish_reason"], "length")


def completions_equal_offline(dynamo: Dynamo, lm: LanguageModel) -> None:
    client = dynamo.client()
    for prompt in PROMPTS[:3]:
        options = {"model": dynamo.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        whole = client.completions.create(**options)
        require_equal(whole.choices[0].text, offline(lm, prompt))
        require_equal(whole.usage.completion_tokens, TOKENS)
        require_equal(streamed(dynamo, prompt, TOKENS), whole.choices[0].text)


def chat_equals_offline(dynamo: Dynamo, lm: LanguageModel) -> None:
    messages = [{"role": "user", "content": "Tell me of Elizabeth."}]
    template = ChatTemplate.of(lm.bundle)
    prompt_ids = lm.codec.ids(template.render(messages))
    expected = continued(lm, prompt_ids, TOKENS)
    options = {"model": dynamo.model, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    client = dynamo.client()
    whole = client.chat.completions.create(**options)
    require_equal(whole.choices[0].message.content, expected)
    require_equal(whole.usage.prompt_tokens, len(prompt_ids))
    parts = client.chat.completions.create(**options, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    require_equal(text, expected)


def long_prompt_equals_offline(dynamo: Dynamo, lm: LanguageModel) -> None:
    window = lm.bundle.manifest.lambda_config.window_size
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    prompt = lm.codec.tokenizer.decode(lm.codec.ids(text[: 40 * window])[: 4 * window])
    require_equal(streamed(dynamo, prompt, TOKENS), offline(lm, prompt))


def streams_equal_offline(dynamo: Dynamo, lm: LanguageModel) -> None:
    expected = [offline(lm, prompt, 2 * TOKENS) for prompt in PROMPTS]
    with ThreadPoolExecutor(STREAMS) as pool:
        found = list(pool.map(lambda prompt: streamed(dynamo, prompt, 2 * TOKENS), PROMPTS))
    require_equal(found, expected)


def refuses_what_is_not_offered(dynamo: Dynamo, lm: LanguageModel) -> None:
    body = {"model": dynamo.model, "prompt": "x", "max_tokens": 3}
    for more, expected in (
        ({"min_tokens": 2}, "does not offer"),
        ({"n": 2}, "does not offer"),
        ({"max_tokens": CONTEXT_LENGTH}, "together"),
    ):
        answer = httpx.post(f"{dynamo.url}/v1/completions", json={**body, **more})
        require_equal((more, answer.status_code), (more, 400))
        assert expected in answer.text, answer.text


def too_many_are_told(dynamo: Dynamo, lm: LanguageModel) -> None:
    options = {"model": dynamo.model, "prompt": "x", "max_tokens": ENDLESS_ANSWER, "stream": True}
    streams = [dynamo.client().completions.create(**options) for _ in range(SLOTS + WAITING)]
    dynamo.wait_for_busy(SLOTS, seconds=5)
    body = {"model": dynamo.model, "prompt": "x", "max_tokens": 3}
    require_equal(httpx.post(f"{dynamo.url}/v1/completions", json=body).status_code, 429)
    for stream in streams:
        stream.close()
    dynamo.wait_for_busy(0, seconds=5)
    require_equal(httpx.post(f"{dynamo.url}/v1/completions", json=body).status_code, 200)


def stop_string_frees_its_slot(dynamo: Dynamo, lm: LanguageModel) -> None:
    text = offline(lm, PROMPTS[0])
    stop = text[len(text) // 2 :][:5]
    body = {
        "model": dynamo.model,
        "prompt": PROMPTS[0],
        "max_tokens": ENDLESS_ANSWER,
        "stop": [stop],
    }
    answer = httpx.post(f"{dynamo.url}/v1/completions", json={**body, "temperature": 0}, timeout=60)
    choice = answer.json()["choices"][0]
    require_equal(choice["text"], text[: text.index(stop)])
    require_equal(choice["finish_reason"], "stop")
    dynamo.wait_for_busy(0, seconds=1)


def gone_client_frees_its_slot(dynamo: Dynamo, lm: LanguageModel) -> None:
    stream = dynamo.client().completions.create(
        model=dynamo.model, prompt="The sea", max_tokens=ENDLESS_ANSWER, temperature=0, stream=True
    )
    next(iter(stream))
    require_equal(dynamo.busy(), 1)
    stream.close()
    dynamo.wait_for_busy(0, seconds=5)


def drains(dynamo: Dynamo, lm: LanguageModel) -> None:
    stream = dynamo.client().completions.create(
        model=dynamo.model, prompt="The sea", max_tokens=LONG_ANSWER, temperature=0, stream=True
    )
    parts = iter(stream)
    text = next(parts).choices[0].text
    asked_to_end, reason = time.perf_counter(), None
    dynamo.workers[0].terminate()
    for part in parts:
        for choice in part.choices:
            text += choice.text
            reason = choice.finish_reason or reason
    seconds = time.perf_counter() - asked_to_end
    assert seconds > GRACE_SECONDS, f"the answer ended after {seconds:.2f} s, before the drain"
    require_equal(reason, "length")
    require_equal(text, offline(lm, "The sea", LONG_ANSWER))
    require_equal(dynamo.workers[0].wait(timeout=60), 0)
    body = {"model": dynamo.model, "prompt": "x", "max_tokens": 3}
    assert httpx.post(f"{dynamo.url}/v1/completions", json=body).status_code in (404, 503)


def replicas_take_turns(dynamo: Dynamo, lm: LanguageModel) -> None:
    before = tokens_written(dynamo)
    for prompt in PROMPTS:
        require_equal(streamed(dynamo, prompt, 8), offline(lm, prompt, 8))
    written = [now - then for now, then in zip(tokens_written(dynamo), before, strict=True)]
    require_equal(written, [8 * len(PROMPTS) // 2] * 2)


def sessions_stay(dynamo: Dynamo, lm: LanguageModel) -> None:
    places = set()
    for session in ("a", "b", "c", "d"):
        before = tokens_written(dynamo)
        for prompt in PROMPTS[:3]:
            body = {"model": dynamo.model, "prompt": prompt, "max_tokens": 8}
            url, headers = f"{dynamo.url}/v1/completions", {"x-session-id": session}
            require_equal(httpx.post(url, json=body, headers=headers).status_code, 200)
        written = [now - then for now, then in zip(tokens_written(dynamo), before, strict=True)]
        require_equal(sorted(written), [0, 24])
        places.add(written.index(24))
    require_equal(places, {0, 1})


def tokens_written(dynamo: Dynamo) -> list[int]:
    return dynamo.counts("lminf_new_tokens_total")


def streamed(dynamo: Dynamo, prompt: str, num_tokens: int) -> str:
    """Return the text of a greedy completion that is streamed."""
    parts = dynamo.client().completions.create(
        model=dynamo.model, prompt=prompt, max_tokens=num_tokens, temperature=0, stream=True
    )
    return "".join(choice.text for part in parts for choice in part.choices)


def offline(lm: LanguageModel, prompt: str, num_tokens: int = TOKENS) -> str:
    """Return what the bundle writes behind a prompt, without Dynamo.

    Dynamo's frontend puts no special tokens before a prompt, so none is here.
    """
    return continued(lm, lm.codec.ids(prompt), num_tokens)


def continued(lm: LanguageModel, prompt_ids: list[int], num_tokens: int) -> str:
    tokens = lm.generate(prompt_ids, max_new_tokens=num_tokens)
    return "".join(lm.codec.stream(tokens, after=prompt_ids))


def require_equal(found: object, expected: object) -> None:
    assert found == expected, f"found {found!r}, expected {expected!r}"


Check = Callable[[Dynamo, LanguageModel], None]
ONE_WORKER: dict[str, Check] = {
    "listens at 127.0.0.1 only": listens_here_only,
    "curl: completion equals offline": curl_equals_offline,
    "openai: completions equal offline, whole and streamed": completions_equal_offline,
    "openai: a chat equals offline, whole and streamed": chat_equals_offline,
    "a prompt of four windows equals offline": long_prompt_equals_offline,
    f"{STREAMS} streams over {SLOTS} slots equal offline": streams_equal_offline,
    "what is not offered is refused with 400": refuses_what_is_not_offered,
    "one more than may wait gets 429": too_many_are_told,
    "a stop string ends the text and frees the slot": stop_string_frees_its_slot,
    "a client that goes frees its slot": gone_client_frees_its_slot,
    "SIGTERM lets a running answer finish": drains,
}
TWO_WORKERS: dict[str, Check] = {
    "two workers take turns": replicas_take_turns,
    "requests of a session stay with a worker": sessions_stay,
}


if __name__ == "__main__":
    main()
