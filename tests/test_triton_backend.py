"""The python backend's model, run by a double of Triton: requests, sequences, errors, its end."""

from __future__ import annotations

import json
import sys
import threading
import time
import types
from dataclasses import dataclass, field

import numpy as np
import pytest

from lminf_export.errors import LminfError, SessionError
from lminf_export.triton.parameters import Parameters
from lminf_export.triton.repository import export_triton
from tests.support.serving import offline_text, wait_until

START, END = 1, 2
# Of the model towards Triton, in threads whose errors nobody sees.
MISTAKES: list[str] = []


@dataclass
class Sender:
    """Where responses go."""

    responses: list = field(default_factory=list)
    is_gone: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    def send(self, response=None, flags=0):
        if self.ended.is_set():
            MISTAKES.append("sent behind the end")
        if response is not None:
            self.responses.append(response)
        if flags:
            self.ended.set()

    def is_cancelled(self):
        return self.is_gone

    def done(self):
        assert self.ended.wait(30)
        return self

    @property
    def text(self):
        return "".join(r.found["text_output"][0].decode() for r in self.responses if r.found)

    @property
    def error(self):
        return self.responses[-1].error


class Request:
    def __init__(self, tensors, sequence=0, flags=0, parameters=None, timeout=0):
        self.tensors, self.sequence, self._flags, self.sender = tensors, sequence, flags, Sender()
        self._parameters, self._timeout = json.dumps(parameters or {}), timeout

    def parameters(self):
        return self._parameters

    def timeout(self):
        return self._timeout

    def get_response_sender(self):
        return self.sender

    def correlation_id(self):
        return self.sequence

    def flags(self):
        return self._flags


class Metric:
    def __init__(self):
        self.value = None

    def set(self, value):
        self.value = value


class MetricFamily:
    GAUGE = 1
    made: dict = {}  # noqa: RUF012

    def __init__(self, name, description, kind):
        self.made[name] = self.metric = Metric()

    def Metric(self, labels):
        return self.metric


@pytest.fixture(scope="module")
def utils():
    """A module of the name that Triton's own has."""
    module = types.ModuleType("triton_python_backend_utils")

    class Tensor:
        def __init__(self, name, array):
            self.name, self.array = name, array

        def as_numpy(self):
            return self.array

        @classmethod
        def from_dlpack(cls, name, array):
            return cls(name, array.copy())

    class InferenceResponse:
        def __init__(self, output_tensors, error=None):
            self.found = {tensor.name: tensor.array for tensor in output_tensors}
            self.error = error

    module.Tensor, module.InferenceResponse = Tensor, InferenceResponse
    module.TritonError = str
    module.MetricFamily = MetricFamily
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    module.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = START
    module.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = END
    module.get_input_tensor_by_name = lambda request, name: (
        Tensor(name, request.tensors[name]) if name in request.tensors else None
    )
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def repository(demo_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    sessions = {"session_folder": str(folder / "sessions"), "threads": "1"}
    return export_triton(
        demo_lm.bundle.path, folder / "models", name="demo", slots=2, parameters=sessions
    )


def loaded(repository, **changed):
    from lminf_export.triton.python_backend import TritonPythonModel

    config = (repository / "demo" / "config.pbtxt").read_text()
    given = {}
    for line in config.splitlines():
        if line.startswith("parameters"):
            _, key, _, value, _ = line.split('"')
            given[key] = value
    parameters = {key: {"string_value": value} for key, value in {**given, **changed}.items()}
    model = TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps({"parameters": parameters}),
            "model_repository": str(repository / "demo"), "model_version": "1",
            "model_name": "demo",
        }
    )  # fmt: skip
    return model


@pytest.fixture
def model(utils, repository):
    found = loaded(repository)
    yield found
    found.finalize()
    assert not MISTAKES


def asked(model, sequence=0, flags=0, parameters=None, timeout=0, **fields):
    """Ask for 20 likeliest tokens; return where the answer goes."""
    sampling = {"max_tokens": 20, "temperature": 0, **fields.pop("sampling", {})}
    tensors = {"sampling_parameters": np.array([json.dumps(sampling).encode()], object)}
    for name, value in fields.items():
        if isinstance(value, str):
            tensors[name] = np.array([value.encode()], object)
        else:
            tensors[name] = np.atleast_1d(np.asarray(value))
    request = Request(tensors, sequence, flags, parameters, timeout)
    model.execute([request])
    return request.sender


