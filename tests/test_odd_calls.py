"""Whatever a public call of the runtime is given: it works, or raises a LminfError in one line."""

from __future__ import annotations

import copy
import itertools
import pickle
import time

import numpy as np
import pytest

import lminf_export
from lminf_export.errors import LminfError
from lminf_export.operator.settings import LambdaConfig
from lminf_export.runtime.batching.engine import Engine
from lminf_export.runtime.batching.request import Request
from lminf_export.runtime.language_model import LanguageModel
from lminf_export.runtime.one_stream import OneStream
from lminf_export.runtime.parking.session_store import SessionStore
from lminf_export.runtime.sampling import Sampler, SamplingConfig, logprobs_of
from lminf_export.runtime.snapshot import Snapshot
from lminf_export.runtime.text import StopStrings, StopText, StreamText
from lminf_export.runtime.text_stream import StreamDecoder
from tests.support.odd_values import IDS, NUMBERS, OBJECTS, TEXTS, odd
from tests.support.tiny_bundle import TinyModel

TINY = TinyModel(eos_token_ids=(256,))
V = TINY.vocab_size
# A machine that is busy with other things may need a while; a call that hangs needs longer.
LONGEST_CALL = 20
SETTINGS = {
    "temperature": 0.8,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "seed": 3,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {3: 5.0},
}
PROMPT = [72, 101, 108]


