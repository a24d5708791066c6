"""The tokenizer a bundle gets, compared with the one transformers makes of the model's files."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lminf_export.errors import BundleError, ModelError
from lminf_export.export.chat_check import check_chat
from lminf_export.export.tokenizer_texts import TEXTS, rendered_chats, texts_of_tokens
from lminf_export.export.vocabulary_conversion import convert, missing_packages
from lminf_export.export.vocabulary_files import VocabularyFile, find_vocabulary, uncached
from lminf_export.runtime.added_tokens import merge_added_tokens
from lminf_export.runtime.foreign_errors import foreign_errors

TOKENIZER = "tokenizer.json"
# What transformers makes a tokenizer of; without any of them it would make up an empty one.
VOCABULARIES = (
    TOKENIZER,
    *("tokenizer.model", "spiece.model", "tiktoken.model", "tekken.json"),
    *("vocab.json", "vocab.txt"),
)


def check_tokenizer(folder: Path, copied: Path, *, trust_remote_code: bool = False) -> list[str]:
    """Compare a bundle's tokenizer with transformers' AutoTokenizer; mend it where it differs.

    Both read a few dozen texts, every added token and the rendered chat template among them.
    Nothing is raised for a tokenizer that is odd.

    Args:
        folder: the model's.
        copied: the bundle's, with the copied files. `tokenizer.json` is written there if the
            one there reads a text otherwise, cuts or fills it, or does not exist.
        trust_remote_code: run Python that the model's repository brings.

    Returns:
        What the user should know, one line each.
    """
    vocabulary = find_vocabulary(folder)
    if vocabulary is None and not any((folder / name).is_file() for name in VOCABULARIES):
        return []
    path = copied / TOKENIZER
    if vocabulary is not None and not path.exists():
        return _converted(vocabulary, folder, copied, trust_remote_code)
    ours, limits = _read(path)
    try:
        comparison = _Comparison.of(_auto_tokenizer(folder, trust_remote_code), folder, ours)
    except ModelError as error:
        if ours is None:
            return [f"the bundle takes token ids only; transformers reads no tokenizer: {error}"]
        problems = merge_added_tokens(ours, copied)
        return [*problems, f"the tokenizer is not compared; transformers cannot read it: {error}"]
    notices = [*comparison.notices]
    if ours is None:
        wrong = f"{TOKENIZER} " + ("cannot be read" if path.exists() else "is missing")
    else:
        found = comparison.differences(ours)
        wrong = found and f"{TOKENIZER} alone reads {found} otherwise than transformers"
    if wrong and comparison.backend is not None:
        _save(comparison.backend, path)
        notices.append(f"{wrong}: the bundle's is that of transformers' AutoTokenizer")
        ours, _ = _read(path)
    elif ours is not None and limits:
        _save(ours, path)
    if limits:
        notices.append(f"{TOKENIZER} was saved with {limits}: the bundle's is without")
    if ours is None:
        return [*notices, f"the bundle takes token ids only; {comparison.name} has no {TOKENIZER}"]
    notices += check_chat(comparison.theirs, copied)
    notices += merge_added_tokens(ours, copied)
    if found := comparison.differences(ours):
        notices.append(f"the bundle's tokenizer reads {found} otherwise than transformers")
    return notices


def _converted(
    vocabulary: VocabularyFile, folder: Path, copied: Path, trust_remote_code: bool
) -> list[str]:
    """Write a bundle's tokenizer from a vocabulary of another library; return notices."""
    missing = missing_packages(vocabulary)
    if missing is not None:
        return [missing]
    theirs = None
    with suppress(ModelError), uncached():  # it is compared with the library that the file is of
        theirs = _auto_tokenizer(folder, trust_remote_code)
    try:
        made = convert(vocabulary, theirs, folder)
    except ModelError as error:
        return [f"the bundle takes token ids only; {error}"]
    _save(made.tokenizer, copied / TOKENIZER)
    ours, _ = _read(copied / TOKENIZER)
    chat = [] if theirs is None else check_chat(theirs, copied)
    return [*made.notices, *chat, *(merge_added_tokens(ours, copied) if ours is not None else ())]


