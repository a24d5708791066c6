"""Chat templates in the manner of well-known models, written for the tests."""

from __future__ import annotations

from dataclasses import dataclass, field

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are of use.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

HEADERS = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start|>system<|end|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '\\n' + ns.system + '<|eot|>' }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('roles are user and assistant, found ' ~ message.role) }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""  # noqa: E501

TURNS = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""  # noqa: E501

BRACKETS = """\
{%- if messages[0]["role"] == "system" %}
    {%- set first = messages[0]["content"] + "\\n\\n" %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set first = "" %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {{- "[INST] " + (first if loop.first else "") + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("no role " + message["role"]) }}
    {%- endif %}
{%- endfor %}
"""

MARKS = """\
{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}{% elif message['role'] == 'assistant' %}{% generation %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""  # noqa: E501

THINKING = """\
{%- set ns = namespace(last=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""  # noqa: E501

BEGUN_THOUGHT = """\
{% set ns = namespace(system='', first=true) %}
{%- for message in messages %}{% if message.role == 'system' %}{% set ns.system = ns.system + message.content %}{% endif %}{% endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages %}
{%- if message.role == 'system' %}{% continue %}{% endif %}
{%- if message.role == 'user' %}{{ '<|User|>' + message.content }}{% endif %}
{%- if message.role == 'assistant' %}{{ '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}
"""  # noqa: E501

DEMO = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}:{{ '\\n' }}{{ message['content'] | trim }}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{{ '\\n' }}{% endif %}"
)

# A template that prints its tools and documents as JSON, and what a loop can do.
TOOLS = """\
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if documents is not none %}{{ documents | tojson }}{% endif %}
{%- for message in messages %}
    {%- if loop.index > 50 %}{% break %}{% endif %}
{{ message | tojson }}|{{ message.role.upper() }}|{{ message['content'].split(' ') | join('_') }}
{% if not loop.last %}
,
{% endif %}
{%- endfor %}
{{- eos_token }}
"""


@dataclass(frozen=True)
class Style:
    """A template and what can be said of it.

    Attributes:
        text: the template.
        end: text behind an answer that its model ends it with.
        system: whether it knows messages of a system.
        rewrites: whether earlier answers are written otherwise than they were begun.
        variables: of the template.
    """

    text: str
    end: str
    system: bool = True
    rewrites: bool = False
    variables: dict[str, object] = field(default_factory=dict)


STYLES = {
    "chatml": Style(CHATML, "<|im_end|>"),
    "headers": Style(HEADERS, "<|eot|>"),
    "turns": Style(TURNS, "<end_of_turn>", system=False),
    "brackets": Style(BRACKETS, "</s>"),
    "marks": Style(MARKS, "<|end|>"),
    "thinking": Style(THINKING, "<|im_end|>", rewrites=True),
    "not thinking": Style(
        THINKING, "<|im_end|>", rewrites=True, variables={"enable_thinking": False}
    ),
    "begun thought": Style(BEGUN_THOUGHT, "</s>", rewrites=True),
    "demo": Style(DEMO, "\n"),
}
MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<start_of_turn>",
    "<end_of_turn>", "[INST]", "[/INST]", "<|system|>", "<|user|>", "<|assistant|>", "<|User|>",
    "<|Assistant|>", "<think>", "</think>", "<s>", "</s>",
)  # fmt: skip
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
