"""`lminf eval`: numbers that agree with the specification, and mistakes that cost one line."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, MptConfig, MptForCausalLM

from lminf_export import export, load
from lminf_export.cli.eval import eval_group
from lminf_export.cli.main import main
from lminf_export.evaluate import lookup, perplexity_reading
from lminf_export.evaluate.baselines import CachedStep
from lminf_export.evaluate.passkey import make_instance
from lminf_export.evaluate.resume_file import ResumeFile
from lminf_export.evaluate.retrieval import ask
from lminf_export.evaluate.scorers import BundleScorer
from lminf_export.evaluate.torch_scorers import TorchModel, recompute
from lminf_export.runtime.kernels import find_kernels
from lminf_export.verify.likelihood import negative_log_likelihood
from tests.support.tiny_bundle import TinyModel
from tests.support.tiny_models import save_llama, save_tokenizer

WINDOW, SINKS, CHUNK, VOCAB = 19, 3, 7, 131


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture(scope="module")
def mpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny-mpt"
    torch.manual_seed(0)
    config = MptConfig(
        d_model=60, n_heads=5, n_layers=2, vocab_size=VOCAB, max_seq_len=400, initializer_range=0.2
    )
    MptForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, VOCAB)
    return folder


def bundle_of(model, folder, **changes):
    settings = {"window_size": WINDOW, "num_sink_tokens": SINKS, "chunk_size": CHUNK, **changes}
    return export(model, folder, **settings)


@pytest.fixture(scope="module")
def bundle(llama, tmp_path_factory):
    return bundle_of(llama, tmp_path_factory.mktemp("bundles") / "llama").path


@pytest.fixture(scope="module")
def mpt_bundle(mpt, tmp_path_factory):
    return bundle_of(mpt, tmp_path_factory.mktemp("bundles") / "mpt").path


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text of 223 tokens."""
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    ids = np.random.default_rng(5).integers(0, VOCAB, 223)
    path.write_text("\n".join(f"w{i}" for i in ids))
    return path


def tokens_of(path):
    return np.array([int(word[1:]) for word in path.read_text().split()])


def run(*arguments):
    return CliRunner().invoke(eval_group, [str(a) for a in arguments])


def result_of(*arguments):
    outcome = run(*arguments, "--json")
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


@pytest.fixture(scope="module")
def compared(bundle, words, tmp_path_factory):
    """An evaluation beside everything, and its state file."""
    state = tmp_path_factory.mktemp("states") / "all.state"
    names = "stock,window,streaming,recompute,reference"
    options = ("--text", words, "--compare", names, "--state", state, "--targets", 23)
    return result_of("perplexity", bundle, *options), state