def test_text_is_streamed_or_whole(model, demo_lm):
    expected = offline_text(demo_lm, "It is a truth", 20)
    streamed = asked(model, text_input="It is a truth", stream=True).done()
    whole = asked(model, text_input="It is a truth").done()
    assert streamed.text == whole.text == expected
    assert len(streamed.responses) > len(whole.responses) == 1
    last = streamed.responses[-1].found
    assert last["finish_reason"].tolist() == [b"length"]
    assert last["num_output_tokens"].tolist() == [20]
    assert "output_ids" not in last


def test_ids_go_in_and_come_out(model, demo_lm):
    ids = demo_lm.codec.encode("It is a truth")
    answer = asked(model, input_ids=np.array(ids, np.int32), return_output_ids=True).done()
    (response,) = answer.responses
    assert response.found["output_ids"].tolist() == list(demo_lm.generate(ids, max_new_tokens=20))


def test_a_chat_is_answered(model):
    messages = json.dumps([{"role": "user", "content": "Tell me of Elizabeth."}])
    assert asked(model, messages=messages).done().text


def test_a_sequence_goes_on_until_its_end(model, demo_lm):
    whole = offline_text(demo_lm, "It is a truth", 60)
    parts = [asked(model, 5, START, text_input="It is a truth").done()]
    parts.append(asked(model, 5, text_input="").done())
    parts.append(asked(model, 5, END, text_input="").done())
    assert "".join(part.text for part in parts) == whole
    assert "this sequence is not kept" in asked(model, 5, text_input="").done().error
    again = asked(model, 5, START, text_input="It is a truth").done()
    assert again.text == parts[0].text


@pytest.mark.parametrize("sequence", [71, "once"])
def test_start_and_end_together_forget_what_was_kept(model, sequence, demo_lm):
    asked(model, sequence, START, text_input="The king").done()
    both = asked(model, sequence, START | END, text_input="It is a truth").done()
    assert both.text == offline_text(demo_lm, "It is a truth", 20)
    assert "not kept" in asked(model, sequence, text_input="").done().error


def test_start_and_end_together_wait_for_the_sequence_s_answer(model):
    asked(model, 72, START, text_input="It is").done()
    endless = {"max_tokens": 100_000, "ignore_eos": True}
    running = asked(model, 72, text_input="", stream=True, sampling=endless)
    wait_until(lambda: running.responses)
    assert "is being answered" in asked(model, 72, START | END, text_input="It").done().error
    running.is_gone = True
    running.done()


@pytest.mark.slow
def test_a_last_answer_s_state_is_not_kept_for_its_sequence(model, monkeypatch):
    asked(model, 73, START, text_input="It is").done()
    kept = []
    monkeypatch.setattr(model._serving.sessions, "keep", lambda *_: kept.append(1))
    assert asked(model, 73, END, text_input="").done().text
    assert not kept


def test_a_sequence_of_token_ids_goes_on_by_itself(model, demo_lm):
    ids = demo_lm.codec.encode("It is a truth")
    parts = [asked(model, 74, START, input_ids=np.array(ids, np.int32)).done()]
    parts.append(asked(model, 74, input_ids=np.zeros(0, np.int32)).done())
    assert "".join(part.text for part in parts) == offline_text(demo_lm, "It is a truth", 40)


def test_a_sequence_outlives_the_server(utils, repository, demo_lm):
    first = loaded(repository)
    one = asked(first, 11, START, text_input="It is a truth").done()
    first.finalize()
    second = loaded(repository)
    two = asked(second, 11, text_input="").done()
    second.finalize()
    assert one.text + two.text == offline_text(demo_lm, "It is a truth", 40)


@pytest.mark.parametrize("flags", [START, START | END])
def test_start_needs_nothing_of_what_is_stored(utils, demo_lm, tmp_path, flags):
    (tmp_path / "secret").write_text("s" * 64)
    (tmp_path / "secret").chmod(0o600)
    store = {
        "session_store": str(tmp_path / "store"), "session_bytes": "0", "threads": "1",
        "session_secret_file": str(tmp_path / "secret"),
    }  # fmt: skip
    model = loaded(
        export_triton(demo_lm.bundle.path, tmp_path / "models", name="demo", parameters=store)
    )
    first = asked(model, 8, START, text_input="It is a truth").done()
    [stored] = [path for path in (tmp_path / "store").rglob("*") if path.stat().st_size > 100_000]
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    assert "begin it anew by START" in asked(model, 8, text_input="").done().error
    assert asked(model, 8, flags, text_input="It is a truth").done().text == first.text
    going_on = asked(model, 8, text_input="").done()
    model.finalize()
    if flags & END:
        assert "not kept" in going_on.error
    else:
        assert first.text + going_on.text == offline_text(demo_lm, "It is a truth", 40)


