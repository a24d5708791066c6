"""Chat templates: the text is transformers', a turn is the rest of it, and nothing gets out."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lminf_export.errors import BundleError, InputError
from lminf_export.runtime.chat.messages import checked_messages
from lminf_export.runtime.chat_template import ChatTemplate, check_variables
from lminf_export.runtime.text import TextCodec
from tests.support.chat_templates import MARKERS, STYLES, TOKENS, TOOLS
from tests.support.tokenizer_kinds import KINDS

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ASK = [{"role": "user", "content": "Hello there"}]
CONVERSATIONS = (
    ASK,
    [{"role": "system", "content": " Be brief. "}, *ASK],
    [
        *ASK,
        {"role": "assistant", "content": " Good day. "},
        {"role": "user", "content": "“é” 中 \n"},
    ],
    [*ASK, {"role": "assistant", "content": "<think>\nwell\n</think>\n\nYes"}, *ASK],
    [*ASK, {"role": "assistant", "content": "<think>\nwell\n</think>\n\nYes"}],
    [*ASK, {"role": "assistant", "content": "Yes", "reasoning_content": "why"}],
    [{"role": "assistant", "content": "Me first"}, *ASK],
    [*ASK, *ASK],
)


@pytest.fixture(scope="module")
def theirs():
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE()), bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def templates():
    return {name: ChatTemplate(style.text, TOKENS) for name, style in STYLES.items()}


def outcome(render, errors):
    """The text, or None where the template refuses the messages."""
    try:
        return render()
    except errors:
        return None


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", STYLES)
def test_the_text_is_that_of_transformers(name, prompt, templates, theirs):
    style, texts = STYLES[name], []
    for messages in CONVERSATIONS:
        expected = outcome(
            lambda messages=messages: theirs.apply_chat_template(
                messages,
                chat_template=style.text,
                tokenize=False,
                add_generation_prompt=prompt,
                **style.variables,
            ),
            Exception,
        )
        found = outcome(
            lambda messages=messages: templates[name].render(messages, prompt, **style.variables),
            InputError,
        )
        assert found == expected
        texts.append(found)
    assert texts[0] is not None
    assert (texts[1] is not None) == style.system


def test_tools_documents_and_json_are_those_of_transformers(theirs):
    messages = [{"role": "user", "content": "<a> & 'b' é"}, {"role": "user", "content": "x y"}]
    values = {"tools": [{"name": "f", "n": 1}], "documents": [{"title": "é", "text": "<"}]}
    expected = theirs.apply_chat_template(messages, chat_template=TOOLS, tokenize=False, **values)
    ours = ChatTemplate(TOOLS, TOKENS)
    assert ours.render(messages, False, **values) == expected
    plain = theirs.apply_chat_template(messages, chat_template=TOOLS, tokenize=False)
    assert ours.render(messages, False) == plain


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(STYLES)), texts=st.lists(WORDS, min_size=1, max_size=5))
def test_any_content_is_written_as_transformers_writes_it(name, texts, templates, theirs):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    expected = theirs.apply_chat_template(
        messages, chat_template=STYLES[name].text, tokenize=False, add_generation_prompt=True
    )
    assert templates[name].render(messages) == expected


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from([name for name, style in STYLES.items() if not style.rewrites]),
    said=WORDS,
    answer=st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=9),
    new=WORDS,
)
def test_the_whole_is_the_beginning_the_answer_and_the_turn(name, said, answer, new, templates):
    template = templates[name]
    first = [{"role": "user", "content": said}]
    more = {"role": "user", "content": new}
    whole = template.render([*first, {"role": "assistant", "content": answer}, more])
    space = " " if name == "brackets" else ""  # its answers begin with one
    assert template.render(first) + space + answer + template.turn([more]) == whole
    assert template.turn([more]).startswith(STYLES[name].end)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """The demo model's tokenizer, to which the templates' marks are special tokens."""
    tokenizer = Tokenizer.from_file("examples/demo-llama/tokenizer.json")
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKERS])
    path = tmp_path_factory.mktemp("codec") / "tokenizer.json"
    tokenizer.save(str(path))
    return TextCodec(path)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from([name for name, style in STYLES.items() if not style.rewrites]),
    said=st.lists(WORDS, min_size=1, max_size=3),
    answer=st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=9),
)
def test_the_tokens_of_the_whole_are_those_of_its_parts(name, said, answer, templates, codec):
    """Of a beginning, and of answers and turns behind it, however often."""
    template, messages = templates[name], [{"role": "user", "content": "Hi"}]
    ids = codec.ids(template.render(messages))
    for text in said:
        new = {"role": "user", "content": text}
        ids += codec.ids_behind((" " if name == "brackets" else "") + answer, "\n")
        ids += codec.ids_behind(template.turn([new]))
        messages += [{"role": "assistant", "content": answer}, new]
    assert ids == codec.ids(template.render(messages))


@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_behind_an_answer_has_its_tokens_with_every_tokenizer(kind, templates, tmp_path):
    """Some put a space before a text that begins, which a turn does not."""
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKERS])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path / "tokenizer.json")
    first, answer, new = (
        {"role": role, "content": text}
        for role, text in (("user", "the quick"), ("assistant", "lazy dog"), ("user", "a fox?"))
    )
    for name in (name for name, style in STYLES.items() if not style.rewrites):
        template = templates[name]
        whole = template.render([first, answer, new])
        begun = whole[: whole.index(answer["content"]) + len(answer["content"])]
        ids = codec.ids(begun) + codec.ids_behind(template.turn([new]))
        assert ids == codec.ids(whole), name


def test_the_token_that_ends_an_answer_is_found(templates, codec):
    for name, style in STYLES.items():
        ends = templates[name].end_ids(codec, **style.variables)
        assert ends == ({codec.tokenizer.token_to_id(style.end)} if name != "demo" else set())


@pytest.mark.parametrize("name", STYLES)
def test_a_turn_does_not_depend_on_the_history(name, templates):
    """Nor on whether its text looks like the stand-in answer."""
    template, style = templates[name], STYLES[name]
    new = [{"role": "user", "content": "Answer 0 is here. Answer 1 is here"}]
    turn = template.turn(new, **style.variables)
    for length in (1, 4):
        history = [*ASK, {"role": "assistant", "content": "Yes."}] * length
        assert template.render([*history, *new], **style.variables).endswith("Yes." + turn)


def test_a_template_that_changes_what_was_said_is_named(templates):
    for name, template in templates.items():
        assert (template.rewrites() is not None) == STYLES[name].rewrites, name
    assert "reasoning" in templates["thinking"].rewrites()


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    ],
)
def test_a_template_behind_whose_answers_nothing_can_be_added_is_refused(text):
    with pytest.raises(BundleError, match="render the whole conversation"):
        ChatTemplate(text).turn(ASK)


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') or raise_exception('none') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "{{ ['{0.__class__}'] | map('attr', 'format') | list | first }}{{ 1 / 0 }}",
    "{{ (('{0.__class__.__mro__}' | attr('format'))('') | length) / 0 }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ dict.__base__ }}",
    "{{ dict.mro() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set ns = namespace(__class__='x') %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 'x' %}{{ ns }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages[0].pop('role') }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
    "{% macro m() %}{% endmacro %}{{ m.__call__.__func__ }}",
    "{{ (messages | map(attribute='__class__') | list)[0].mro }}",
    "{{ loop.__class__ }}",
    "{{ caller.__globals__ }}",
    "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ __import__('os') }}",
)


@pytest.mark.parametrize("text", ESCAPES)
def test_a_template_gets_nothing_but_its_values(text):
    """What is not to be seen is undefined: it prints as nothing, and any use of it fails."""
    found = ""
    with suppress(InputError):
        found = ChatTemplate(text).render(ASK)
    assert not found


ENDLESS = (
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(90) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(80) }}",
)
HUGE = (
    "{{ 'x' * 10**10 }}",
    "{{ (messages[0].content * 10**10) | length }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{% for i in range(100000) %}{{ 'y' * 100000 }}{% endfor %}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% for %}",
    "{" * 2**21,
)


@pytest.mark.slow
@pytest.mark.parametrize("text", ENDLESS)
def test_a_template_without_end_is_ended(text):
    template = ChatTemplate(text)
    begun = time.monotonic()
    with pytest.raises(InputError, match="of processor time"):
        template.render(ASK)
    assert time.monotonic() - begun < 40
    with pytest.raises(InputError, match="of processor time"):
        template.render(ASK)  # by a new process


@pytest.mark.slow
@pytest.mark.parametrize("text", HUGE, ids=range(len(HUGE)))
def test_a_template_that_grows_is_ended(text):
    with pytest.raises((InputError, BundleError)):
        ChatTemplate(text).render(ASK)


def test_a_template_refuses_in_its_own_words(templates):
    with pytest.raises(InputError, match="refuses these messages: System role not supported"):
        templates["turns"].render([{"role": "system", "content": "x"}, *ASK])


def test_a_process_that_has_gone_is_started_again(templates):
    template = templates["chatml"]
    text = template.render(ASK)
    child = template._process._child
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert template.render(ASK) == text


def test_threads_and_a_fork_get_their_own_answers(templates):
    template = templates["demo"]

    def render(number):
        messages = [{"role": "user", "content": str(number) * 999}]
        return f"\n{str(number) * 999}\n" in template.render(messages)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(render, range(200)))
    child = template._process._child
    template._process._owner = -1  # as it is in a fork of this program
    assert render(7)
    assert template._process._child is not child
    assert child.poll() is None
    child.kill()
    child.wait()


def test_the_process_ends_with_its_template():
    template = ChatTemplate("{{ messages[0].content }}")
    child = template._process._child
    assert child.poll() is None
    del template
    assert child.poll() is not None


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("Hello", "must be a list"),
        ([], "no messages"),
        (["x"], r"messages\[0\] must be a table"),
        ([{"role": "tool", "content": "x"}], "role must be one of"),
        ([{"role": ["user"], "content": "x"}], "role must be one of"),
        ([{"content": "x"}], "role must be one of"),
        ([{"role": "user"}], "content is missing"),
        ([{"role": "user", "content": None}], "content is missing"),
        ([{"role": "user", "content": 3}], "must be a text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "must be a text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must be a text"),
        ([{"role": "user", "content": "\ud800"}], "Unicode"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "tool_calls"),
        (None, "must be a list"),
        (7, "must be a list"),
    ],
)
def test_messages_of_another_shape_are_refused_in_one_line(messages, match):
    with pytest.raises(InputError, match=match) as caught:
        checked_messages(messages)
    assert "\n" not in str(caught.value)


def test_parts_of_text_are_joined_and_what_is_none_left_out(templates):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts, "name": None, "tool_calls": None}
    assert checked_messages([message]) == [{"role": "user", "content": "ab"}]
    developer = [{"role": "developer", "content": "Be kind."}, *ASK]
    assert "<|im_start|>system\nBe kind." in templates["chatml"].render(developer)


@pytest.mark.parametrize("text", [None, 5, b"x", ["x"]])
def test_a_template_that_is_no_text_is_refused(text):
    with pytest.raises(InputError, match="is a text of jinja2"):
        ChatTemplate(text)


def test_values_that_are_no_json_are_refused(templates):
    with pytest.raises(InputError, match="values of JSON"):
        templates["chatml"].render(ASK, clock=time)


NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('first must be system') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# The system's message selects how an answer begins, or stands in the last message.
HEEDS_SYSTEM = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if messages[0].content == '/no_think' %}<think></think>{% endif %}{% endif %}"
)
IN_THE_LAST = (
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("text", [NEEDS_SYSTEM, HEEDS_SYSTEM, IN_THE_LAST])
def test_a_turn_heeds_the_system_message(text):
    template, system = ChatTemplate(text), "/no_think"
    first = [{"role": "system", "content": system}, *ASK]
    whole = template.render([*first, {"role": "assistant", "content": "Yes."}, *ASK])
    turn = template.turn(ASK, system=system)
    assert whole.endswith(f"Yes.{turn}")
    assert template.turn(ASK, system="Yes.")  # what stands for the answer is not in it


def test_a_template_that_moves_the_system_message_is_named():
    assert ChatTemplate(IN_THE_LAST).rewrites() is None
    assert ChatTemplate(IN_THE_LAST).rewrites("Be brief.") is not None
    assert ChatTemplate(NEEDS_SYSTEM).rewrites("Be brief.") is None


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "system", "self"])
def test_reserved_names_are_no_variables(name, templates):
    template = next(iter(templates.values()))
    with pytest.raises(InputError, match="reserved"):
        template.render(ASK, True, **{name: 1}) if name != "add_generation_prompt" else (
            check_variables({name: 1})
        )


@pytest.mark.parametrize(
    "call",
    [
        lambda: ChatTemplate("x", 3),
        lambda: ChatTemplate("x", [1, 2]),
        lambda: ChatTemplate.of(None),
        lambda: ChatTemplate.of("demo"),
        lambda: ChatTemplate.from_file("x", None),
        lambda: check_variables({3: 4}),
        lambda: check_variables("ab"),
        lambda: ChatTemplate("x").render([{"role": "user", "content": "a", "k": np.zeros(2)}]),
    ],
)
def test_arguments_of_another_kind_are_refused(call):
    with pytest.raises(InputError):
        call()


def test_all_filters_of_jinja_work():
    text = ChatTemplate("{{ 'a b' | wordwrap(1) }}{{ '<b>c</b>' | striptags }}").render(ASK)
    assert text == "a\nbc"


def test_what_a_template_says_commands_no_terminal():
    template = ChatTemplate(r'{{ raise_exception("\u001b]0;owned\u0007 x") }}')
    with pytest.raises(InputError) as caught:
        template.render(ASK)
    assert str(caught.value).isprintable()
