"""The worker behind Dynamo's frontend: its translation, and, from the registry, the whole of it."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lminf_export.bundle.folder import Bundle
from lminf_export.errors import BundleError, ConfigError, InputError, LminfError, SessionError
from lminf_export.runtime.batching.engine import Engine
from lminf_export.runtime.batching.request import Request, Token
from lminf_export.runtime.load import load
from lminf_export.runtime.sampling import SamplingConfig
from tests.support.tiny_bundle import TinyModel

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "dynamo"
TINY = TinyModel(head_dim=8, logits_scale=0.25)
PROMPT = [17, 42, 5, 99, 3]


def example(name: str) -> ModuleType:
    """Load a module of the example, which is no package."""
    spec = importlib.util.spec_from_file_location(f"dynamo_example_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def worker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load the worker; Dynamo's own modules, which it imports, are stand-ins."""
    for name in (
        *("dynamo", "dynamo._core", "dynamo.common", "dynamo.common.backend"),
        *("dynamo.common.backend.run", "dynamo.llm", "dynamo.llm.exceptions"),
    ):
        module: Any = ModuleType(name)
        module.__getattr__ = lambda wanted: type(wanted, (), {})
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "translation", translation)
    folders: Any = ModuleType("model_folder")
    folders.model_folder = model_folder
    monkeypatch.setitem(sys.modules, "model_folder", folders)
    return example("worker")


translation = example("translation")
model_folder = example("model_folder").model_folder
LIMITS = translation.Limits(default_max_tokens=13, context_length=101)


def asked(**parts: dict[str, Any]) -> dict[str, Any]:
    """A request with the fields that Dynamo 1.6.1's preprocessor sends, most of them None."""
    empty = {
        "stop_conditions": "max_tokens stop stop_token_ids stop_token_ids_visible "
        "stop_token_ids_hidden min_tokens ignore_eos max_thinking_tokens",
        "sampling_options": "n best_of presence_penalty frequency_penalty repetition_penalty "
        "temperature top_p top_k min_p use_beam_search length_penalty seed "
        "include_stop_str_in_output guided_decoding",
        "output_options": "logprobs prompt_logprobs skip_special_tokens formatted_prompt "
        "return_tokens_as_token_ids",
    }
    found = {
        name: dict.fromkeys(fields.split()) | parts.get(name, {}) for name, fields in empty.items()
    }
    return {"model": "demo", "token_ids": PROMPT, "routing": {}, "annotations": [], **found}


def translated(eos: tuple[int, ...] = (), **parts: dict[str, Any]) -> Request:
    return translation.engine_request(asked(**parts), frozenset(eos), LIMITS)


def greedy(**stops: Any) -> dict[str, dict[str, Any]]:
    return {"sampling_options": {"temperature": 0.0}, "stop_conditions": stops}


@pytest.fixture
def lm(tmp_path):
    TINY.write(tmp_path / "b")
    return load(tmp_path / "b")


def chunks_of(lm: Any, request: Request) -> list[dict[str, Any]]:
    """What the worker sends for a request."""

    async def read() -> list[dict[str, Any]]:
        stream = engine.submit(request)
        return [chunk async for chunk in translation.chunks(stream, str)]

    with Engine(lm, slots=2) as engine:
        return asyncio.run(read())


def ids_of(chunks: list[dict[str, Any]]) -> list[int]:
    return [token for chunk in chunks for token in chunk["token_ids"]]


def test_a_request_that_names_nothing_gets_the_defaults_of_openais_api():
    request = translated()
    assert request.prompt_ids == PROMPT
    assert request.max_new_tokens == 13
    assert request.sampling == SamplingConfig(temperature=1.0)
    assert request.num_logprobs is None


def test_named_settings_reach_the_engine():
    named = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3}
    named |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.25}
    assert translated(sampling_options=named).sampling == SamplingConfig(**named)
    assert translated(sampling_options={"top_k": -1}).sampling.top_k == 0