def test_requests_share_the_slots_and_a_gone_client_frees_its(model):
    endless = {"max_tokens": 100_000, "ignore_eos": True}
    gone = [asked(model, text_input="It is", stream=True, sampling=endless) for _ in range(2)]
    wait_until(lambda: all(sender.responses for sender in gone))
    waiting = asked(model, text_input="It is")
    time.sleep(0.2)
    for sender in gone:
        sender.is_gone = True
    assert waiting.done().text
    for sender in gone:
        sender.done()
    wait_until(lambda: MetricFamily.made["lminf_slots_busy"].value == 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "give one of text_input, input_ids and messages"),
        ({"text_input": "a", "messages": "[]"}, "give one of"),
        ({"messages": "[]"}, "at least one message"),
        ({"messages": "no json"}, "messages: no JSON"),
        ({"text_input": "a", "sampling": {"max_tokens": 0}}, "max_tokens"),
        ({"text_input": "a", "sampling": {"n": 2}}, "n must be 1"),
        ({"text_input": "a", "sampling": {"top_q": 1}}, "unrecognized"),
        ({"text_input": "a", "sampling": {"prompt": "b"}}, "no parameter of sampling"),
        ({"text_input": "a", "sampling": {"max_tokens": 10**9}}, "max_tokens must be at most"),
        ({"input_ids": np.array([10**6], np.int32)}, "input_ids: token ids are integers 0"),
        ({"text_input": "a", "flags": START}, "needs a sequence id"),
        ({"text_input": "a", "sequence": "x" * 200, "flags": START}, "at most 128 characters"),
        ({"text_input": "a", "sampling": {"logprobs": 1}}, "no output of this model"),
        ({"text_input": "a", "parameters": {"top_q": 1}}, "unrecognized request argument: top_q"),
        ({"text_input": "a", "parameters": {"max_tokens": 3}}, "'max_tokens' is given twice: 20"),
        ({"text_input": "a", "parameters": {"prompt": "b"}}, "prompt is no parameter of sampling"),
        ({"text_input": "a", "parameters": {"stream": True}}, "'stream' is an input"),
        ({"text_input": "a", "parameters": {"sequence_id": 3}}, "sequences are gRPC's"),
        ({"text_input": "a", "parameters": {"priority": 3}}, "priority is not applied"),
        ({"text_input": "a", "timeout": 7}, "timeout is not applied"),
        ({"input_ids": np.zeros(0, np.int32)}, "input_ids is empty"),
        ({"text_input": "a", "stream": np.array([True, False])}, "stream has 2 values; expected"),
    ],
)
def test_wrong_requests_are_told_so(model, fields, words):
    answer = asked(model, fields.pop("sequence", 0), fields.pop("flags", 0), **fields).done()
    assert words in answer.error
    assert "\n" not in answer.error


def test_text_that_is_none_is_told_so(model):
    request = Request({"text_input": np.array([b"\xff\xfe"], object)})
    two = Request({"text_input": np.array([b"a", b"b"], object)})
    model.execute([request, two])
    assert request.sender.done().error == "text_input is no text in UTF-8"
    assert two.sender.done().error == "text_input has 2 texts; expected one"


def test_parameters_of_a_request_are_fields_of_sampling(model, demo_lm):
    # As HTTP's generate has them of clients of other models, beside its own names.
    given = {"max_tokens": 7, "temperature": 0.0, "id": "q", "triton_x": True}
    request = Request({"text_input": np.array([b"It is a truth"], object)}, parameters=given)
    model.execute([request])
    assert request.sender.done().text == offline_text(demo_lm, "It is a truth", 7)
    same = asked(model, text_input="It is a truth", parameters={"max_tokens": 20}).done()
    assert same.text == offline_text(demo_lm, "It is a truth", 20)


