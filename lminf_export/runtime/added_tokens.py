"""Tokens that stand beside `tokenizer.json`, in the files of older tokenizers.

transformers adds them when it loads a tokenizer; read by itself, `tokenizer.json` would split them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
SIDE_FILES = (CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
# Halves of characters, which are no text: Python reads bytes that are not UTF-8 as such, too.
SURROGATE = re.compile("[\ud800-\udfff]")
# Special tokens without a role: a list, or a table of roles of the model's own.
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
# The order in which transformers adds those that have no id.
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FIELDS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def merge_added_tokens(
    tokenizer: Tokenizer, folder: Path, names: Iterable[str] = SIDE_FILES
) -> list[str]:
    """Add to a tokenizer what the files beside it name, in transformers' order and with its flags.

    Args:
        tokenizer: changed in place.
        folder: where the files are.
        names: which of `SIDE_FILES` may be read; those that do not exist are left out.

    Returns:
        What is wrong with the files, one line each: damage, and tokens that got another id than
        the file gives them. What is damaged is left out.
    """
    files = _SideFiles(folder, tuple(names))
    numbered = files.numbered()
    there = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    wanted = {token.content: token for _, (token, _) in sorted(numbered.items())}
    # A special token that is there already stays as it is.
    seen = wanted.keys() | there.keys()
    new = [token for token in files.special() if token.content not in seen]
    # The tokenizer keeps one added token of each content, with the flags it got last.
    if fresh := [t for t in (*wanted.values(), *new) if repr(t) != repr(there.get(t.content))]:
        tokenizer.add_tokens(fresh)
    if isinstance(split := files.config.get("split_special_tokens"), bool):
        tokenizer.encode_special_tokens = split
    return [*files.problems, *_other_ids(tokenizer, numbered)]


def role_tokens(folder: Path, names: Iterable[str] = SIDE_FILES) -> dict[str, str]:
    """Return the tokens that have a role: "bos_token" → text, as chat templates name them.

    Args:
        folder: where the files are.
        names: which of `SIDE_FILES` may be read.
    """
    config = _SideFiles(folder, tuple(names)).config
    tokens = {role: _token(config.get(role), special=True) for role in _ROLES}
    return {role: token.content for role, token in tokens.items() if token is not None}


class _SideFiles:
    """Contents of the files, merged as transformers merges them.

    Attributes:
        config: tokenizer_config.json, with special_tokens_map.json where that counts.
        problems: what could not be read.
    """

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.problems: list[str] = []
        self._folder, self._names = folder, names
        self.config = self._read(CONFIG)
        self._decoder = self.config.get("added_tokens_decoder")
        if not self.config.get(_EXTRA) and _OLD_EXTRA in self.config:
            self.config[_EXTRA] = self.config.pop(_OLD_EXTRA)
        if self._decoder is None:
            # Newer files say it all in one place; older ones in three.
            older = self._read(SPECIAL_TOKENS_MAP)
            if isinstance(older.get(_EXTRA), list):
                older[_EXTRA] = [*self._listed(self.config.get(_EXTRA)), *older[_EXTRA]]
            own = {key: self.config[key] for key in older if key in self.config and _is_own(key)}
            self.config |= older | own
        self._extra = self.config.get(_EXTRA if _EXTRA in self.config else _OLD_EXTRA)

    def numbered(self) -> dict[int, tuple[AddedToken, str]]:
        """Return id → token and file, of the tokens the files give an id."""
        name, pairs = ADDED_TOKENS, []
        if self._decoder is None:
            pairs = [(number, text) for text, number in self._read(ADDED_TOKENS).items()]
        elif isinstance(self._decoder, dict):
            name, pairs = CONFIG, [*self._decoder.items()]
        else:
            self.problems.append(f"{CONFIG}: added_tokens_decoder is no table; it is left out")
        # The older file has no flags: they follow from what the others say of the token.
        old = [self.config.get(role) for role in _ROLES] + self._listed(self.config.get(_EXTRA))
        special = _contents(old) if self._decoder is None else set()
        roles = _contents(self._roles())
        found = {}
        for number, entry in pairs:
            content = entry.get("content") if isinstance(entry, dict) else entry
            token = _token(entry, special=isinstance(content, str) and content in special)
            if token is None or not _is_integer(number):
                self.problems.append(
                    f"{name}: the added token {_short(entry)} with id {_short(number)} cannot be "
                    "read; it is left out"
                )
            else:
                token.special = token.special or token.content in roles
                found[int(number)] = (token, name)
        return found

    def special(self) -> Iterator[AddedToken]:
        """Yield the special tokens: those that have a role, then the others."""
        for entry in [*self._roles(), *self._listed(self._extra)]:
            token = _token(entry, special=True)
            if token is not None:
                yield token

    def _roles(self) -> list[object]:
        more = self._extra if isinstance(self._extra, dict) else {}
        named = {key: value for key, value in self.config.items() if key.endswith("_token")} | more
        first = [named.pop(role) for role in _ROLES if role in named]
        return [*first, *named.values()]

    @staticmethod
    def _listed(extra: object) -> list[object]:
        return extra if isinstance(extra, list) else []

    def _read(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        if name not in self._names or not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            self.problems.append(f"{name} cannot be read and is left out: {_short(error)}")
            return {}
        if not isinstance(content, dict):
            self.problems.append(f"{name} is no table of names and is left out")
            return {}
        return content


def _is_own(key: str) -> bool:
    """Whether this is a role that only some models have, such as image_token."""
    return key.endswith("_token") and key not in _ROLES


def _contents(entries: Iterable[object]) -> set[str]:
    tokens = (_token(entry, special=True) for entry in entries)
    return {token.content for token in tokens if token is not None}


def _token(entry: object, *, special: bool) -> AddedToken | None:
    """Return an added token, or None if this describes none."""
    fields = entry if isinstance(entry, dict) else {"content": entry, "normalized": not special}
    content = fields.get("content")
    if not isinstance(content, str) or not content or SURROGATE.search(content):
        return None
    flags = {name: fields[name] for name in _FIELDS if isinstance(fields.get(name), bool)}
    return AddedToken(content, **flags | ({"special": True} if special else {}))


def _other_ids(tokenizer: Tokenizer, numbered: dict[int, tuple[AddedToken, str]]) -> list[str]:
    """Return one line if tokens have other ids than the files give them."""
    wrong = [
        (name, token.content, number, tokenizer.token_to_id(token.content))
        for number, (token, name) in sorted(numbered.items())
        if tokenizer.token_to_id(token.content) != number
    ]
    if not wrong:
        return []
    name, content, number, found = wrong[0]
    others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return [
        f"{name} gives the token {_short(content)} the id {number}{others}, tokenizer.json makes "
        f"it {found}: the model may know it by the other one; correct the file"
    ]


def _is_integer(number: object) -> bool:
    if isinstance(number, str):
        return number.isascii() and number.isdigit() and len(number) < 10
    return isinstance(number, int) and not isinstance(number, bool) and abs(number) < 2**63


def _short(value: object) -> str:
    text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    return text if len(text) <= 60 else text[:59] + "…"
