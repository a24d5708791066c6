"""`lminf chat`: what it answers is what the whole conversation yields, and Ctrl-C stops answers."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from lminf_export.cli.main import cli
from lminf_export.errors import BundleError, InputError, LminfError, SessionError
from lminf_export.export.run import export
from lminf_export.runtime import conversation as conversation_module
from lminf_export.runtime.chat_template import ChatTemplate
from lminf_export.runtime.conversation import Conversation
from tests.support.chat_templates import TURNS
from tests.support.pseudo_terminal import PseudoTerminal
from tests.support.signals import default_signals
from tests.support.tiny_bundle import TinyModel

LMINF = [sys.executable, "-m", "lminf_export.cli.main"]
FIRST, SECOND = "In the beginning God made", "And who art thou?"


@pytest.fixture(scope="module")
def bundle(demo_bundle):
    """The demo model, whose chat template the export has carried along."""
    return demo_bundle


@pytest.fixture(scope="module")
def lm(demo_lm):
    return demo_lm


@pytest.fixture(scope="module")
def template(lm):
    return ChatTemplate.of(lm.bundle)


@pytest.fixture
def conversation(lm, template):
    return Conversation(lm, template)


def chat(bundle, *options, lines=()):
    text = "".join(f"{line}\n" for line in lines)
    arguments = [str(option) for option in options]
    return CliRunner().invoke(cli, ["chat", str(bundle), "--threads", "1", *arguments], input=text)


def refused(result):
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert len(line) <= 300
    return line


def said(conversation, text, **settings):
    return "".join(conversation.say(text, max_new_tokens=12, **settings))


def offline(lm, template, *questions, limits=None):
    """The answers' tokens, each from all that came before, read in a state of its own."""
    ids, answers = [], []
    for number, question in enumerate(questions):
        message = [{"role": "user", "content": question}]
        ids += (
            lm.codec.ids_behind(template.turn(message))
            if ids
            else lm.codec.ids(template.render(message))
        )
        limit = limits[number] if limits else 12
        answers.append(list(lm.generate(ids, max_new_tokens=limit)))
        ids += answers[-1]
    return answers, ids


def test_an_answer_is_that_of_the_whole_conversation(conversation, lm, template):
    answers, ids = offline(lm, template, FIRST, SECOND, FIRST)
    for question, answer in zip((FIRST, SECOND, FIRST), answers, strict=True):
        text = said(conversation, question)
        assert text == "".join(lm.codec.stream(answer, after=lm.codec.ids("\n")))
    assert conversation.stream.position == len(ids)
    assert conversation.stream.unread == ids[-1:]


def test_only_what_is_new_is_read_and_the_cache_keeps_its_size(conversation):
    said(conversation, FIRST)
    reads = set()
    for _ in range(30):
        said(conversation, SECOND)
        reads.add(conversation.last.num_read)
    assert len(reads) == 1
    assert conversation.stream.position > 2 * 256
    assert conversation.stream.state.nbytes == conversation.stream.state.max_nbytes


def test_a_stopped_answer_is_part_of_the_conversation(conversation, lm, template):
    pieces = conversation.say(FIRST, max_new_tokens=50)
    for number, _ in enumerate(pieces):
        if number == 4:
            conversation.stop()
    written = conversation.last.num_written
    assert conversation.last.ended == "stopped"
    answers, _ = offline(lm, template, FIRST, SECOND, limits=[written, 12])
    assert said(conversation, SECOND) == "".join(lm.codec.stream(answers[1]))


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_an_interrupted_step_loses_nothing(step, conversation, lm, template, monkeypatch):
    """Whichever it is: one that reads the question, or one that writes."""
    run, steps = lm.session.step, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == step:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(lm.session, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        said(conversation, FIRST)
    monkeypatch.undo()
    assert conversation.last.num_written == step - 1
    answers, _ = offline(lm, template, FIRST, SECOND, limits=[step - 1, 12])
    assert said(conversation, SECOND) == "".join(lm.codec.stream(answers[1]))


def test_a_refused_message_leaves_the_conversation_as_it_was(lm):
    template = ChatTemplate(
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}\n{% endfor %}"
    )
    conversation = Conversation(lm, template)
    said(conversation, FIRST)
    position = conversation.stream.position
    with pytest.raises(InputError, match="refuses these messages: no"):
        said(conversation, "bad")
    assert conversation.stream.position == position
    assert said(conversation, SECOND)


