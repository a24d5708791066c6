"""The scripts behind docs/evidence.md: corpora, training data, the 5-gram bar, tables."""

from __future__ import annotations

import copy
import random
import struct
import zlib

import pytest
import torch

from benchmarks.support import debian_books
from scripts.docs import evidence
from scripts.train import copying_data, ngram_baseline, training_data, training_loop
from scripts.train import train_demo_models as training


def r_vector(strings):
    """A character vector as R's lazy-load database holds it: serialisation version 3, XDR."""
    raw = b"X\n" + struct.pack(">3i", 3, 0x40203, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    raw += struct.pack(">2i", 16, len(strings))
    for string in strings:
        data = string.encode()
        raw += struct.pack(">2i", 0x40009, len(data)) + data
    return struct.pack(">i", len(raw)) + zlib.compress(raw)


def test_character_vectors_of_r_are_read_in_their_order():
    first, second = ["EMMA", "", "naïve — é"], ["PERSUASION"]
    found = list(debian_books.read_character_vectors(r_vector(first) + r_vector(second)))
    assert found == [first, second]


def test_paragraphs_become_lines():
    lines = ["CHAPTER 1", "", "", "One line", "  and the next.  ", "", "Another."]
    assert debian_books.join_paragraphs(lines) == "CHAPTER 1\nOne line and the next.\nAnother.\n\n"


@pytest.fixture(scope="module")
def tokenizer():
    return training_data.train_tokenizer(
        [("In the beginning was the word, and the word 12. \n" * 50)]
    )


@pytest.mark.parametrize("start", [True, False])
def test_a_batch_is_the_same_in_every_run_and_begins_as_asked(tokenizer, start):
    ids = torch.randint(1, len(tokenizer.get_vocab()), (5000,))
    make = lambda seed: training_data.Batches(ids, tokenizer, seed, start)  # noqa: E731
    ids_of = lambda seed, step: make(seed)[step][0]  # noqa: E731
    assert torch.equal(ids_of(3, 17), ids_of(3, 17))
    assert not torch.equal(ids_of(3, 17), ids_of(4, 17))
    assert not torch.equal(ids_of(3, 17), ids_of(3, 18))
    batch, weights = make(3)[17]
    assert bool((weights[:, 1:] == 1).all())
    assert batch.shape == (training_data.BATCH_SIZE, training_data.CONTEXT)
    assert bool((batch[:, 0] == 0).all()) is start


def test_a_passkey_sequence_holds_questions_with_their_answers(tokenizer):
    ids = training_data.passkey_sequence(tokenizer, 255, random.Random(1))
    assert len(ids) == 255
    text = tokenizer.decode(ids)
    _, question, answer = text.partition("What is the pass key? The pass key is")
    assert question
    key = answer[1:6]
    assert key.isdigit()
    assert f"The pass key is {key}. Remember it." in text


def test_rows_to_be_copied_repeat_and_only_what_was_seen_counts(tokenizer, monkeypatch):
    monkeypatch.setattr(copying_data, "DENSE_SHARES", (1.0, 0.0))
    ids = torch.randint(1, len(tokenizer.get_vocab()), (5000,))
    rows, weights = copying_data.CopyingBatches(ids, tokenizer, 0, True)[0]
    for row, counted in zip(rows[:, 1:].tolist(), weights[:, 1:].tolist(), strict=True):
        period = counted.index(1.0)
        assert copying_data.PERIODS[0] <= period < copying_data.PERIODS[1]
        assert all(counted[period:])
        assert row[period:] == row[:-period]


def test_the_shares_of_rows_change_when_the_decay_begins(tokenizer, monkeypatch):
    monkeypatch.setattr(copying_data, "DENSE_SHARES", (0.0, 1.0))
    monkeypatch.setattr(copying_data, "DECAY_SHARES", (0.0, 0.0))
    ids = torch.full((5000,), 7)
    batches = copying_data.CopyingBatches(ids, tokenizer, 0, True)
    dense, _ = batches[copying_data.DENSE_STEPS - 1]
    text, _ = batches[copying_data.DENSE_STEPS]
    assert all("pass key" in tokenizer.decode(row) for row in dense.tolist())
    assert bool((text[:, 1:] == 7).all())


def test_the_learning_rate_warms_up_stays_and_decays():
    schedule = training.schedule(1000 * training_data.BATCH_SIZE * training_data.CONTEXT)
    rates = [schedule.rate(step) for step in range(1000)]
    assert rates[0] < training.PEAK_LEARNING_RATE / 100
    assert rates[200] == rates[440] == training.PEAK_LEARNING_RATE
    assert rates[999] == pytest.approx(0.02 * training.PEAK_LEARNING_RATE)


def test_every_parameter_has_one_optimizer_and_a_restart_changes_nothing():
    def fresh():
        torch.manual_seed(0)
        model = training.build_model("llama")
        return model, training_loop.Optimizer(model)

    def steps(model, optimizer, count):
        for _ in range(count):
            ids = torch.arange(64).view(2, 32)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step(5e-3)

    model, optimizer = fresh()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(model, optimizer, 1)
    stuck = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not stuck
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, its_optimizer = fresh()
    other.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    steps(model, optimizer, 2)
    steps(other, its_optimizer, 2)
    for name, value in other.named_parameters():
        torch.testing.assert_close(value, model.get_parameter(name), rtol=0, atol=0)


def test_the_paper_and_ours_stand_in_one_table(monkeypatch):
    ours = {
        "training_length": 256,
        "buckets": [[0, 256], [256, 512], [512, 700]],
        "methods": {
            "lambda": {"by_bucket": [{"perplexity": 20.0}, {"perplexity": 21.0}, None]},
            "stock": {"by_bucket": [{"perplexity": 20.0}, {"perplexity": 4321.4}, None]},
        },
    }
    paper = evidence.result_of("paper")
    monkeypatch.setattr(evidence, "result_of", lambda name: paper if name == "paper" else ours)
    lines = evidence.paper("perplexity-tiny").splitlines()
    assert "| MPT-7B | ArXiv | stock | 5.49 | 247.6 | 1,122 | 1,672 | 1,601 | – |" in lines
    assert "| Llama-2 | ArXiv | stock | 3.76 | 8,461 | NaN | NaN | – | – |" in lines
    assert lines[-2:] == [
        "| ours, tiny | held out | stock | 20 | 4,321 | – | – | – | – |",
        "| ours, tiny | held out | Λ export | 20 | 21 | – | – | – | – |",
    ]


def test_the_ngram_model_gives_probabilities_and_learns_what_follows_what():
    dice = random.Random(0)

    def pairs():
        """Draws, each followed by its double: half of the text can be known."""
        drawn = [min(int(dice.paretovariate(0.8)), 99) for _ in range(3000)]
        return [token for draw in drawn for token in (draw, 2 * draw)]

    train, fresh = pairs(), pairs()
    levels = ngram_baseline.build_levels(train, order=3)
    for context in ((), (2,), (2, 3), (5, 10), (77, 3)):
        total = sum(ngram_baseline._probability(levels, context, t, 200) for t in range(200))
        assert total == pytest.approx(1.0)
    unigrams = ngram_baseline.build_levels(train, order=1)
    found = ngram_baseline.loss_under(levels, fresh, 200)
    assert found < 0.7 * ngram_baseline.loss_under(unigrams, fresh, 200)
