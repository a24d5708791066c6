"""Ten thousand parked sessions, and ten thousand that were tampered with.

    python -m benchmarks.scaling.parked_sessions --bundle BUNDLE \\
        --out benchmarks/results/parked_sessions.json

A server with a shared store and little memory for sessions. `many`: sessions are begun, each parked
at the end of its answer; the server's memory is sampled. Then sessions are resumed in random order,
beside as many new ones with the same message: how long an answer of one token takes. `mutations`:
objects of a store are changed in every way that an attacker with access to it has (bits, pieces,
lengths, another session's, another secret's, another bundle's, too old), and each is asked for: all
are to be refused by 410, and the engine is to have read nothing.
"""

from __future__ import annotations

import argparse
import random
import secrets
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.serving import servers
from benchmarks.support.result import write_result
from benchmarks.support.script import run_script
from lminf_export.bundle.folder import Bundle
from lminf_export.runtime.environment import describe_bundle, environment
from lminf_export.runtime.parking import seal

MEMORY = 8 << 20  # bytes for sessions, so that nearly all are in the store only
MAX_AGE = 3600.0
SAMPLES = 20
SPREAD = 256


class Fleet:
    """A server whose sessions are in a store.

    Args:
        bundle: that it serves.
        folder: of the store.
    """

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.secret = secrets.token_hex(32)
        self.store = folder / "store"
        file = folder / "secret"
        file.write_text(self.secret)
        more = (
            "--session-store", str(self.store), "--session-secret-file", str(file),
            "--session-bytes", str(MEMORY), "--session-max-age", str(MAX_AGE),
            "--no-prefix-reuse",
        )  # fmt: skip
        self.server = servers.ours("lminf", bundle, 1, 4, *more)
        self.http = httpx.Client(base_url=self.server.url, timeout=60, trust_env=False)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.server.stop()

    def ask(self, name: str, number: int, tokens: int = 1) -> httpx.Response:
        """Ask in a session."""
        body = {
            "prompt": f" Number {number} is a truth", "max_tokens": tokens, "temperature": 0,
        }  # fmt: skip
        return self.http.post("completions", json=body, headers={"x-session-id": name})

    def tokens_read(self) -> float:
        """Return the tokens that the engine has read for prompts."""
        text = self.http.get(self.server.url.removesuffix("/v1") + "/metrics").text
        (line,) = [x for x in text.splitlines() if x.startswith("lminf_prompt_tokens_total{")]
        return float(line.split()[1])

    def objects(self) -> list[Path]:
        """Return the store's objects."""
        return sorted(path for path in self.store.rglob("0*") if path.is_file())