def test_an_unknown_setting_leaves_the_conversation_as_it_was(conversation):
    with pytest.raises(TypeError, match="top_pp"):
        list(conversation.say(FIRST, top_pp=0.5))
    assert conversation.stream.position == 0


def test_two_answers_at_once_are_refused_where_the_first_would_go_on(conversation):
    pieces = conversation.say(FIRST, max_new_tokens=30)
    next(pieces)
    said(conversation, SECOND)
    with pytest.raises(InputError, match="another call has moved this state"):
        list(pieces)
    assert said(conversation, FIRST)


def test_a_system_prompt_that_holds_the_stand_in_is_counted_whole(conversation):
    text = "The first question stands here. Answer as a prophet would, and be very brief."
    short = conversation.count_system_tokens("Answer as a prophet would, and be very brief.")
    assert conversation.count_system_tokens(text) > short


def test_a_reset_that_is_interrupted_changes_nothing_or_all(conversation, monkeypatch):
    said(conversation, FIRST)
    before = (conversation.system, conversation.stream)

    def interrupted(model):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation_module, "OneStream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversation.reset("Be brief.")
    assert (conversation.system, conversation.stream) == before


@pytest.mark.parametrize(
    "arguments", [(None, None), ("demo", None), (3, "x")], ids=["none", "text", "number"]
)
def test_a_conversation_of_something_else_is_refused(arguments, lm, template):
    with pytest.raises(InputError, match="must be a LanguageModel"):
        Conversation(*arguments)
    with pytest.raises(InputError, match="must be a ChatTemplate"):
        Conversation(lm, arguments[1])
    with pytest.raises(InputError, match="variables"):
        Conversation(lm, template, variables=3)
    with pytest.raises(InputError, match="reserved"):
        Conversation(lm, template, variables={"messages": 1})


def test_the_end_of_an_answer_in_the_template_stops_it(lm):
    template = ChatTemplate(
        "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}{{ bos_token }}",
        {"bos_token": "<|bos|>"},
    )
    assert template.end_ids(lm.codec) == {0}
    plain = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert template.end_ids(lm.codec) - plain.end_ids(lm.codec) == {0}


def test_lines_of_a_pipe_are_answered_one_by_one(bundle, lm, template):
    result = chat(bundle, "--max-new-tokens", 12, lines=[FIRST, "", SECOND, "/stats"])
    assert result.exit_code == 0, result.output
    answers, ids = offline(lm, template, FIRST, SECOND)
    texts = ["".join(lm.codec.stream(answer)) for answer in answers]
    assert result.stdout == "".join(f"{text}\n" for text in texts)
    assert f"at token {len(ids)}," in result.stderr
    assert "of at most 1.5 MiB, window 256 + 16 sinks" in result.stderr


def test_commands_of_a_chat(bundle, tmp_path):
    lines = [
        "/system",
        "/system Be brief.",
        "/system",
        f"//{FIRST}",
        "/reset",
        "/help",
        "/quit",
        "x",
    ]
    result = chat(bundle, "--max-new-tokens", 3, lines=lines)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    assert "no system prompt" in result.stderr
    assert "Be brief." in result.stderr
    assert "/load FILE" in result.stderr


