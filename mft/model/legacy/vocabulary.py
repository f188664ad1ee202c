"""Vocabularies of original checkpoints, sentencepiece and tiktoken files, as tokenizers that give the same
ids.

Both libraries merge the pair whose joint piece ranks best, the leftmost of equals. A `tokenizers` BPE ranks
pairs, not pieces, so every way of splitting a piece becomes a merge, in an order that leaves the leftmost
first. The result is compared with the library itself on the full vocabulary before it is used: the
released files cannot be tried here, and a wrong id would train without an error.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mft.errors import UserError, shortened

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

WAY_OUT = "put a tokenizer.json into the folder"

SPACE = "▁"
"""What sentencepiece writes for a space."""

PAIRS = 20_000
"""Pairs of neighbouring pieces in the comparison, at most; together with 125,000 pieces it takes some
seconds."""

Text = TypeVar("Text", str, bytes)


def merges(pieces: Sequence[Text], parts: Container[Text]) -> Iterator[tuple[Text, Text]]:
    """Yields every split of each piece into two of `parts`, the best piece first.

    Two splits of one piece compete where they overlap in the text: `l m r` with l + m == m + r. The library
    takes the left one, so a split whose second part begins the piece again comes before its mirror image.
    """
    for piece in pieces:
        splits = [i for i in range(1, len(piece)) if piece[:i] in parts and piece[i:] in parts]
        for i in sorted(splits, key=lambda i: not piece.startswith(piece[i:])):
            yield piece[:i], piece[i:]


def from_sentencepiece(file: Path, extra: Sequence[str] = ()) -> Tokenizer:
    """Returns a sentencepiece BPE as a tokenizer: same ids for every text, same text for ids that a text has.

    Control pieces (<s>, </s>) are in its vocabulary, and no text becomes them; user-defined ones are added
    tokens. extra: names for the ids after the last piece, which no text becomes either; one that is a piece
    already is put in angle brackets. Raises UserError for a model that cannot be matched exactly: unigram, a
    normalisation table, no byte fallback.
    """
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models

    proto = ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError lies elsewhere from version to version
        raise UserError(f"{file} is not a sentencepiece model: {error}") from error
    _refuse(file, proto)
    kind = proto.SentencePiece
    own = sorted((p.piece for p in proto.pieces if p.type == kind.USER_DEFINED), key=len, reverse=True)
    ranked = [p.piece for p in sorted(proto.pieces, key=lambda p: -p.score) if p.type == kind.NORMAL]
    pieces = [p.piece for p in proto.pieces]
    names = [*pieces, *(name if name not in pieces else f"<{name}>" for name in extra)]
    vocabulary = {name: i for i, name in enumerate(names)}
    unknown = next(p.piece for p in proto.pieces if p.type == kind.UNKNOWN)
    pairs = list(merges(ranked, set(ranked)))
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    spec = proto.normalizer_spec
    tokenizer.normalizer = _spaces(spec.add_dummy_prefix, spec.remove_extra_whitespaces, own)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.remove_extra_whitespaces:
        steps.append(decoders.Replace(Regex(r"\A +"), ""))
    elif spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    # normalized: looked for in the text as it is after its spaces were replaced, like sentencepiece does
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece in own])

    library = SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type != kind.USER_DEFINED]
    _compare(file, tokenizer, texts, library.encode)
    return tokenizer


def _refuse(file: Path, proto: Any) -> None:
    trainer, normalizer, kind = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    kinds = [p.type for p in proto.pieces]
    reasons = {
        "it is not a BPE model": trainer.model_type != trainer.BPE,
        "it normalises text by a table of its own": bool(normalizer.precompiled_charsmap),
        "it marks the ends of words instead of their starts": trainer.treat_whitespace_as_suffix,
        "it keeps spaces as they are": not normalizer.escape_whitespaces,
        "it has pieces that are out of use": kind.UNUSED in kinds,
        "it has no piece for every byte": kinds.count(kind.BYTE) != 256,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{file} cannot be matched exactly: {reason}; {WAY_OUT}")


def _spaces(prefix: bool, trimmed: bool, own: Sequence[str]) -> Normalizer:
    """Returns what sentencepiece does to the spaces of a text, as a normalizer."""
    from tokenizers import Regex, normalizers

    steps: list[normalizers.Normalizer] = []
    if trimmed:
        runs = ((r"\A +", ""), (" +", " "), (rf"[ {SPACE}]+\z", ""))
        steps += [normalizers.Replace(Regex(run), left) for run, left in runs]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
    if prefix and own:
        # An added token is normalised on its own before it is looked for, and must come out as it is. The
        # price is a text that consists of nothing but one of them.
        names = "|".join(_escaped(piece) for piece in own)
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}(?=(?:{names})\z)"), ""))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _escaped(text: str) -> str:
    """Returns a regular expression for the text; Oniguruma has other special characters than re.escape
    knows."""
    return "".join(c if c.isalnum() else rf"\x{{{ord(c):x}}}" for c in text)


def from_tiktoken(file: Path, pattern: str) -> Tokenizer:
    """Returns a tiktoken file as a tokenizer, without special tokens; pattern: how a text is cut before
    merging.

    Raises UserError for a file that does not hold a base64 token and its rank in each line.
    """
    import tiktoken
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        reason = f"a token in base64 and its rank in each line: {error}"
        raise UserError(f"{file} is not a tiktoken file, {reason}") from error
    letters = bytes_to_unicode()

    def readable(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{file}: its ranks are not 0 to {len(ranks) - 1}, each once")
    ranked = sorted(ranks, key=ranks.__getitem__)
    vocabulary = {readable(token): rank for token, rank in ranks.items()}
    pairs = [(readable(left), readable(right)) for left, right in merges(ranked, ranks)]
    # ignore_merges: tiktoken looks a whole word up before it merges
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    library = tiktoken.Encoding(file.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    texts = [token.decode("utf-8", errors="ignore") for token in ranked]
    _compare(file, tokenizer, texts, library.encode_ordinary_batch)
    return tokenizer


def _compare(
    file: Path, ours: Tokenizer, pieces: list[str], library: Callable[[list[str]], list[list[int]]]
) -> None:
    """Raises UserError unless every piece, and pairs of them from all over the vocabulary, have the library's
    ids."""
    texts = pieces + [a + b for a, b in itertools.pairwise(pieces)][:: 1 + len(pieces) // PAIRS]
    for text, encoding, ids in zip(texts, ours.encode_batch_fast(texts), library(texts), strict=True):
        if encoding.ids != ids:
            reason = f"{shortened(text)} is {ids} there and would be {encoding.ids} here"
            raise UserError(f"{file} cannot be matched exactly: {reason}; {WAY_OUT}")