@dataclass(frozen=True)
class _Comparison:
    """Texts and what transformers' tokenizer makes of them.

    Attributes:
        theirs: transformers' tokenizer.
        backend: that of the library `tokenizers` in it, if there is one.
        expected: text → ids without and with special tokens, and the text of the latter.
        notices: texts that could not be made.
    """

    theirs: Any
    backend: Tokenizer | None
    expected: dict[str, tuple[object, ...]] = field(repr=False)
    notices: list[str]

    @classmethod
    def of(cls, theirs: Any, folder: Path, ours: Tokenizer | None) -> _Comparison:
        """Read all texts by transformers' tokenizer.

        Raises:
            ModelError: it reads none of them.
        """
        backend = getattr(theirs, "backend_tokenizer", None)
        backend = backend if isinstance(backend, Tokenizer) else None
        chats, notices = rendered_chats(theirs, folder)
        added = {
            token.content
            for tokenizer in (backend, ours)
            if tokenizer is not None
            for token in tokenizer.get_added_tokens_decoder().values()
        }
        texts = [*TEXTS, *texts_of_tokens(added), *chats]
        made = cls(theirs, backend, {}, notices)
        # A text that they cannot read tells nothing.
        read = ((text, made._read_by_them(text)) for text in texts)
        made.expected.update((text, found) for text, found in read if found)
        if not made.expected:
            raise ModelError(f"{made.name} reads no text")
        return made

    @property
    def name(self) -> str:
        """The name of transformers' class."""
        return type(self.theirs).__name__

    def differences(self, ours: Tokenizer) -> str:
        """Return which texts another tokenizer reads otherwise, in a few words; "" for none."""
        # A setting of transformers that tokenizer.json has no place for.
        ours.encode_special_tokens = bool(getattr(self.theirs, "split_special_tokens", False))
        wrong = [text for text, wanted in self.expected.items() if self._read(ours, text) != wanted]
        if not wrong:
            return ""
        shown = repr(min(wrong, key=len))
        shown = shown if len(shown) <= 60 else shown[:59] + "…"
        return f"{len(wrong)} of {len(self.expected)} texts, such as {shown},"

    def _read_by_them(self, text: str) -> tuple[object, ...]:
        theirs = self.theirs
        with suppress(ModelError), foreign_errors(ModelError, "it cannot read this"):
            ids = [list(theirs.encode(text, add_special_tokens=put)) for put in (False, True)]
            if self.backend is None:
                return (*ids,)
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            return (*ids, theirs.decode(ids[1], **options))
        return ()

    def _read(self, ours: Tokenizer, text: str) -> tuple[object, ...]:
        with suppress(ModelError), foreign_errors(ModelError, "it cannot read this"):
            ids = [ours.encode(text, add_special_tokens=put).ids for put in (False, True)]
            if self.backend is None:
                return (*ids,)
            return (*ids, ours.decode(ids[1], skip_special_tokens=True))
        return ()


def _auto_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Return transformers' tokenizer of a model.

    Raises:
        ModelError: there is none, for whatever reason.
    """
    from transformers import AutoTokenizer

    with foreign_errors(ModelError, "AutoTokenizer"):
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )


def _read(path: Path) -> tuple[Tokenizer | None, str]:
    """Read a tokenizer.json, if that can be; name the limits that cut or fill every text."""
    try:
        with foreign_errors(BundleError, path.name):
            tokenizer = Tokenizer.from_file(str(path))
    except BundleError:
        return None, ""
    cut, filled = tokenizer.truncation, tokenizer.padding
    tokenizer.no_truncation()
    tokenizer.no_padding()
    limits = [f"truncation to {cut['max_length']} tokens"] if cut else []
    return tokenizer, " and ".join([*limits, *(["padding"] if filled else [])])


def _save(tokenizer: Tokenizer, path: Path) -> None:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.save(str(path))