def test_ends_are_those_of_the_bundle_and_of_the_request():
    ends = {"stop_token_ids": [8], "stop_token_ids_hidden": [9]}
    assert translated((2, 3), stop_conditions=ends).stop_token_ids == {2, 3, 8, 9}
    ends["ignore_eos"] = True
    assert translated((2, 3), stop_conditions=ends).stop_token_ids == {8, 9}


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("sampling_options", "n", 2),
        ("sampling_options", "best_of", 3),
        ("sampling_options", "use_beam_search", True),
        ("sampling_options", "guided_decoding", {"json": {}}),
        ("stop_conditions", "min_tokens", 1),
        ("stop_conditions", "max_thinking_tokens", 5),
        ("output_options", "prompt_logprobs", 0),
    ],
)
def test_what_the_engine_does_not_offer_is_refused_by_name(part, name, value):
    with pytest.raises(InputError, match=rf"{name}=.*does not offer"):
        translated(**{part: {name: value}})


def test_a_value_that_asks_for_nothing_is_no_reason_to_refuse():
    for part, names in translation.NOT_OFFERED.items():
        assert translated(**{part: names}).prompt_ids == PROMPT


@pytest.mark.parametrize(
    "name", ["multi_modal_data", "prefill_result", "encoder_result", "bootstrap_info"]
)
def test_parts_of_other_workers_are_refused(name):
    with pytest.raises(InputError, match=name):
        translation.engine_request({**asked(), name: {"x": 1}}, frozenset(), LIMITS)


@pytest.mark.parametrize("prompt", [None, "text", 3])
def test_a_prompt_that_is_no_list_is_refused(prompt):
    with pytest.raises(InputError, match="token_ids"):
        translation.engine_request({**asked(), "token_ids": prompt}, frozenset(), LIMITS)


def test_prompt_and_answer_fit_the_context_or_are_refused():
    room = LIMITS.context_length - len(PROMPT)
    assert translated(stop_conditions={"max_tokens": room}).max_new_tokens == room
    with pytest.raises(InputError, match="101 together"):
        translated(stop_conditions={"max_tokens": room + 1})
    with pytest.raises(InputError, match="max_tokens"):
        translated(stop_conditions={"max_tokens": -1})


def test_a_wrong_setting_says_which():
    with pytest.raises(ConfigError, match="top_p"):
        translated(sampling_options={"top_p": 3.0})


def test_greedy_chunks_hold_what_the_model_writes_alone(lm):
    expected = list(lm.generate(PROMPT, max_new_tokens=31))
    *parts, last = chunks_of(lm, translated(**greedy(max_tokens=31)))
    assert ids_of(parts) == expected
    assert all(part["token_ids"] and part["index"] == 0 for part in parts)
    assert not any("finish_reason" in part or "log_probs" in part for part in parts)
    assert last == {
        "token_ids": [],
        "index": 0,
        "finish_reason": "length",
        "completion_usage": {"prompt_tokens": 5, "completion_tokens": 31, "total_tokens": 36},
    }


def test_a_hidden_stop_token_is_left_out_and_a_visible_one_is_sent(lm):
    written = list(lm.generate(PROMPT, max_new_tokens=31))
    stop = written[7]
    first = written.index(stop)
    hidden = chunks_of(lm, translated(**greedy(max_tokens=31, stop_token_ids_hidden=[stop])))
    assert ids_of(hidden) == written[:first]
    visible = {"stop_token_ids": [stop], "stop_token_ids_visible": [stop]}
    shown = chunks_of(lm, translated(**greedy(max_tokens=31, **visible)))
    assert ids_of(shown) == written[: first + 1]
    assert hidden[-1]["finish_reason"] == shown[-1]["finish_reason"] == "stop"


def test_log_probabilities_stand_beside_their_tokens(lm):
    *parts, _ = chunks_of(lm, translated(**greedy(max_tokens=7), output_options={"logprobs": 2}))
    assert ids_of(parts) == list(lm.generate(PROMPT, max_new_tokens=7))
    for part in parts:
        assert len(part["log_probs"]) == len(part["top_logprobs"]) == len(part["token_ids"])
        for token, logprob, top in zip(
            part["token_ids"], part["log_probs"], part["top_logprobs"], strict=True
        ):
            assert [entry["rank"] for entry in top] == [1, 2]
            assert (top[0]["token_id"], top[0]["token"]) == (token, str(token))
            assert top[0]["logprob"] == logprob > top[1]["logprob"]


