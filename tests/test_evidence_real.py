"""The evidence on a real model and on very long streams, at tiny sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.evaluation import far_positions, long_reading
from benchmarks.real import checkpoint, generation, pictures, readings, scoring, texts
from lminf_export import export, load
from scripts.docs import evidence_real
from tests.support.tiny_bundle import TinyModel
from tests.support.tiny_models import save_llama

TEXT = "In the beginning was the word, and the word was told again, 12 times. \n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    tiny = TinyModel(window_size=37, num_sink_tokens=5, chunk_size=16)
    return tiny.write(tmp_path_factory.mktemp("bytes") / "b").path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(TEXT * 9)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model whose attention is truly relative, and a text of its words."""
    folder = tmp_path_factory.mktemp("llama")
    model = save_llama(folder / "model", vocab_size=131)
    settings = {"window_size": 19, "num_sink_tokens": 3, "chunk_size": 16, "check": False}
    words = np.random.default_rng(5).integers(0, 131, 400)
    (folder / "words.txt").write_text(" ".join(f"w{i}" for i in words))
    return export(model, folder / "bundle", **settings).path, folder / "words.txt"


class Interrupted(Exception):
    """Stands for a process that is ended."""


def test_a_reading_scores_each_fourth_token_and_goes_on_where_it_stopped(
    bundle, tmp_path, monkeypatch
):
    model = load(bundle, threads=1)
    ids = np.random.default_rng(0).integers(5, model.vocab_size, 1025)
    whole = scoring.read_stream(scoring.BundleReader(model), ids, 1024, tmp_path / "a.npz", "x")
    logits = model.forward(ids[None, :-1], model.new_state())[0]
    every = np.arange(4, 1025, 4)
    nats = scoring.negative_log_likelihood(logits[every - 1], ids[every])
    assert whole["tokens"] == 1024
    assert whole["nats"] == pytest.approx(nats.reshape(4, 64).mean(1).tolist(), abs=1e-4)
    assert whole["nats_of_single"] == pytest.approx([nats[-1]], abs=1e-4)

    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0.0)
    reader = scoring.BundleReader(model)
    read, calls = reader.read, []

    def until_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted
        return read(*arguments)

    reader.read = until_the_third
    with pytest.raises(Interrupted):
        scoring.read_stream(reader, ids, 1024, tmp_path / "b.npz", "x")
    fresh = scoring.BundleReader(model)
    again = scoring.read_stream(fresh, ids, 1024, tmp_path / "b.npz", "x")
    assert int(fresh.state.past_length[0]) == 1024
    assert again["nats"] == pytest.approx(whole["nats"], abs=1e-5)
    other = scoring.BundleReader(model)
    scoring.read_stream(other, ids, 256, tmp_path / "b.npz", "another text")
    assert int(other.state.past_length[0]) == 256, "a state of something else is not used"


def test_far_along_fewer_tokens_are_scored():
    dense, end = scoring.DENSE, scoring.DENSE + 256
    assert (scoring.scored_rows(dense - 256, dense) + dense - 255)[[0, -1]].tolist() == [
        dense - 252,
        dense,
    ]
    sparse = scoring.scored_rows(dense, end) + dense + 1
    assert sparse.tolist() == list(range(dense + 16, end + 1, 16))
    assert all(target % scoring.SINGLE or target in sparse for target in range(dense + 1, end + 1))


def row(nats, **more):
    shown = " ".join(str(value) for value in nats)
    known = {"text": "austen", "training_length": 4096, "tokens": 256 * len(nats)}
    return {**known, "nats": shown, **more}


def test_rows_are_compared_on_the_same_tokens():
    dice = np.random.default_rng(0)
    nats = 3 + 0.1 * dice.standard_normal(32)
    rows = {"lambda": row(nats), "window": row(nats[:20] + np.log(1.25))}
    found = readings.summary(rows["window"], rows)
    assert [(b["from"], b["to"]) for b in found["by_bucket"]] == [
        (1, 1024), (1025, 2048), (2049, 4096), (4097, 5120),
    ]  # fmt: skip
    for bucket in found["by_bucket"]:
        over = bucket["over"]
        assert over["value"] == pytest.approx(1.25, abs=1e-4)
        assert over["low"] == pytest.approx(over["high"], abs=1e-4)
    assert found["beyond"]["value"] == pytest.approx(np.exp(nats[8:20].mean()) * 1.25, rel=1e-4)
    assert "over" not in readings.summary(rows["lambda"], rows)["beyond"]
    longer = readings.summary(row(np.append(nats, nats)), rows)
    assert "over" not in longer["by_bucket"][-1], "there is nothing to compare it with"