class Case:
    """What odd calls are made of: one model, its state, and random arguments."""

    def __init__(self, lm, rng):
        self.lm, self.rng = lm, rng
        self.state = lm.new_state(2)
        self.single = lm.new_state()
        self.shared_engine = Engine(lm, 4, max_waiting=8)

    def arguments(self, valid, *likely):
        """Valid arguments, of which most often one is replaced by something odd."""
        found = dict(valid)
        for _ in range(int(self.rng.choice([0, 1, 1, 1, 2]))):
            found[str(self.rng.choice(list(found)))] = odd(self.rng, *likely)
        return found

    def some_settings(self):
        chosen = {name: SETTINGS[name] for name in SETTINGS if self.rng.random() < 0.4}
        return chosen or {"temperature": 0.5}

    def load(self):
        valid = {
            "path": self.lm.bundle.path,
            "provider": "cpu",
            "threads": 1,
            "kernels": self.lm.kernels_of_the_test,
            "verify": "fast",
            "cuda_graphs": True,
            "trust_plan": False,
            "revision": None,
        }
        arguments = self.arguments(valid, NUMBERS, TEXTS, OBJECTS)
        threads = arguments["threads"]
        if isinstance(threads, int) and 2 < threads < 5000:
            return
        path = arguments.pop("path")
        lm = lminf_export.load(path, **arguments)
        assert lm.forward([PROMPT], lm.new_state()).shape == (1, 3, V)

    def new_state(self):
        size = odd(self.rng, NUMBERS)
        assert self.lm.new_state(size).batch_size == int(size)

    def forward(self):
        valid = {
            "token_ids": [[1, 2, 3], [4, 5, 6]],
            "state": self.state,
            "lengths": [3, 2],
            "logits": "all",
        }
        arguments = self.arguments(valid, IDS, NUMBERS)
        before = self.state.past_length
        try:
            found = self.lm.forward(arguments.pop("token_ids"), arguments.pop("state"), **arguments)
        except LminfError:
            assert (self.state.past_length == before).all()
            raise
        assert found is None or np.isfinite(found).all()

    def generate(self):
        valid = {
            "prompt_ids": PROMPT,
            "max_new_tokens": 3,
            "stop_token_ids": [9],
            "state": None,
            **self.some_settings(),
        }
        arguments = self.arguments(valid, NUMBERS, IDS)
        tokens = list(
            itertools.islice(self.lm.generate(arguments.pop("prompt_ids"), **arguments), 5)
        )
        assert all(type(token) is int and 0 <= token < V for token in tokens)

    def sampling_config(self):
        config = SamplingConfig(**self.arguments(self.some_settings(), NUMBERS))
        assert hash(config) == hash(SamplingConfig(**vars(config)))
        sampler = Sampler(config, V, 8)
        sampler.observe(PROMPT)
        logits = self.rng.normal(size=V).astype(np.float32)
        assert 0 <= sampler.choose(logits) < V

    def sampler(self):
        valid = {"config": SamplingConfig(**self.some_settings()), "vocab_size": V, "memory": 8}
        sampler = Sampler(**self.arguments(valid, NUMBERS, OBJECTS))
        sampler.observe(odd(self.rng, IDS))
        logits = self.rng.normal(size=V).astype(np.float32)
        sampler.choose(logits if self.rng.random() < 0.5 else odd(self.rng, IDS, OBJECTS))

    def logprobs_of(self):
        logits = self.rng.normal(size=V).astype(np.float32)
        arguments = self.arguments({"logits": logits, "token": 3, "count": 4}, NUMBERS, OBJECTS)
        value, top = logprobs_of(**arguments)
        assert value <= 0
        assert len(top) <= V

    def encode(self):
        codec = self.lm.codec
        if self.rng.random() < 0.5:
            ids = codec.ids(odd(self.rng, TEXTS))
        else:
            ids = codec.encode(odd(self.rng, TEXTS), add_special_tokens=odd(self.rng))
        assert all(0 <= token < V for token in ids)

    def stream(self):
        valid = {"token_ids": PROMPT, "after": [1], "stop": ["zz"]}
        arguments = self.arguments(valid, IDS, TEXTS)
        pieces = self.lm.codec.stream(arguments.pop("token_ids"), **arguments)
        assert all(isinstance(piece, str) for piece in itertools.islice(pieces, 20))

    def stop_strings(self):
        stops = StopStrings(odd(self.rng, TEXTS))
        assert isinstance(stops.push(odd(self.rng, TEXTS)), str)
        assert isinstance(stops.flush(), str)

    def lambda_config(self):
        valid = {
            "window_size": 8,
            "num_sink_tokens": 2,
            "distance_limit": 9,
            "chunk_size": 4,
            "lambda_layers": "full",
            "rope_regime": None,
        }
        LambdaConfig(**self.arguments(valid, NUMBERS))

    def snapshot(self):
        snapshot = self.state.snapshot()
        if self.rng.random() < 0.5:
            self.state.restore(snapshot if self.rng.random() < 0.3 else odd(self.rng))
        else:
            snapshot.rows(odd(self.rng, IDS))

    def views(self):
        full = self.lm.new_state(3, full=True)
        if self.rng.random() < 0.5:
            view = full.rows(**self.arguments({"start": 0, "stop": 2}, NUMBERS))
            assert self.lm.forward([[1]] * view.batch_size, view) is not None
        else:
            full.copy_row(**self.arguments({"source": 0, "target": 2}, NUMBERS))

    def stand_at(self):
        before = self.single.past_length
        try:
            self.lm.session.stand_at(self.single, odd(self.rng, NUMBERS, IDS))
        except LminfError:
            assert (self.single.past_length == before).all()
            raise
        self.lm.forward([[1]], self.single)

    def session(self):
        session, value = self.lm.session, odd(self.rng, NUMBERS, OBJECTS)
        calls = (
            lambda: session.new_state(value),
            lambda: session.new_state(1, full=value),
            lambda: session.snapshot(value),
            lambda: session.restore(value, self.state.snapshot()),
            lambda: session.stand_at(value, 3),
            lambda: session.fill(self.single, value),
            lambda: session.fill(value, self.rng),
            lambda: self.state.ring_rows(value, 0, 1),
            lambda: self.state.ring_rows("past_key_0", value, 3),
            lambda: self.state.ring_rows("past_key_0", 0, value),
            lambda: StreamDecoder(self.lm.codec.tokenizer, value),
            lambda: StreamDecoder(self.lm.codec.tokenizer).step(value),
            lambda: StopStrings(["a"]).push(value),
        )
        calls[int(self.rng.integers(len(calls)))]()

    def snapshot_of(self):
        good = self.state.snapshot()
        valid = {
            "contract": good.contract,
            "past_length": good.past_length,
            "caches": good.caches,
            "state_id": good.state_id,
        }
        found = Snapshot(**self.arguments(valid, NUMBERS, IDS))
        self.state.restore(found)
        if self.rng.random() < 0.5:
            Snapshot.from_arrays(good.contract, odd(self.rng))

    def store(self):
        store = SessionStore("sessions", ["0123456789abcdef" * 4])
        value, kind = odd(self.rng, NUMBERS, TEXTS, OBJECTS), self.rng.integers(6)
        snapshot = self.single.snapshot()
        if kind == 0:
            valid = {"name": "a", "turn": store.latest("a") + 1, "snapshot": snapshot}
            store.save(**self.arguments(valid, NUMBERS, TEXTS))
        elif kind == 1:
            store.load(**self.arguments({"name": "a", "lm": self.lm}, TEXTS, OBJECTS))
        elif kind == 2:
            assert store.drop(value) in (True, False)
        elif kind == 3:
            assert store.latest(value) >= 0
        elif kind == 4:
            arguments = {"secrets": ["0123456789abcdef" * 4], "max_age": 5}
            SessionStore("sessions", **self.arguments(arguments, NUMBERS, TEXTS))
        else:
            data = snapshot.to_bytes() if self.rng.random() < 0.3 else value
            assert self.lm.snapshot_from_bytes(data).batch_size == 1

    def prime(self):
        state = self.lm.prime(odd(self.rng, IDS, TEXTS))
        assert state.furthest >= 1

    def fork(self):
        n = odd(self.rng, NUMBERS)
        assert len(self.state.fork(n)) == int(n)

    def files(self):
        self.state.save("state")
        before = self.state.past_length
        kind = self.rng.integers(5)
        path = "state" if self.rng.random() < 0.3 else odd(self.rng, TEXTS, OBJECTS)
        if kind == 0:
            arguments = self.arguments({"path": "other", "unread": [1, 2]}, IDS, TEXTS)
            self.state.save(arguments.pop("path"), **arguments)
        elif kind == 1:
            self.state.snapshot().save(path)
        elif kind == 2:
            self.state.load(path)
        elif kind == 3:
            assert self.lm.load_state(path).batch_size == 2
        else:
            assert self.lm.load_snapshot(path).batch_size == 2
        assert (self.state.past_length == before).all()

    def engine(self):
        arguments = {"lm": self.lm, "slots": 2, "max_waiting": 3, "quantum": 4, "chunk_size": 3}
        arguments = self.arguments(arguments, NUMBERS)
        with Engine(arguments.pop("lm"), arguments.pop("slots"), **arguments) as engine:
            assert len(list(engine.submit(Request(PROMPT, 2)))) == 2
            engine.drain(odd(self.rng, tuple(x for x in NUMBERS if x() is not None)))

    def submit(self):
        valid = {
            "prompt_ids": PROMPT,
            "max_new_tokens": 3,
            "sampling": SamplingConfig(**self.some_settings()),
            "stop_token_ids": frozenset((9,)),
            "ends_at": None,
            "num_logprobs": 2,
            "deadline": None,
            "start": None,
            "keep": False,
        }
        request = Request(**self.arguments(valid, NUMBERS, IDS, OBJECTS))
        if self.rng.random() < 0.5:
            streams = [self.shared_engine.submit(request)]
        else:
            n = {"n": 2, "ends_at": None}
            streams = self.shared_engine.submit_many(request, **self.arguments(n, NUMBERS))
        try:
            for stream in streams:
                for token in itertools.islice(stream, 4):
                    assert 0 <= token.id < V
        finally:
            for stream in streams:
                stream.cancel()

    def generate_batch(self):
        valid = {
            "prompts": [PROMPT, "text"],
            "n": 2,
            "stream": True,
            "max_new_tokens": 3,
            "stop": ["zz"],
            "stop_token_ids": [9],
            "num_logprobs": 2,
            "slots": 3,
            **self.some_settings(),
        }
        arguments = self.arguments(valid, NUMBERS, IDS, TEXTS)
        if arguments["stream"] is False:
            arguments["max_new_tokens"] = 3
        found = self.lm.generate_batch(arguments.pop("prompts"), **arguments)
        for piece in itertools.islice(found, 8):
            assert piece.finish_reason is None or isinstance(piece.finish_reason, str)
        if hasattr(found, "close"):
            found.close()

    def one_stream(self):
        stream = OneStream(self.lm if self.rng.random() < 0.9 else odd(self.rng))
        stream.add(PROMPT)
        kind, value = self.rng.integers(5), odd(self.rng, NUMBERS, IDS)
        if kind == 0:
            stream.add(value)
        elif kind == 1:
            stream.unread = value
        elif kind == 2:
            stream.read(value)
        elif kind == 3:
            stream.save("stream")
            stream.load(value if self.rng.random() < 0.7 else "stream")
        else:
            assert len(list(stream.write(max_new_tokens=2, temperature=value))) <= 2
        assert stream.position == stream.state.furthest + len(stream.unread)

    def advance(self):
        state = self.lm.new_state(2)
        good = np.array([1, 0])
        state.advance(good if self.rng.random() < 0.2 else odd(self.rng, NUMBERS, IDS))
        assert state.past_length.min() >= 0

    def step(self):
        valid = {
            "state": self.lm.new_state(2),
            "input_ids": np.array([[1, 2], [3, 4]]),
            "new_length": np.array([2, 1]),
            "logits_index": np.zeros((2, 1), np.int64),
        }
        found = self.lm.session.step(**self.arguments(valid, NUMBERS, IDS))
        assert found.shape == (2, 1, V)

    def text(self):
        codec = self.lm.codec
        value, other = odd(self.rng, NUMBERS, TEXTS), odd(self.rng, IDS, TEXTS)
        kind = self.rng.integers(4)
        if kind == 0:
            codec.ids_behind(value, other)
        elif kind == 1:
            codec.is_special(value)
        elif kind == 2:
            StreamText(codec if self.rng.random() < 0.5 else value, PROMPT, ["zz"]).push(72)
        else:
            StopText(codec, other, ["zz"])(72)

    def model(self):
        bundle, session = self.lm.bundle, self.lm.session
        found = LanguageModel(**self.arguments({"bundle": bundle, "session": session}, OBJECTS))
        assert found.vocab_size == V

    def copies(self):
        copy_one = (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)))
        things = (self.state, self.lm, self.shared_engine, self.state.snapshot())
        thing = things[int(self.rng.integers(len(things)))]
        found = copy_one[int(self.rng.integers(3))](thing)
        assert type(found) in (type(self.state), Snapshot)

    def when_ready(self):
        stream = self.shared_engine.submit(Request(PROMPT, 2))
        value = odd(self.rng) if self.rng.random() < 0.7 else list
        try:
            stream.when_ready(value)
        finally:  # or the requests that were not read would fill the engine
            assert len(list(stream)) == 2