def losses_in(state, method):
    file = ResumeFile(None, {})
    file._read(state)
    return file.tracks[method].losses


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["bundle", "mpt_bundle"])
def test_the_export_agrees_with_the_specification_to_a_ten_thousandth_of_a_nat(
    kind, words, request, tmp_path
):
    path, state = request.getfixturevalue(kind), tmp_path / "s"
    result_of("perplexity", path, "--text", words, "--compare", "reference", "--state", state)
    difference = losses_in(state, "lambda")[1:] - losses_in(state, "reference")[1:]
    assert len(difference) == 222
    assert np.abs(difference).max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_the_stock_comparison_is_the_unmodified_model_far_beyond_the_window(
    kind, words, request, tmp_path
):
    folder = request.getfixturevalue(kind)
    path = request.getfixturevalue({"llama": "bundle", "mpt": "mpt_bundle"}[kind])
    state = tmp_path / "s"
    result_of("perplexity", path, "--text", words, "--compare", "stock", "--state", state)
    ids = torch.from_numpy(tokens_of(words))[None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert np.abs(losses_in(state, "stock")[1:] - wanted.numpy()).max() < 1e-4


@pytest.mark.slow
def test_the_window_comparison_is_the_export_without_sinks(llama, compared, words, tmp_path):
    without = bundle_of(llama, tmp_path / "b", num_sink_tokens=0)
    result_of("perplexity", without.path, "--text", words, "--state", tmp_path / "s")
    found = losses_in(compared[1], "window")[1:]
    assert np.abs(found - losses_in(tmp_path / "s", "lambda")[1:]).max() < 1e-4


def streaming_by_hand(folder, tokens):
    """StreamingLLM for the last token: a mask and positions given to the stock model, no cache.

    A query sees the sinks at their places and the window behind them. One layer is enough to
    say so: with one layer a key does not depend on what it could see itself.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept = [*tokens[:SINKS], *tokens[-WINDOW:]]
    with torch.no_grad():
        return model(torch.tensor([kept]), use_cache=False).logits[0, -1]


@pytest.mark.sampled
@pytest.mark.parametrize("count", [WINDOW + SINKS, WINDOW + SINKS + 1, 97])
def test_streaming_puts_the_cache_at_positions_by_place(count, words, tmp_path):
    folder = save_llama(tmp_path / "one-layer", num_hidden_layers=1)
    path = bundle_of(folder, tmp_path / "b").path
    tokens = tokens_of(words)[:count]
    model = TorchModel(load(path).bundle)
    step = CachedStep(model.plan, SINKS, WINDOW, by_cache_place=True)
    for start in range(0, count, CHUNK):
        piece = tokens[None, start : start + CHUNK]
        rows = torch.tensor([[piece.shape[1] - 1]])
        logits = model.logits(piece, step, rows)[0, 0]
        step.advance(piece.shape[1])
    assert (logits - streaming_by_hand(folder, tokens)).abs().max() < 1e-4


def test_recomputation_is_the_stock_model_on_the_last_tokens(llama, bundle, words):
    tokens = tokens_of(words)
    model = TorchModel(load(bundle).bundle)
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    found = {}
    for targets, losses in recompute(model, tokens, 1, [5, WINDOW, WINDOW + 1, 100, 222], WINDOW):
        found |= dict(zip(targets, losses.tolist(), strict=True))
    for target, loss in found.items():
        context = tokens[:target]
        if target > WINDOW:
            context = np.append(tokens[:1], tokens[target - WINDOW + 1 : target])
        with torch.no_grad():
            logits = stock(torch.from_numpy(context)[None]).logits[0, -1]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[target]))
        assert abs(loss - wanted.item()) < 1e-4
    assert len(found) == 5


def test_all_agree_inside_the_window_and_share_their_targets(compared):
    result, state = compared
    own = losses_in(state, "lambda")
    for name in ("stock", "window", "streaming", "reference", "recompute"):
        inside = losses_in(state, name)[1 : WINDOW + 1]
        known = ~np.isnan(inside)
        assert known.sum() > 10, name
        assert np.abs(inside - own[1 : WINDOW + 1])[known].max() < 1e-4, name
    assert result["buckets"] == [[1, 29], [30, 58], [59, 116], [117, 222]]
    rows = result["methods"]["recompute"]["by_bucket"]
    assert [row["targets"] for row in rows] == [23, 23, 23, 23]
    last = rows[-1]
    assert last["lambda_over_this"]["ratio"] == pytest.approx(
        last["lambda_on_the_same_targets"] / last["perplexity"], rel=1e-5
    )


def test_a_stopped_evaluation_goes_on_where_it_stopped(bundle, words, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    result_of("perplexity", bundle, "--text", words, "--compare", "window", "--state", whole)
    seen = []
    original = BundleScorer.score

    def stopping(self, tokens, targets):
        seen.append(len(tokens))
        if len(seen) == 15:
            raise KeyboardInterrupt
        return original(self, tokens, targets)

    monkeypatch.setattr(BundleScorer, "score", stopping)
    monkeypatch.setattr(perplexity_reading, "SAVE_SECONDS", 0.0)
    options = ("--text", words, "--compare", "window", "--state", tmp_path / "s")
    assert run("perplexity", bundle, *options).exit_code == 130
    assert run("perplexity", bundle, *options).exit_code == 0
    assert sum(seen) == 222 + CHUNK, "only the interrupted chunk is read twice"
    for method in ("lambda", "window"):
        assert np.array_equal(
            losses_in(tmp_path / "s", method), losses_in(whole, method), equal_nan=True
        )


def test_a_finished_evaluation_can_be_lengthened(bundle, words, tmp_path):
    options = ("--text", words, "--state", tmp_path / "s", "--compare", "streaming")
    result_of("perplexity", bundle, *options, "--max-tokens", 90)
    result_of("perplexity", bundle, *options)
    fresh = ("--text", words, "--state", tmp_path / "fresh", "--compare", "streaming")
    result_of("perplexity", bundle, *fresh)
    for method in ("lambda", "streaming"):
        found, wanted = losses_in(tmp_path / "s", method), losses_in(tmp_path / "fresh", method)
        # Chunks end elsewhere, so sums are rounded differently.
        assert np.abs(found - wanted)[1:].max() < 1e-4


def test_a_comparison_ends_with_its_budget_and_says_so(bundle, words):
    result = result_of(
        *("perplexity", bundle, "--text", words, "--compare", "stock,recompute"),
        *("--budget", "1e-9", "--max-tokens", 700, "--repeat"),
    )
    assert result["methods"]["lambda"]["tokens_read"] == 699
    for name in ("stock", "recompute"):
        assert "time budget" in result["methods"][name]["stopped"]
        assert result["methods"][name]["by_bucket"][-1] is None


def test_text_table_json_and_picture(bundle, words, tmp_path):
    out, plot = tmp_path / "r.json", tmp_path / "p.png"
    outcome = run("perplexity", bundle, "--text", words, "--out", out, "--plot", plot)
    assert outcome.exit_code == 0, outcome.output
    assert "117 – 222" in outcome.output
    result = json.loads(out.read_text())
    assert result["texts"] == ["words.txt"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.png", "r.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--text", "missing.txt"), "missing.txt"),
        (("--text", "{words}", "--compare", "stock,oracle"), "unknown comparison 'oracle'"),
        (("--text", "{words}", "--max-tokens", 1), "at least 2"),
        (("--text", "{words}", "--repeat"), "no end of its own"),
        (("--text", "{words}", "--out", "nowhere/r.json"), "nowhere does not exist"),
        (("--text", "{words}", "--plot", "p.docx"), "must end in one of"),
        (("--text", "{words}", "--state", "nowhere/s"), "nowhere does not exist"),
        (("--text", "{words}", "--targets", 0), "at least 1"),
        (("--text", "{words}", "--budget", 0), "above 0"),
        (("--text", "{words}", "--compare", "stock", "--model", "{other}"), "other layers"),
    ],
)
def test_a_mistake_costs_one_line(arguments, said, bundle, words, tmp_path):
    other = tmp_path / "other"
    if "{other}" in arguments:
        save_llama(other, num_hidden_layers=2)
    filled = [str(a).format(words=words, other=other) for a in arguments]
    outcome = run("perplexity", bundle, *filled)
    assert outcome.exit_code == 2
    assert said in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1


def test_the_state_of_another_bundle_or_text_is_refused(
    compared, mpt_bundle, bundle, words, tmp_path
):
    other = tmp_path / "other.txt"
    other.write_text("w1 w2 w3")
    for path, text in ((mpt_bundle, words), (bundle, other)):
        outcome = run("perplexity", path, "--text", text, "--state", compared[1])
        assert outcome.exit_code == 2
        assert "state of another evaluation" in outcome.stderr


def test_a_bundle_without_a_tokenizer_is_refused(tmp_path, words):
    bare = TinyModel().write(tmp_path / "b", tokenizer=False)
    for arguments in (
        ("perplexity", bare.path, "--text", words),
        ("passkey", bare.path),
        ("generate", bare.path, "--prompt", "a"),
    ):
        outcome = run(*arguments)
        assert outcome.exit_code == 2
        assert "no tokenizer.json" in outcome.stderr


@pytest.fixture(scope="module")
def byte_bundle(tmp_path_factory):
    """A bundle that reads bytes: a passkey text has a token for every character."""
    tiny = TinyModel(window_size=307, num_sink_tokens=5, chunk_size=64)
    return tiny.write(tmp_path_factory.mktemp("bytes") / "b").path


def test_a_key_is_placed_where_it_is_said_to_be(byte_bundle):
    model = load(byte_bundle)
    decode = model.codec.tokenizer.decode
    near = make_instance(model, 1000, 1.0, 3, random.Random(0))
    far = make_instance(model, 1000, 0.0, 3, random.Random(0))
    assert (near.place, far.place) == ("window", "evicted")
    assert 970 < len(near.prompt) <= 1000
    for made in (near, far):
        assert decode(made.candidates[0]).strip() in decode(made.prompt)
        assert all(decode(c).strip() not in decode(made.prompt) for c in made.candidates[1:])


def test_a_key_in_the_sinks_is_seen_there(tmp_path):
    model = load(
        TinyModel(window_size=61, num_sink_tokens=500, chunk_size=64).write(tmp_path / "b").path
    )
    assert make_instance(model, 1500, 0.0, 3, random.Random(0)).place == "sinks"
    assert make_instance(model, 1500, 0.6, 3, random.Random(0)).place == "evicted"


def test_ranks_are_those_of_reading_each_candidate_by_itself(byte_bundle):
    model = load(byte_bundle)
    made = [make_instance(model, n, 0.5, 4, random.Random(n)) for n in (420, 700, 333)]
    for instance, (exact, rank) in zip(made, ask(model, made), strict=True):
        losses = []
        for candidate in instance.candidates:
            ids = np.array([*instance.prompt, *candidate])
            logits = model.forward(ids[None, :-1], model.new_state())[0, len(instance.prompt) - 1 :]
            losses.append(negative_log_likelihood(logits, ids[len(instance.prompt) :]).sum())
            if candidate is instance.candidates[0]:
                assert exact == (logits.argmax(-1) == candidate).all()
        assert rank == 1 + sum(loss < losses[0] for loss in losses[1:])


def test_passkey_table_json_and_picture(byte_bundle, tmp_path):
    options = ("--lengths", "0.5,2", "--depths", "0,100", "--trials", 2, "--distractors", 2)
    outcome = run("passkey", byte_bundle, *options, "--plot", tmp_path / "p.png")
    assert outcome.exit_code == 0, outcome.output
    assert "likeliest of 3" in " ".join(outcome.output.split())
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    outcome = run("lookup", byte_bundle, *options, "--plot", tmp_path / "l.png")
    assert outcome.exit_code == 0, outcome.output
    assert "likeliest of 3" in " ".join(outcome.output.split())
    cells = result_of("passkey", byte_bundle, *options)["cells"]
    assert [(c["windows"], c["depth"]) for c in cells] == [(0.5, 0), (0.5, 1), (2, 0), (2, 1)]
    assert cells[2]["key_is_in"] == {"evicted": 2}


def test_a_record_is_asked_for_by_its_name_beside_codes_of_its_list(byte_bundle):
    model = load(byte_bundle)
    decode = model.codec.tokenizer.decode
    for depth, place in ((1.0, "window"), (0.0, "evicted")):
        made = lookup.make_instance(model, 2000, depth, 3, random.Random(1))
        text = decode(made.prompt)
        name = text[text.rindex("What is the code of ") + 20 : text.rindex("?")]
        right, *wrong = (decode(candidate).strip() for candidate in made.candidates)
        record = f"The code of {name} is {right}."
        assert text.count(record) == 1
        assert all(f"is {code}." in text for code in wrong)
        assert made.place == place
        assert made.distance == len(made.prompt) + 5 - (text.index(record) + len(record) - 6)
        assert 1900 < len(made.prompt) <= 2000


def test_a_list_of_one_record_still_has_wrong_codes(byte_bundle):
    made = lookup.make_instance(load(byte_bundle), 1, 0.5, 3, random.Random(1))
    assert len({tuple(candidate) for candidate in made.candidates}) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lengths", "1,two"), "numbers separated by commas"),
        (("--lengths", "0"), "above 0"),
        (("--depths", "150"), "between 0 and 1"),
        (("--trials", 0), "at least 1"),
        (("--distractors", 100000), "there are 100000"),
    ],
)
@pytest.mark.parametrize("task", ["passkey", "lookup"])
def test_a_mistake_in_a_task_costs_one_line(task, arguments, said, byte_bundle):
    outcome = run(task, byte_bundle, *arguments)
    assert outcome.exit_code == 2
    assert said in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1


def test_what_is_written_is_measured_segment_by_segment(bundle, words, tmp_path):
    result = result_of(
        *("generate", bundle, "--prompt", "w1 w2 w3", "--tokens", 120, "--segment", 40),
        *("--reference", words, "--plot", tmp_path / "p.png", "--save-text", tmp_path / "t.txt"),
    )
    assert [row["from"] for row in result["segments"]] == [1, 41, 81]
    assert len(result["reference"]["segments"]) == 5
    assert len((tmp_path / "t.txt").read_text().split()) == 123
    # The model predicts what it writes better than random words.
    assert result["segments"][0]["perplexity"] < result["reference"]["segments"][0]["perplexity"]
    again = result_of("generate", bundle, "--prompt", "w1 w2 w3", "--tokens", 120, "--segment", 40)
    assert again["segments"] == result["segments"]


def test_a_mistake_in_generate_costs_one_line(bundle, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3")
    for arguments, said in (
        (("--tokens", 100), "at least one segment"),
        (("--tokens", 100, "--segment", 3), "at least 8"),
        (("--tokens", 100, "--segment", 50), "give --prompt"),
        (("--prompt", "w1", "--tokens", 20, "--segment", 10, "--temperature", -1), "temperature"),
        (
            ("--prompt", "w1", "--tokens", 20, "--segment", 10, "--reference", short),
            "fewer than a segment",
        ),
    ):  # fmt: skip
        outcome = run("generate", bundle, *arguments)
        assert outcome.exit_code == 2, outcome.output
        assert said in outcome.stderr


def test_a_truncated_bundle_is_refused(bundle, words, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / "model.safetensors").write_bytes(b"short")
    outcome = run("perplexity", copy, "--text", words)
    assert outcome.exit_code == 2
    assert "model.safetensors" in outcome.stderr


COMMANDS = {
    "perplexity": ("--max-tokens", 60),
    "passkey": ("--lengths", 2, "--depths", 50, "--trials", 1, "--distractors", 1),
    "lookup": ("--lengths", 2, "--depths", 50, "--trials", 1, "--distractors", 1),
    "generate": ("--prompt", "w1 w2 w3", "--tokens", 40, "--segment", 40),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_evaluation_lets_its_kernels_be_chosen(command, bundle, words):
    text = ("--text", words) if command == "perplexity" else ()
    arguments = (command, bundle, *text, *COMMANDS[command])
    assert result_of(*arguments, "--kernels", "none")["attention"] == "the graph's function body"
    installed = find_kernels("auto", "cpu")
    expected = installed.description if installed else "the graph's function body"
    assert result_of(*arguments)["attention"] == expected
    missing = run(*arguments, "--kernels", "nowhere.so")
    assert missing.exit_code == 2
    assert missing.stderr.count("\n") == 1
    assert "nowhere.so" in missing.stderr


@pytest.mark.parametrize(
    ("words", "command"),
    [(["eval", "passkey", "b", "--trails", "3"], "lminf eval passkey"), (["nosuch"], "lminf")],
)
def test_a_mistake_names_the_help_of_its_own_command(words, command, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lminf", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith(f"(see {command} --help)")