def test_an_impossible_token_has_a_finite_log_probability():
    class Ended:
        finish_reason, num_prompt_tokens, num_tokens = "length", 1, 1

        def take(self):
            return []

        async def __aiter__(self):
            yield Token(3, -0.5, ((3, -0.5), (4, -math.inf)))

    async def read() -> list[dict[str, Any]]:
        return [chunk async for chunk in translation.chunks(Ended(), str)]

    top = asyncio.run(read())[0]["top_logprobs"][0]
    assert [entry["logprob"] for entry in top] == [-0.5, -9999.0]


def test_a_cancelled_request_ends_as_such(lm):
    async def read() -> list[dict[str, Any]]:
        endless = dataclasses.replace(translated(**greedy()), max_new_tokens=None)
        stream = engine.submit(endless)
        found = []
        async for chunk in translation.chunks(stream, str):
            found.append(chunk)
            stream.cancel()
        return found

    with Engine(lm, slots=1) as engine:
        assert asyncio.run(read())[-1]["finish_reason"] == "cancelled"


def test_a_reader_that_was_too_slow_gets_an_error():
    class Slow:
        finish_reason = "slow_reader"

        async def __aiter__(self):
            return
            yield

    async def read() -> None:
        async for _ in translation.chunks(Slow(), str):
            pass

    with pytest.raises(SessionError, match="slow_reader"):
        asyncio.run(read())


def test_a_models_error_is_the_readers(tmp_path):
    TinyModel(head_dim=8, nan_token=PROMPT[-1]).write(tmp_path / "b")
    with pytest.raises(LminfError, match="no token can be chosen"):
        chunks_of(load(tmp_path / "b"), translated(**greedy(max_tokens=31)))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_frontend_reads_tokenizer_template_and_no_weights(demo_bundle, tmp_path):
    bundle = Bundle.open(demo_bundle)
    found = model_folder(bundle, tmp_path / "new" / "folders")
    assert names_in(found) == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        "chat_template.jinja",
    }
    settings = json.loads((found / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 0, "eos_token_id": [bundle.manifest.vocab_size]}


@pytest.mark.parametrize(("ends", "expected"), [((), [257]), ((7,), [7]), ((7, 9), [7, 9])])
def test_a_bundle_without_an_end_gets_one_that_no_text_has(tmp_path, ends, expected):
    found = model_folder(with_config(tmp_path, eos_token_ids=ends), tmp_path / "folders")
    settings = json.loads((found / "generation_config.json").read_text())
    assert settings["eos_token_id"] == expected


def test_workers_of_equal_bundles_share_a_folder_and_others_do_not(tmp_path):
    folders = tmp_path / "folders"
    first, same = (with_config(tmp_path / name) for name in ("a", "b"))
    other = with_config(tmp_path / "c", eos_token_ids=(3,))
    found = [model_folder(bundle, folders) for bundle in (first, same, other)]
    assert found[0] == found[1] != found[2]
    assert names_in(folders) == {found[0].name, found[2].name}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    bundle = with_config(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file cannot be written"):
        model_folder(bundle, tmp_path / "file")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "required: bundle"),
        (["demo", "--slots", "many"], "--slots: invalid int value: 'many'"),
        (["demo", "--discovery-backend", "x"], "--discovery-backend: invalid choice"),
        (["demo", "--slot-count", "3"], "unrecognized arguments"),
    ],
)
def test_a_wrong_option_of_the_worker_costs_one_line(given, words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        worker(monkeypatch).parser().parse_args(given)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize("missing", ["tokenizer", "config"])
def test_a_bundle_that_the_frontend_cannot_read_is_refused(tmp_path, missing):
    bundle = TINY.write(tmp_path / "b", tokenizer=missing != "tokenizer")
    if missing != "config":
        (bundle.path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json and config\.json"):
        model_folder(bundle, tmp_path / "folders")
    assert not (tmp_path / "folders").exists()


def with_config(folder: Path, **sizes: Any) -> Bundle:
    bundle = TinyModel(**sizes).write(folder / "bundle")
    (bundle.path / "config.json").write_text("{}")
    return bundle


@pytest.mark.registry
@pytest.mark.slow
def test_clients_of_dynamo_get_what_the_bundle_writes_alone(tmp_path):
    command = [sys.executable, "-m", "scripts.checks.dynamo_run", "--work", str(tmp_path), "--out="]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
