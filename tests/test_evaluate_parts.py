"""The parts of evaluations: text, likelihoods, buckets, intervals, state files, repetition."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import processors

from lminf_export.errors import InputError
from lminf_export.evaluate import passkey_text, text
from lminf_export.evaluate.buckets import estimate, log_buckets, ratio
from lminf_export.evaluate.fluency import distinct, longest_repeat, near_repetition
from lminf_export.evaluate.resume_file import ResumeFile
from lminf_export.evaluate.retrieval import wilson
from lminf_export.runtime.text import TextCodec
from lminf_export.verify.likelihood import negative_log_likelihood
from tests.support.tiny_bundle import byte_tokenizer
from tests.support.tokenizer_kinds import KINDS


@pytest.fixture
def codec(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return TextCodec(tmp_path / "tokenizer.json")


@pytest.fixture
def codec_with_start(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")],
    )
    tokenizer.save(str(tmp_path / "with_start.json"))
    return TextCodec(tmp_path / "with_start.json")


# float32: sums of V terms, and the spacing of floats near 500.
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-11)])
@pytest.mark.parametrize("vocab_size", [3, 257, 70001])
def test_likelihoods_are_those_of_a_float64_softmax(vocab_size, dtype, tolerance):
    dice = np.random.default_rng(0)
    logits = (dice.normal(size=(31, vocab_size)) * 20 + 500).astype(np.float32)
    targets = dice.integers(0, vocab_size, 31)
    wanted = -torch.log_softmax(torch.from_numpy(logits).double(), -1)[torch.arange(31), targets]
    found = negative_log_likelihood(logits, targets, dtype)
    assert found.dtype == dtype
    assert np.abs(found - wanted.numpy()).max() < tolerance


def test_a_length_saved_with_the_tokenizer_does_not_cut_a_text(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(11)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("All of it counts.\n" * 100)
    stream = text.read_stream(TextCodec(tmp_path / "tokenizer.json"), [tmp_path / "text.txt"])
    assert len(stream.ids) == stream.text_tokens == 1800


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_read_in_pieces_has_the_tokens_it_has_in_one(tmp_path, monkeypatch, kind):
    """Also where the tokenizer begins every text with a space."""
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path / "tokenizer.json")
    (tmp_path / "text.txt").write_text("the abc\nthe 日 the\n\n bad\nthe\n" * 20)
    whole = text.read_stream(codec, [tmp_path / "text.txt"]).ids.tolist()
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 30)
    assert text.read_stream(codec, [tmp_path / "text.txt"]).ids.tolist() == whole


def test_buckets_cover_every_context_once_and_have_the_training_length_as_an_edge():
    for tokens, unit in ((2, 16), (1000, 96), (1 << 20, 256), (50, None), (5000, 7)):
        buckets = log_buckets(tokens, unit)
        assert buckets[0].low == 0
        assert buckets[-1].high == tokens - 1
        assert all(a.high == b.low for a, b in pairwise(buckets))
        if unit and tokens > unit + 1:
            assert unit in {bucket.high for bucket in buckets}


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    dice = np.random.default_rng(1)
    hits = 0
    for trial in range(60):
        # Neighbours depend on each other: each block of 16 shares a level.
        levels = dice.normal(3.0, 0.5, 250).repeat(16)
        found = estimate(levels + dice.normal(0, 1, levels.size), seed=trial)
        hits += found.low <= np.exp(3.0) <= found.high
    assert 50 <= hits <= 60, "intervals that ignore the dependence hold it in half the cases"


def test_a_ratio_on_the_same_targets_is_sharper_than_two_perplexities():
    dice = np.random.default_rng(2)
    text_loss = dice.gamma(2, 2, 4000)
    found = ratio(text_loss + 0.01, text_loss + dice.normal(0, 0.05, 4000))
    assert found["low"] < np.exp(0.01) < found["high"]
    assert found["high"] - found["low"] < 0.01
    one = estimate(text_loss)
    assert (one.high - one.low) / one.perplexity > 0.1


def test_a_long_text_is_tokenized_in_pieces_that_add_up(codec, tmp_path, monkeypatch):
    content = "line one\n" * 50 + "x" * 300 + "\nend"
    file = tmp_path / "t.txt"
    file.write_text(content)
    whole = text.read_stream(codec, [file])
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 64)
    pieces = text.read_stream(codec, [file])
    assert pieces.ids.tolist() == whole.ids.tolist()
    assert codec.tokenizer.decode(pieces.ids.tolist()) == content


def test_the_start_token_comes_first_once_and_the_end_token_never(codec_with_start, tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_text("ab")
    two.write_text("cd")
    stream = text.read_stream(codec_with_start, [one, two], max_tokens=12, repeat=True)
    tokens = [codec_with_start.tokenizer.id_to_token(i) for i in stream.ids.tolist()]
    assert tokens == ["<s>", *"abcdabcdabc"]
    assert (stream.num_start_tokens, stream.text_tokens) == (1, 4)
    bare = text.read_stream(codec_with_start, [one], start_tokens=False)
    assert len(bare.ids) == 2


def test_the_same_text_in_other_files_is_another_text(codec, tmp_path):
    for name, content in (("a", "ab"), ("b", "cd"), ("c", "abc"), ("d", "d")):
        (tmp_path / name).write_text(content)
    first = text.read_stream(codec, [tmp_path / "a", tmp_path / "b"])
    second = text.read_stream(codec, [tmp_path / "c", tmp_path / "d"])
    assert first.ids.tolist() == second.ids.tolist()
    assert first.sha256 != second.sha256


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"a", "at least 2"), (b"caf\xe9 au lait", "not UTF-8 (byte 3")],
)
def test_a_text_that_cannot_be_used_is_refused(content, words, codec, tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(words)):
        text.read_stream(codec, [file])


def test_a_state_file_gives_back_what_was_saved(tmp_path):
    path = tmp_path / "state"
    first = ResumeFile.open(path, {"text": "x"})
    track = first.track("lambda", 7)
    track.losses[1:4] = (1, 2, 3)
    track.done, track.snapshot = 3, {"cache": np.arange(5, dtype=np.float16)}
    first.save()
    again = ResumeFile.open(path, {"text": "x"}).track("lambda", 9)
    assert again.losses[1:4].tolist() == [1, 2, 3]
    assert np.isnan(again.losses[4:]).all()
    assert len(again.losses) == 9
    assert again.snapshot is not None
    assert again.snapshot["cache"].dtype == np.float16
    assert [p.name for p in tmp_path.iterdir()] == ["state"], "nothing half-written is left"


def test_a_state_file_of_another_evaluation_is_refused(tmp_path):
    path = tmp_path / "state"
    ResumeFile.open(path, {"bundle": "a", "text": "x"}).save()
    with pytest.raises(InputError, match="its text is not this one's"):
        ResumeFile.open(path, {"bundle": "a", "text": "y"})


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_damaged_state_file_is_refused(content, tmp_path):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(InputError, match="not a readable state file"):
        ResumeFile.open(tmp_path / "state", {})


def test_measures_of_repetition_on_texts_whose_answer_is_known():
    varied, looped = np.arange(1000), np.tile(np.arange(5), 200)
    assert distinct(varied, 4) == 1.0
    assert distinct(looped, 4) == 5 / 997
    assert near_repetition(varied) == 0.0
    assert near_repetition(looped) == pytest.approx(995 / 1000)
    assert longest_repeat(varied) == 0
    assert longest_repeat(looped) == 995
    once = np.concatenate((np.arange(100), np.arange(20, 37), np.arange(200, 300)))
    assert longest_repeat(once) == 17


def test_a_passkey_text_holds_its_key_at_its_place():
    task = passkey_text.compose("04711", 7, 12)
    assert task.prompt.count("04711") == 2
    before, after = task.prompt.split("The pass key is 04711. Remember it. 04711 is the pass key.")
    assert before.count("The grass is green.") == 2
    assert after.endswith("What is the pass key? The pass key is")
    assert task.answer == " 04711"


def test_wilson_intervals_as_published():
    low, high = wilson(0, 10)
    assert (low, high) == (0.0, pytest.approx(0.2775, abs=1e-4))
    low, high = wilson(9, 10)
    assert (low, high) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