def test_tables_and_the_picture_are_made_of_the_rows(monkeypatch, tmp_path):
    settings = {"settings": {"window_size": 1024}, "cache_bytes": 2**20}
    settings["lambda_config"] = {"window_size": 1024, "num_sink_tokens": 16}
    rows = {
        "lambda": row([3.0] * 32, **settings),
        "window": row([3.0 + np.log(1.5)] * 16, **settings),
        "stock": row([3.0 + np.log(0.9)] * 16 + [3.0 + np.log(1.6)] * 16, **settings),
    }
    result = {
        "rows": rows,
        "model": {"name": "tiny"},
        "tokens_of_a_number": 256,
        "summary": {name: readings.summary(found, rows) for name, found in rows.items()},
    }
    monkeypatch.setattr(evidence_real, "readings", lambda: result)
    lines = evidence_real.by_length("lambda", "window", "streaming").splitlines()
    assert lines[0] == "| tokens before the target | Λ export | window only (N = 0) |"
    assert lines[-2:] == [
        "| 2,049 – 4,096 | 20.09 | 30.13 (× 1.500) |",
        "| 4,097 – 8,192 | 20.09 | – |",
    ]
    assert "| 1.5000 (1.5000 – 1.5000) |" in evidence_real.beyond("lambda", "window")
    assert evidence_real.around_training("lambda", "window", "stock").splitlines()[-3:] == [
        "| Λ export | 20.09 | 20.09 | 8,192 | 1.0 |",
        "| window only (N = 0) | 30.13 (× 1.500) | – | 4,096 | 1.0 |",
        "| full cache | 18.08 (× 0.900) | 32.14 (× 1.600) | 8,192 | 1.0 |",
    ]
    words = evidence_real.in_words()
    assert "without its 16 sinks the same window reads 50% worse" in words
    assert "the full cache reads 10.0% better" in words
    assert "Behind the training length (to 8,192) it reads 60% worse than Λ." in words
    with pytest.raises(evidence_real.NotMeasuredError):
        evidence_real.recompute()
    file = tmp_path / "readings.json"
    file.write_text(json.dumps(result))
    pictures.draw(file, tmp_path / "p.svg")
    first = (tmp_path / "p.svg").read_bytes()
    pictures.draw(file, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_bytes() == first


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_a_stream_that_stands_far_away_reads_as_at_the_beginning(llama, kernels):
    bundle, words = llama
    found = far_positions.measure(bundle, [words], kernels, 500, 1)
    assert found["from_position"] < far_positions.CROSSED < found["to_position"]
    moved = found["moved"]
    assert moved["tokens_compared"] == 500
    assert moved["largest_logit_difference"] < 1e-5 * moved["largest_logit_range"]


@pytest.mark.slow
def test_a_comparison_far_away_goes_on_where_it_stopped(llama, tmp_path, monkeypatch):
    bundle, words = llama
    whole = far_positions.measure(bundle, [words], "none", 300, 1)
    step, calls = far_positions.Pair.step, []

    def until_the_third(pair):
        calls.append(pair.done)
        if len(calls) == 3:
            raise Interrupted
        step(pair)

    monkeypatch.setattr(far_positions, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(far_positions.Pair, "step", until_the_third)
    with pytest.raises(Interrupted):
        far_positions.measure(bundle, [words], "none", 300, 1, tmp_path)
    again = far_positions.measure(bundle, [words], "none", 300, 1, tmp_path)
    assert calls[:4] == [0, 48, 96, 96]
    assert again["to_position"] == whole["to_position"]
    assert again["moved"] == pytest.approx(whole["moved"], rel=1e-6)
    assert again["floor"]["tokens_compared"] == 300


@pytest.mark.slow
def test_what_does_not_fit_its_place_would_be_seen(llama, monkeypatch):
    bundle, words = llama
    monkeypatch.setattr(far_positions, "reach", lambda model: 1)
    found = far_positions.measure(bundle, [words], "none", 64, 1)["moved"]
    assert found["largest_logit_difference"] > 1e-3 * found["largest_logit_range"]


@pytest.mark.slow
def test_every_reading_is_compared_with_the_second(bundle, text, tmp_path, monkeypatch):
    out, state = tmp_path / "out.json", tmp_path / "state.npz"
    size = len(TEXT) * 9
    for tokens in (2 * size, 4 * size):
        arguments = ["--bundle", bundle, "--text", text, "--tokens", tokens, "--every", size]
        arguments += ["--state", state, "--out", out]
        monkeypatch.setattr("sys.argv", ["long_reading", *map(str, arguments)])
        long_reading.main()
    result = json.loads(out.read_text())
    assert [mark["tokens"] for mark in result["marks"]] == [size, 2 * size, 3 * size, 4 * size]
    assert [mark["run"] for mark in result["marks"]] == [1, 1, 2, 2]
    third = result["readings"][2]
    # The hand-made model gives up to 60 nats and turns by angles in float32.
    assert third["largest_difference_nats"] < 0.01
    assert third["perplexity"] == pytest.approx(result["readings"][1]["perplexity"], rel=1e-3)


def test_writing_goes_on_where_it_stopped(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "PIECE", 7)
    model, prompt = load(bundle, threads=1), np.array([7, 11, 13])
    whole = generation.Writing(model, prompt, 0.95, tmp_path / "a.npz")
    for _ in range(3):
        whole.piece()
    cut = generation.Writing(model, prompt, 0.95, tmp_path / "b.npz")
    cut.piece()
    again = generation.Writing(model, prompt, 0.95, tmp_path / "b.npz")
    again.piece()
    again.piece()
    assert again.ids.tolist() == whole.ids.tolist()
    np.testing.assert_allclose(again.losses, whole.losses, atol=1e-5)
    stream = np.concatenate([prompt, whole.ids])
    logits = model.forward(stream[None, :-1], model.new_state())[0]
    nats = scoring.negative_log_likelihood(logits, stream[1:])[len(prompt) - 1 :]
    np.testing.assert_allclose(whole.losses, nats, atol=1e-4)


def test_a_book_is_cut_out_of_what_its_publisher_put_around_it():
    whole = "words\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\nbook\n"
    whole += "*** END OF THIS PROJECT GUTENBERG EBOOK X ***\nterms"
    assert texts._inside(whole).strip() == "book"
    assert texts._inside("plain") == "plain"


def test_the_model_that_is_named_is_taken(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    model = checkpoint.open_model(tmp_path, file, None)
    assert (model.path, model.gguf) == (file, file)
    assert model.described()["file"] == "m.gguf"
    twin = checkpoint.open_model(tmp_path, tmp_path, file)
    assert (twin.path, twin.gguf) == (tmp_path, file)
    assert len(twin.sha256) == 64


def test_rows_are_read_to_one_length_then_further_and_not_again(bundle, tmp_path, monkeypatch):
    for name, value in {"FIRST": 256, "LONG": 1024, "BUCKET": 256}.items():
        monkeypatch.setattr(readings, name, value)
    book = tmp_path / "book.txt"
    book.write_text(TEXT * 16)
    monkeypatch.setattr(texts, "path_of", lambda name, work: book)
    monkeypatch.setattr(texts, "described", lambda name, work: {"title": name})
    monkeypatch.setattr(readings.Readings, "bundle", lambda self, settings: bundle)
    model = checkpoint.RealModel(bundle, None, None)
    wanted = [readings.Reading(name, tokens=1024, settings={}) for name in ("lambda", "window")]
    wanted.append(readings.Reading("recompute", tokens=1024, settings={}, method="recompute"))
    order = []
    read = readings.Readings._read

    def noted(self, reading, threads):
        order.append((reading.name, reading.tokens))
        return read(self, reading, threads)

    monkeypatch.setattr(readings.Readings, "_read", noted)
    for tokens in (512, 512, 1024):
        made = readings.Readings(model, tmp_path, tmp_path / "out.json")
        made.make_all(wanted, 1, tokens)
    names = [("lambda", n) for n in (256, 512, 1024)]
    assert [entry for entry in order if entry[0] == "lambda"] == names
    assert order[:4] == [("lambda", 256), ("window", 256), ("lambda", 512), ("window", 512)]
    assert order[-1] == ("recompute", 1024)
    result = json.loads((tmp_path / "out.json").read_text())
    rows = result["rows"]
    assert len(readings.unpacked_numbers(rows["lambda"]["nats"])) == 4
    assert rows["lambda"]["nats"] == rows["window"]["nats"]
    assert result["summary"]["window"]["beyond"]["over"]["value"] == pytest.approx(1.0)
    assert result["summary"]["recompute"]["single"]["numbers"] == 1


def test_what_a_peer_cannot_do_is_said(monkeypatch):
    cell = {"ms_per_token": 12.34}
    refused = {"refused": "its context ends"}
    cells = {"ours fp32": {"512": cell, "2048": cell}, "peer": {"512": cell, "2048": refused}}
    found = {"sections": {"decode-fp32": {"rows": cells}}}
    monkeypatch.setattr(evidence_real, "load", lambda name: found)
    lines = evidence_real.decode().splitlines()
    assert lines[-1] == "peer: its context ends."
    assert "| peer | 12.3 | – |" in lines
    with pytest.raises(evidence_real.NotMeasuredError):
        evidence_real.prefill_and_memory()