def test_messages_speak_of_sequences(model):
    asked(model, 51, START, text_input="It is a truth").done()
    other = asked(model, 51, messages='[{"role": "user", "content": "a"}]').done().error
    gone = asked(model, 52, text_input="a").done().error
    assert "begin it anew by START" in other
    assert "begin it by START" in gone
    assert "session" not in other + gone


def test_a_folder_in_use_is_told_by_its_parameter(model, repository):
    with pytest.raises(SessionError, match=r"^parameter session_folder .* is used by another"):
        loaded(repository)


def test_a_failure_at_the_beginning_leaves_no_thread_and_no_lock(utils, repository, monkeypatch):
    before = set(threading.enumerate())
    with monkeypatch.context() as patched:
        patched.setattr(utils, "MetricFamily", None)
        with pytest.raises(AttributeError):
            loaded(repository)
    wait_until(lambda: set(threading.enumerate()) <= before)
    loaded(repository).finalize()


def test_what_runs_at_the_end_is_told_so(utils, repository):
    model = loaded(repository)
    sender = asked(
        model, text_input="It is", stream=True,
        sampling={"max_tokens": 100_000, "ignore_eos": True},
    )  # fmt: skip
    wait_until(lambda: sender.responses)
    model.finalize()
    assert "shutting down" in sender.done().error


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"threads": "0"}, "threads"),
        ({"threads": "many"}, "threads"),
        ({"slots": "none"}, "slots"),
        ({"api_keys": "k"}, "no place"),
        ({"session_secrets": "s"}, "no place"),
        ({"slot": "3"}, "no setting"),
        ({"threads": "1" * 5000}, "threads"),
        ({"threads": "\u0663"}, "threads"),
        ({"provider": "nonsense"}, "provider='nonsense': must be one of cpu, cuda"),
        ({"kernels": "nonsense"}, "kernels='nonsense': must be auto, none, or"),
        ({"trust_hash": "zz"}, "trust_hash='zz': must be a SHA-256"),
        ({"template": ""}, "'template' is empty"),
        ({"session_folder": ""}, "'session_folder' is empty"),
        ({"template": "a\ud800"}, "no text in UTF-8"),
        ({"template": "x\udcff"}, "no text in UTF-8"),
        ({"template": "a\nb"}, "one line of text"),
        ({"max_requests": "9"}, "max_requests has no place in Triton"),
        ({"max_body_bytes": "9"}, "max_body_bytes has no place in Triton"),
    ],
)
def test_parameters_are_checked(given, words):
    with pytest.raises(LminfError, match=words):
        Parameters.of(given)


def test_parameters_of_triton_s_own_backend_are_left_to_it():
    given = {"EXECUTION_ENV_PATH": "/env.tar.gz", "FORCE_CPU_ONLY_INPUT_TENSORS": "yes"}
    assert Parameters.of(given).settings == {}


def test_a_backend_that_misreads_arrays_is_refused(utils, repository, monkeypatch):
    # As one does that was built for numpy 1, and takes the first element for all.
    misread = classmethod(lambda cls, name, array: cls(name, np.full_like(array, array[0])))
    monkeypatch.setattr(utils.Tensor, "from_dlpack", misread)
    monkeypatch.setattr(np, "__version__", "2.0.0")
    with pytest.raises(SessionError, match="numpy<2"):
        loaded(repository)


def test_an_error_of_the_server_ends_its_request_and_frees_its_session(model, monkeypatch):
    first = asked(model, 31, START, text_input="It is a truth").done()

    def broken(*_):
        raise RuntimeError("nobody expected this")

    with monkeypatch.context() as patched:
        patched.setattr("lminf_export.serve.answering.AnswerText.push", broken)
        assert "an error of the server" in asked(model, 31, text_input="").done().error
    gone = asked(model, 31, text_input="")
    gone.is_cancelled = broken
    assert gone.done().error or gone.text
    # The session stands where it stood, and is not busy.
    again = asked(model, 31, text_input="").done()
    assert first.text
    assert again.text


def test_a_start_that_fails_leaves_the_session(model, demo_lm):
    first = asked(model, 41, START, text_input="It is a truth").done()
    refused = asked(model, 41, START, text_input="x " * 140_000).done()
    assert "at most" in refused.error
    second = asked(model, 41, text_input="").done()
    assert first.text + second.text == offline_text(demo_lm, "It is a truth", 40)