# It writes the system prompt into the latest question, as some do.
HEEDING = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role != 'system' %}
{%- if m.role == 'user' %}Q: {% if loop.last and system %}{{ system + '\n' }}{% endif %}
{{- m.content + '\nA:' }}{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize("system", [None, "Thou art a prophet of old."])
@pytest.mark.parametrize("turns", [0, 1])
def test_a_saved_chat_goes_on_with_its_system_prompt(bundle, tmp_path, system, turns):
    path, file = tmp_path / "heeding.jinja", tmp_path / "s"
    path.write_text(HEEDING)
    options = ["--template", path, "--max-new-tokens", 12]
    own = [] if system is None else ["--system", system]
    whole = chat(bundle, *options, *own, lines=[FIRST, SECOND]).stdout
    first = chat(bundle, *options, *own, lines=[*[FIRST][:turns], f"/save {file}"])
    rest = [SECOND] if turns else [FIRST, SECOND]
    for more in ([], own):
        second = chat(bundle, *options, *more, "--load-state", file, lines=[*rest, "/system"])
        assert first.stdout + second.stdout == whole
        assert second.stderr.splitlines()[-1] == (system or "no system prompt")
    inside = chat(bundle, *options, "--system", "Be loud.", lines=[f"/load {file}", *rest])
    assert first.stdout + inside.stdout == whole
    other = chat(bundle, *options, "--system", "Be loud.", "--load-state", file, lines=rest)
    assert "has another system prompt" in refused(other)
    assert not other.stdout


def test_a_state_that_no_chat_saved_can_be_gone_on_with(bundle, lm, template, tmp_path):
    file = tmp_path / "s"
    lm.prime("In the beginning").save(file)
    lines = [f"/load {file}", "/system", "/reset", "/system"]
    told = chat(bundle, "--system", "Be brief.", lines=lines).stderr.splitlines()
    assert "what was loaded does not say its own" in told[-3]
    assert told[-1] == "Be brief."
    long = "Be brief. " * 40
    conversation = Conversation(lm, template, system=long)
    conversation.load(file)
    assert not conversation.knows_system
    loaded = chat(bundle, "--load-state", file, lines=[FIRST])
    assert (loaded.exit_code, loaded.stderr) == (0, "note: cut at 1024 tokens (--max-new-tokens)\n")
    conversation.save(file)
    assert lm.load_snapshot(file).labels == {}


@pytest.mark.parametrize("label", ["", "5", "[]", "{}", '{"system": 5}'])
def test_a_file_whose_label_is_none_is_damaged(conversation, lm, tmp_path, label):
    file = tmp_path / "s"
    replace(lm.prime("Hi").snapshot(), labels={"conversation": label}).save(file)
    said(conversation, FIRST)
    position = conversation.stream.position
    with pytest.raises(SessionError, match="does not say its conversation's system prompt"):
        conversation.load(file)
    assert conversation.stream.position == position


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (["/nothing"], [], "there is no command /nothing"),
        (["/reset x"], [], "/reset takes nothing"),
        ([FIRST], ["--template-value", "messages=3"], "reserved"),
        (["/save"], [], "/save needs a file"),
        (["/load /nowhere/x"], [], "x"),
        (["/save /nowhere/x"], [], "x"),
        ([FIRST], ["--system", "a", "--system-file", "b"], "once"),
        ([FIRST], ["--system-file", "/nowhere"], "/nowhere"),
        ([FIRST], ["--template", "/nowhere"], "/nowhere"),
        ([FIRST], ["--template-value", "x"], "NAME=VALUE"),
        ([FIRST], ["--top-p", "7"], "top_p"),
        ([FIRST], ["--load-state", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_costs_one_line(lines, options, words, bundle):
    assert words in refused(chat(bundle, *options, lines=lines))


def test_a_system_prompt_longer_than_the_sinks_is_named(bundle, lm, template, conversation):
    system = "Thou shalt answer as a prophet of old would have answered the people of the land."
    length = conversation.count_system_tokens(system)
    assert length > 16
    result = chat(bundle, "--system", system, lines=[])
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"note: the system prompt has {length} tokens and this bundle keeps")
    assert f"from token {16 + 256} on, all of it at {length + 256}" in line
    assert f"--num-sink-tokens {length} keeps it whole" in line
    line = refused(chat(bundle, "--system", system, "--pin-system", lines=[FIRST]))
    assert f"export with --num-sink-tokens {length}" in line
    assert chat(bundle, "--pin-system", lines=[]).exit_code == 0
    lines = [f"/system {system}"]
    assert f"--num-sink-tokens {length}" in refused(chat(bundle, "--pin-system", lines=lines))


@pytest.mark.slow
def test_an_export_with_as_many_sinks_keeps_the_system_prompt(tmp_path, conversation):
    system = "Thou shalt answer as a prophet of old would have answered the people."
    length = conversation.count_system_tokens(system)
    pinned = export("examples/demo-llama", tmp_path / "pinned", num_sink_tokens=length).path
    result = chat(pinned, "--system", system, "--pin-system", "--max-new-tokens", 3, lines=[FIRST])
    assert result.exit_code == 0, result.output
    assert "note: the system" not in result.stderr


def test_a_model_without_a_template_is_sent_elsewhere(tmp_path):
    plain = TinyModel().write(tmp_path / "tiny").path
    assert "lminf generate --follow" in refused(chat(plain, lines=["Hello"]))
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert chat(plain, "--template", file, "--max-new-tokens", 3, lines=["Hi"]).exit_code == 0
    file.write_text(TURNS)
    line = refused(chat(plain, "--template", file, "--system", "Be brief", lines=["Hi"]))
    assert "System role not supported" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{{ messages[0].content }}\n"),
        ("tokenizer_config.json", '{"chat_template": "T", "bos_token": {"content": "B"}}'),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "tool", "template": "x"},'
            ' {"name": "default", "template": "T"}]}',
        ),
        ("chat_template.json", '{"chat_template": "T"}'),
    ],
)
def test_a_template_is_found_in_every_file_of_a_model(name, content, tmp_path):
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", "examples/demo-llama", model], check=True)
    (model / "chat_template.jinja").unlink()
    (model / name).write_text(content.replace('"T"', '"{{ bos_token }}{{ messages[0].content }}"'))
    found = ChatTemplate.of(export(str(model), tmp_path / "out"))
    assert found.render([{"role": "user", "content": "Hi"}]).endswith("Hi")
    assert found.tokens == ({"bos_token": "B"} if "bos" in content else found.tokens)