def many(fleet: Fleet, count: int, resumed: int) -> dict[str, Any]:
    """Begin sessions and resume some; return memory and times."""
    samples = []
    for number in range(count):
        fleet.ask(f"s{number}", number).raise_for_status()
        if (number + 1) % (count // SAMPLES) == 0:
            samples.append((number + 1, fleet.server.rss))
    sizes = [path.stat().st_size for path in fleet.objects()]
    order = random.Random(0).sample(range(count), resumed)
    times: dict[str, list[float]] = {"resumed": [], "new": []}
    for place, number in enumerate(order):
        for state, name in (("resumed", f"s{number}"), ("new", f"n{place}")):
            begun = time.perf_counter()
            found = fleet.ask(name, number).raise_for_status()
            times[state].append(time.perf_counter() - begun)
            assert found.headers["x-session-state"] == state
    samples.append((count + resumed, fleet.server.rss))
    # What fills once is full behind the first tenth.
    later = [rss for parked, rss in samples if parked > count / 10]
    return {
        "sessions": count,
        "objects": len(sizes),
        "object_bytes": round(sum(sizes) / len(sizes)),
        "session_bytes": MEMORY,
        "rss_bytes": [{"sessions": parked, "rss": rss} for parked, rss in samples],
        "rss_growth_percent": round((max(later) / later[0] - 1) * 100, 2),
        "resumed_sessions": resumed,
        "answer_ms": {
            state: {
                "p50": round(float(np.percentile(each, 50)) * 1e3, 2),
                "p99": round(float(np.percentile(each, 99)) * 1e3, 2),
            }
            for state, each in times.items()
        },
    }


class Mutator:
    """Ways to change an object.

    Args:
        secret: of the fleet, for objects that a server wrote earlier or with another bundle.
        others: objects of other sessions.
    """

    def __init__(self, secret: str, others: list[bytes]) -> None:
        self.secret, self.others = seal.Secret(secret), others
        self.rng = random.Random(1)
        self.kinds = {
            "bit_of_header": lambda data: self._flipped(data, SPREAD),
            "bit_of_state": lambda data: self._flipped(data, len(data)),
            "cut_short": lambda data: data[: self.rng.randrange(len(data))],
            "longer": lambda data: data + self.rng.randbytes(self.rng.randint(1, SPREAD)),
            "piece_put_in": self._put_in,
            "piece_overwritten": self._overwritten,
            "piece_taken_out": self._taken_out,
            "another_session_s": lambda _: self.rng.choice(self.others),
            "another_state": self._another_state,
            "another_secret_s": lambda data: self._sealed(data, seal.Secret(secrets.token_hex(32))),
            "another_bundle_s": lambda data: self._sealed(data, self.secret, state_id="0" * 64),
            "too_old": lambda data: self._sealed(
                data, self.secret, written=time.time() - MAX_AGE * self.rng.uniform(1.01, 2)
            ),
            "random": lambda data: self.rng.randbytes(self.rng.randint(0, len(data))),
        }

    def _flipped(self, data: bytes, below: int) -> bytes:
        changed = bytearray(data)
        changed[self.rng.randrange(below)] ^= 1 << self.rng.randrange(8)
        return bytes(changed)

    def _put_in(self, data: bytes) -> bytes:
        place = self.rng.randrange(len(data))
        return data[:place] + self.rng.randbytes(self.rng.randint(1, SPREAD)) + data[place:]

    def _overwritten(self, data: bytes) -> bytes:
        place, size = self.rng.randrange(len(data) - SPREAD), self.rng.randint(8, SPREAD)
        return data[:place] + self.rng.randbytes(size) + data[place + size :]

    def _taken_out(self, data: bytes) -> bytes:
        place = self.rng.randrange(len(data) - 1)
        return data[:place] + data[place + self.rng.randint(1, SPREAD) :]

    def _another_state(self, data: bytes) -> bytes:
        """This session's header before another's state."""
        _, mine = seal.unsealed(self.secret, data)
        other = self.rng.choice(self.others)
        _, theirs = seal.unsealed(self.secret, other)
        return data[: len(data) - len(mine)] + bytes(theirs)

    def _sealed(self, data: bytes, secret: seal.Secret, **fields: Any) -> bytes:
        header, state = seal.unsealed(self.secret, data)
        return seal.sealed(secret, replace(header, **fields), bytes(state))


def mutations(fleet: Fleet, count: int) -> dict[str, Any]:
    """Change a session's object again and again; return what became of the requests."""
    for number in range(4):
        fleet.ask(f"m{number}", number, 4).raise_for_status()
    # From now on nothing is in the server's memory: what is asked for is what is stored.
    before = set(fleet.objects())
    fleet.ask("victim", 9, 4).raise_for_status()
    (victim,) = set(fleet.objects()) - before
    good = victim.read_bytes()
    mutator = Mutator(fleet.secret, [path.read_bytes() for path in sorted(before)[:4]])
    for number in range(128):  # makes room for others in memory
        fleet.ask(f"room{number}", number).raise_for_status()
    codes: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    read = fleet.tokens_read()
    names = list(mutator.kinds)
    done = 0
    while done < count:
        kind = names[done % len(names)]
        data = mutator.kinds[kind](good)
        if data == good:
            continue
        victim.write_bytes(data)
        found = fleet.ask("victim", 9)
        code = found.json()["error"]["code"] if found.status_code != 200 else "resumed"
        codes[f"{found.status_code} {code}"] += 1
        by_kind[kind] += found.status_code == 410
        done += 1
    unread = fleet.tokens_read() - read
    victim.write_bytes(good)
    after = fleet.ask("victim", 9).raise_for_status().headers["x-session-state"]
    return {
        "mutations": done,
        "answers": dict(codes),
        "refused_by_kind": dict(by_kind),
        "tokens_read_meanwhile": unread,
        "unchanged_object_afterwards": after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--resumed", type=int, default=2_000)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        with Fleet(arguments.bundle, Path(one)) as fleet:
            parked = many(fleet, arguments.sessions, arguments.resumed)
        with Fleet(arguments.bundle, Path(other)) as fleet:
            tampered = mutations(fleet, arguments.mutations)
    write_result(
        arguments.out,
        {
            "benchmark": "parked_sessions",
            **describe_bundle(bundle.manifest),
            "many": parked,
            "mutations": tampered,
            "environment": environment(),
        },
    )


if __name__ == "__main__":
    run_script(main)
