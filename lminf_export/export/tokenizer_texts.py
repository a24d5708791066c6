"""Texts that tell tokenizers apart: scripts, spaces, added tokens, and a rendered chat."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lminf_export.errors import ModelError
from lminf_export.runtime.foreign_errors import foreign_errors

TEXTS = (
    "Hello, world!",
    "the quick brown fox jumps over the lazy dog",
    "It's 'quoted', isn't it? I'd say \"yes\" -- they've gone .",
    "a",
    " ",
    "  two spaces  between and behind  ",
    " one before",
    "\n",
    "\n\n\nlines\r\nand\ttabs\t\t\n   indented\n",
    "def f(x):\n    return x**2  # 3.14e-10, 0x1F\n",
    "1234567890 12,345.67 ½ ² ٣",
    "CamelCase snake_case kebab-case ALLCAPS",
    "naïve café, Straße, Ærøskøbing, señor",
    "e\u0301 and é; ﬁ ligature; Ａｗｉｄｅ",
    "Съешь ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "日本語の文章です。",
    "中文，没有空格。",
    "한국어 문장입니다",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "བོད་སྐད་",
    "🙂👩‍👩‍👧‍👦🇯🇵 ✓ → ∞",
    "a\u00a0b\u2009c\u200bd\u3000e",
    "\ufeffmark",
    "\ufffd \x00 \x7f",
    "<0xE6> <|x|> [INST] ▁ Ġ ##ing </w>",
    "https://example.org/a?b=c&d=%20#e",
    '{"a": [1, 2, {"b": null}]}',
    "x" * 40 + " " + "ab" * 20,
    "!!!???...,,,;;;---___***",
)
CHAT = (
    {"role": "user", "content": "Hello, 日本?"},
    {"role": "assistant", "content": "Yes.\n  é 🙂"},
    {"role": "user", "content": " And then? "},
)
_ONE_BY_ONE = 64
_TOGETHER = 256


def texts_of_tokens(contents: Iterable[str]) -> list[str]:
    """Return texts that hold each of these tokens, the first ones also within words."""
    contents = sorted(set(contents))
    alone = [f"x {content} y{content}z" for content in contents[:_ONE_BY_ONE]]
    starts = range(0, len(contents), _TOGETHER)
    return alone + [" a".join(contents[start : start + _TOGETHER]) for start in starts]


def rendered_chats(tokenizer: Any, folder: Path) -> tuple[list[str], list[str]]:
    """Render a model's chat templates.

    Args:
        tokenizer: transformers'.
        folder: the model's, where a template may stand in a file of its own.

    Returns:
        The texts, and a notice for each template that cannot be rendered.
    """
    texts, notices = [], []
    for name, template in _templates(tokenizer, folder).items():
        reason = ""
        for messages in (CHAT, CHAT[:1]):
            try:
                with foreign_errors(ModelError, f"the chat template {name[:40]!r} fails"):
                    texts.append(_rendered(tokenizer, template, messages))
                break
            except ModelError as error:
                reason = reason or str(error)
        else:
            notices.append(reason)
    return texts, notices


def _rendered(tokenizer: Any, template: str, messages: Sequence[dict[str, str]]) -> str:
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    if not isinstance(text, str):
        raise TypeError(f"it yields {type(text).__name__}, no text")
    return text


def _templates(tokenizer: Any, folder: Path) -> dict[str, str]:
    """Return name → template; a processor's file counts where the tokenizer has none."""
    found = getattr(tokenizer, "chat_template", None) or _processor_template(folder)
    named = found if isinstance(found, dict) else {"default": found}
    return {str(name): text for name, text in named.items() if isinstance(text, str) and text}


def _processor_template(folder: Path) -> object:
    try:
        content = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content.get("chat_template") if isinstance(content, dict) else None