@pytest.mark.slow
def test_named_templates_without_a_default_are_refused(tmp_path):
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", "examples/demo-llama", model], check=True)
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "tool", "template": "x"}]}'
    )
    with pytest.raises(BundleError, match="none called 'default'"):
        ChatTemplate.of(export(str(model), tmp_path / "out"))


def test_a_terminal_needs_a_package_that_edits_lines(bundle):
    code = (
        "import sys; sys.modules['prompt_toolkit'] = None; "
        "from lminf_export.cli.main import main; main()"
    )
    with PseudoTerminal([sys.executable, "-c", code, "chat", str(bundle)]) as terminal:
        terminal.wait_for("pip install 'lminf-export[chat]'")
        assert terminal.finish() == 2


def terminal_chat(bundle, *options):
    return PseudoTerminal([*LMINF, "chat", str(bundle), "--threads", "1", *options])


@pytest.mark.slow
def test_a_conversation_on_a_terminal(bundle, lm, template, tmp_path: Path):
    """Typing with corrections, Ctrl-C in an answer, /save here and /load in another process."""
    file = tmp_path / "talk.state"
    with terminal_chat(bundle, "--max-new-tokens", "12") as terminal:
        terminal.wait_for("at token 0")
        # "In the beginning God mad", two to the left, a letter, deleted, and to the end.
        terminal.keys(FIRST[:-1] + "\x1b[D\x1b[Dx\x7f\x1b[C\x1b[Ce\r")
        terminal.wait_for("cut at 12 tokens")
        terminal.keys(f"/save {file}\r")
        terminal.wait_for("saved")
        terminal.keys("\x04")
        assert terminal.finish() == 0
    answers, ids = offline(lm, template, FIRST, SECOND)
    with terminal_chat(bundle, "--max-new-tokens", "12") as terminal:
        terminal.wait_for("at token 0")
        terminal.keys(f"/load {file}\r")
        terminal.wait_for("loaded")
        terminal.keys(f"{SECOND}\r")
        text = "".join(lm.codec.stream(answers[1]))
        terminal.wait_for(text.splitlines()[0])
        terminal.wait_for(f"at token {len(ids)},")
        terminal.keys("/quit\r")
        assert terminal.finish() == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_program(bundle, lm, template):
    (answer,), _ = offline(lm, template, FIRST)
    begun = "".join(lm.codec.stream(answer))[:12]
    assert begun not in FIRST
    with terminal_chat(bundle, "--max-new-tokens", "1000000") as terminal:
        terminal.wait_for("at token 0")
        terminal.keys("\x03")
        terminal.wait_for("/quit or Ctrl-D ends")
        terminal.keys(f"{FIRST}\r")
        terminal.wait_for(begun)
        terminal.keys("\x03")
        terminal.wait_for("stopped; what was written so far is part of the conversation")
        terminal.keys("/stats\r")
        terminal.wait_for("tokens/s")
        terminal.keys("\x04")
        assert terminal.finish() == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda c: list(c.say("x", stop_token_ids=[1])),
        lambda c: list(c.say("x", state=3)),
        lambda c: list(c.say(3)),
        lambda c: list(c.say("x", temperature="hot")),
        lambda c: list(c.say("x", max_new_tokens=-1)),
        lambda c: list(c.say("x", stop=3)),
        lambda c: Conversation(c.model, c.template, system=3),
        lambda c: c.reset(3),
        lambda c: c.count_system_tokens(3),
        lambda c: c.template.turn([{"role": "user", "content": "x"}], system=3),
        lambda c: c.template.end_ids(3),
        lambda c: c.template.rewrites(3),
        lambda c: c.load(3),
        lambda c: c.save(3),
    ],
)
def test_a_wrong_argument_of_a_conversation_changes_nothing(conversation, call):
    said(conversation, FIRST)
    before = conversation.stream.position, conversation.stream.unread
    with pytest.raises(LminfError) as found:
        call(conversation)
    assert len(str(found.value).splitlines()) == 1
    assert (conversation.stream.position, conversation.stream.unread) == before