# How often each is called: what takes longer, less often.
CALLS = {
    "load": 100,
    "new_state": 250,
    "forward": 700,
    "generate": 900,
    "sampling_config": 700,
    "sampler": 500,
    "logprobs_of": 300,
    "encode": 300,
    "stream": 400,
    "stop_strings": 300,
    "lambda_config": 300,
    "snapshot": 200,
    "views": 100,
    "stand_at": 200,
    "session": 400,
    "snapshot_of": 200,
    "prime": 200,
    "fork": 100,
    "files": 100,
    "engine": 150,
    "submit": 700,
    "generate_batch": 200,
    "one_stream": 300,
    "advance": 200,
    "step": 200,
    "text": 300,
    "model": 100,
    "copies": 60,
    "when_ready": 100,
    # The number of a row is its seed: new ones stand at the end.
    "store": 250,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return TINY.write(tmp_path_factory.mktemp("b") / "tiny").path


@pytest.fixture(scope="module", params=["auto", "none"], ids=["kernels", "body"])
def lm(request, folder):
    found = lminf_export.load(folder, threads=1, kernels=request.param)
    found.kernels_of_the_test = request.param
    return found


@pytest.mark.parametrize("name", CALLS)
def test_an_odd_call_works_or_is_refused_in_one_line(lm, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rng = np.random.default_rng(list(CALLS).index(name))
    case = Case(lm, rng)
    wanted = list(lm.generate(PROMPT, max_new_tokens=4))
    refused = 0
    for _ in range(CALLS[name]):
        start = time.perf_counter()
        try:
            getattr(case, name)()
        except LminfError as error:
            refused += 1
            message = str(error)
            assert message.strip()
            assert len(message) <= 290
            assert len(message.splitlines()) == 1, message
        assert time.perf_counter() - start < LONGEST_CALL
    assert 0 < refused < CALLS[name]
    # Nothing that was refused has done harm.
    with case.shared_engine as engine:
        assert engine.stats().healthy
        assert [token.id for token in engine.submit(Request(PROMPT, 4))] == wanted
    assert list(lm.generate(PROMPT, max_new_tokens=4)) == wanted
