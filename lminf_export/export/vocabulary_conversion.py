"""The tokenizer of a bundle whose model has the vocabulary of another library alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from lminf_export.errors import ModelError, shortened
from lminf_export.export.tokenizer_texts import TEXTS
from lminf_export.export.vocabulary_files import VocabularyFile
from lminf_export.runtime.foreign_errors import foreign_errors

EXTRA = "lminf-export[tokenizers]"


@dataclass(frozen=True)
class Converted:
    """A conversion.

    Attributes:
        tokenizer: it.
        notices: how it compares with the library that the file is of.
    """

    tokenizer: Tokenizer
    notices: list[str]


def missing_packages(vocabulary: VocabularyFile) -> str | None:
    """Return the line that says what to install for a conversion, None if nothing is missing."""
    if not vocabulary.missing:
        return None
    return (
        f"the bundle takes token ids only; {vocabulary.path.name} is a file of "
        f"{vocabulary.library}, and converting it takes {' and '.join(vocabulary.missing)}: "
        f"pip install '{EXTRA}', then export again"
    )


def convert(vocabulary: VocabularyFile, theirs: Any, folder: Path) -> Converted:
    """Convert a vocabulary, in the way that reads texts as its own library does.

    Args:
        vocabulary: the file.
        theirs: transformers' tokenizer of the model, or None.
        folder: the model's.

    Raises:
        ModelError: the file is damaged, or of a kind that is not converted.
    """
    read, name = vocabulary.reader(), vocabulary.path.name
    backend = getattr(theirs, "backend_tokenizer", None)
    theirs_wrong = _wrong(backend, read) if isinstance(backend, Tokenizer) else None
    best: Tokenizer | None = backend if theirs_wrong is not None else None
    wrong = theirs_wrong
    for candidate in vocabulary.candidates() if wrong != [] else ():
        found = _wrong(candidate, read)
        if wrong is None or len(found) < len(wrong):
            best, wrong = candidate, found
        if not found:
            break
    assert best is not None
    assert wrong is not None  # there is a candidate, or none is needed
    is_own = best is not backend
    if is_own:
        _put_special_tokens(best, theirs, folder)
    equal = f"it reads {len(TEXTS)} texts as {vocabulary.library} does"
    if wrong:
        shown = shortened(repr(min(wrong, key=len)))
        equal = (
            f"it reads {len(wrong)} of {len(TEXTS)} texts otherwise than {vocabulary.library}, "
            f"such as {shown}"
        )
    notices = [f"tokenizer.json is missing: the bundle's is {name}, converted; {equal}"]
    if is_own and theirs_wrong:
        notices.append(
            f"transformers' AutoTokenizer reads {len(theirs_wrong)} of these texts otherwise than "
            f"{vocabulary.library}"
        )
    if vocabulary.library == "tiktoken":
        notices.append(
            f"{name} does not say how text is cut into words, nor its special tokens: cut as "
            f"{vocabulary.cut_as} does; tokens named in tokenizer_config.json are special"
        )
    return Converted(best, notices)


def _wrong(tokenizer: Tokenizer, read: Callable[[str], list[int]]) -> list[str]:
    """Return the texts, without added tokens in them, that a tokenizer reads otherwise."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    texts = [text for text in TEXTS if not any(token in text for token in added)]
    return [t for t in texts if tokenizer.encode(t, add_special_tokens=False).ids != read(t)]


def _put_special_tokens(tokenizer: Tokenizer, theirs: Any, folder: Path) -> None:
    """Let a conversion begin and end a text as the model's own tokenizer does."""
    before, after = _around(tokenizer, theirs, folder)
    names = {token: tokenizer.id_to_token(token) or "" for token in (*before, *after)}
    if not names or not all(names.values()):
        return
    template = [*(names[x] for x in before), "$A", *(names[x] for x in after)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(template),
        special_tokens=[(name, token) for token, name in names.items()],
    )


def _around(tokenizer: Tokenizer, theirs: Any, folder: Path) -> tuple[list[int], list[int]]:
    """Return the tokens before and after a text."""
    if theirs is not None:
        with suppress(ModelError), foreign_errors(ModelError, "it reads no text"):
            inner = list(theirs.encode("a", add_special_tokens=False))
            whole = list(theirs.encode("a", add_special_tokens=True))
            for start in range(len(whole) - len(inner) + 1):
                if whole[start : start + len(inner)] == inner:
                    return whole[:start], whole[start + len(inner) :]
    return tuple(list(_named(tokenizer, folder, kind)) for kind in ("bos", "eos"))  # type: ignore[return-value]


def _named(tokenizer: Tokenizer, folder: Path, kind: str) -> Iterator[int]:
    """Yield the token of a kind, if tokenizer_config.json wants it and names it."""
    try:
        content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(content, dict) or content.get(f"add_{kind}_token") is not True:
        return
    name = content.get(f"{kind}_token")
    name = name.get("content") if isinstance(name, dict) else name
    token = tokenizer.token_to_id(name) if isinstance(name, str) else None
    if token is not None:
        yield token