def test_the_tokens_of_a_system_prompt_are_counted_whatever_a_template_does(lm):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    lowered = plain.replace("m.content", "m.content|lower if m.role == 'user' else m.content")
    valued = "{{ given }}" + plain
    system = "be brief, and answer as a prophet."
    counts = [
        Conversation(lm, ChatTemplate(text), variables=values).count_system_tokens(system)
        for text, values in ((plain, {}), (lowered, {}), (valued, {"given": ""}))
    ]
    assert len(set(counts)) == 1
    stand_in = conversation_module._STAND_IN
    more = Conversation(lm, ChatTemplate(valued), variables={"given": [stand_in]})
    assert more.count_system_tokens(system) > counts[0]


def test_ctrl_c_ends_a_chat_from_a_pipe(bundle):
    process = subprocess.Popen(
        [*LMINF, "chat", str(bundle), "--threads", "1", "--max-new-tokens", "1000000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=default_signals,
    )  # fmt: skip
    process.stdin.write(f"{FIRST}\n{SECOND}\n".encode())
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.strip().endswith(b"interrupted")


def begin_answer(terminal, lm, template):
    """Ask on a terminal, and wait until the answer is being written."""
    (answer,), _ = offline(lm, template, FIRST)
    begun = "".join(lm.codec.stream(answer))[:12]
    assert begun not in FIRST
    terminal.wait_for("at token 0")
    terminal.keys(f"{FIRST}\r")
    terminal.wait_for(begun)


@pytest.mark.slow
def test_what_was_typed_before_a_ctrl_c_comes_next_too(bundle, lm, template):
    with terminal_chat(bundle, "--max-new-tokens", "1000000") as terminal:
        begin_answer(terminal, lm, template)
        terminal.keys("/help\r")
        time.sleep(0.3)
        terminal.keys("\x03")
        terminal.wait_for("go on with a conversation that was saved")
        terminal.keys("\x04")
        assert terminal.finish() == 0


@pytest.mark.slow
def test_what_is_typed_during_an_answer_comes_next(bundle, lm, template):
    with terminal_chat(bundle, "--max-new-tokens", "300") as terminal:
        begin_answer(terminal, lm, template)
        terminal.keys("/quit\r")
        assert "/quit" not in terminal.wait_for("cut at 300 tokens")
        assert terminal.finish() == 0
