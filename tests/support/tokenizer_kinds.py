"""Small tokenizers of every kind that language models have, made without any model's files."""

from __future__ import annotations

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE, Unigram, WordPiece

# Characters that are tokens of their own; all others are bytes, where there are bytes.
_LETTERS = "▁abcdehlnorstwé日.,!'"
_MERGES = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("▁", "▁"), ("日", "日")]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPECIAL = ["<unk>", "<s>", "</s>"]


def llama2() -> Tokenizer:
    """Sentencepiece's BPE with bytes, a space before the text, as Llama 2 and Mistral have it."""
    tokenizer = _fallback_bpe()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def gemma() -> Tokenizer:
    """BPE with bytes and no space before the text."""
    tokenizer = _fallback_bpe()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """Unigram with bytes and Metaspace."""
    pieces = [*_SPECIAL, *_BYTES, *_LETTERS, *("".join(pair) for pair in _MERGES)]
    tokenizer = Tokenizer(
        Unigram([(p, -float(len(_MERGES)) / len(p)) for p in pieces], 0, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    _add_special(tokenizer)
    return tokenizer


def byte_level() -> Tokenizer:
    """Byte-level BPE as GPT-2 and Llama 3 have it, with tokens that cut characters apart."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # 日 is E6 97 A5: merged are its last byte with the next one's first, and " é" with one byte.
    merges = [("¥", "æ"), ("Ġ", "Ã"), ("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("©", "ð"), ("Ċ", "Ċ")]
    vocab = [*_SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(vocab)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer)
    return tokenizer


def wordpiece() -> Tokenizer:
    """Words and their ends, joined and cleaned up by the decoder."""
    words = [*_SPECIAL, *"abc.,!'", "the", "do", "##s", "##n", "##a", "##b", "n't", "[UNK]"]
    model = WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _add_special(tokenizer)
    return tokenizer


def word_ends() -> Tokenizer:
    """BPE that marks the end of a word."""
    letters = [*"abcdehlnort.,", *(f"{letter}</w>" for letter in "abcdehlnort.,")]
    merges = [("h", "e</w>"), ("t", "he</w>")]
    vocab = [*_SPECIAL, *letters, *("".join(pair) for pair in merges)]
    model = BPE(
        {token: i for i, token in enumerate(vocab)},
        merges,
        end_of_word_suffix="</w>",
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    _add_special(tokenizer)
    return tokenizer


def words() -> Tokenizer:
    """Whole words without a decoder: tokens are joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "removed")
    _add_special(tokenizer)
    return tokenizer


KINDS = {
    kind.__name__: kind
    for kind in (llama2, gemma, unigram, byte_level, wordpiece, word_ends, words)
}


def _fallback_bpe() -> Tokenizer:
    vocab = [*_SPECIAL, *_BYTES, *_LETTERS, *("".join(pair) for pair in _MERGES)]
    tokenizer = Tokenizer(
        BPE(
            {token: i for i, token in enumerate(vocab)},
            _MERGES,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    _add_special(tokenizer)
    return tokenizer


def _add_special(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("é日", special=False)])
