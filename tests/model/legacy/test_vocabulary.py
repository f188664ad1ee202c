"""Tokenizers made from sentencepiece and tiktoken files give the ids and the texts of those libraries."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from mft.errors import UserError
from mft.model.legacy.families import QWEN_WORDS
from mft.model.legacy.vocabulary import from_sentencepiece, from_tiktoken
from tests.model import vocabularies

OPTIONS = {
    "dummy prefix": {},
    "none": {"add_dummy_prefix": False},
    "trimmed": {"remove_extra_whitespaces": True},
    "trimmed, no prefix": {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    "own symbols": {
        "user_defined_symbols": ["<n>", "|tab|", "<n>a", "def", "▁▁▁"],
        "control_symbols": ["<r>"],
    },
    "own symbols, no prefix": {"user_defined_symbols": ["<n>", "ab"], "add_dummy_prefix": False},
}
NEAR = st.text(st.sampled_from("ab 的今天🙂\n\t<n>▁_.(1"), max_size=60)
"""Texts of few characters, in which pieces overlap in every way."""
ANY = st.text(max_size=60)


@pytest.fixture(scope="module", params=OPTIONS)
def sentencepieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    file = vocabularies.sentencepiece(
        tmp_path_factory.mktemp("sp") / "tokenizer.model", **OPTIONS[request.param]
    )
    return SentencePieceProcessor(model_file=str(file)), from_sentencepiece(file)


def test_sentencepiece(sentencepieces) -> None:
    library, ours = sentencepieces

    def check(text: str) -> None:
        ids = library.encode(text)
        assert ours.encode(text).ids == ids
        assert ours.decode(ids) == library.decode(ids)

    for text in vocabularies.TEXTS:
        check(text)

    @settings(max_examples=300, deadline=None, database=None)
    @given(NEAR | ANY)
    def random(text: str) -> None:
        if text not in OPTIONS["own symbols"]["user_defined_symbols"]:  # see below
            check(text)

    random()


def test_a_text_that_is_nothing_but_a_symbol_of_its_own_lacks_the_dummy_prefix(tmp_path: Path) -> None:
    """The one known difference."""
    file = vocabularies.sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=["<n>"])
    ours, library = from_sentencepiece(file), SentencePieceProcessor(model_file=str(file))
    assert library.encode("<n>", out_type=str) == ["▁", "<n>"] and ours.encode("<n>").tokens == ["<n>"]
    assert ours.encode("<n><n>").ids == library.encode("<n><n>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "it is not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "a table of its own"),
        ({"byte_fallback": False}, "no piece for every byte"),
        ({"treat_whitespace_as_suffix": True}, "the ends of words"),
    ],
)
def test_what_cannot_be_exact_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    file = vocabularies.sentencepiece(tmp_path / "tokenizer.model", **options)
    with pytest.raises(UserError, match=f"cannot be matched exactly: .*{message}.*put a tokenizer.json"):
        from_sentencepiece(file)


def test_pieces_that_rank_equally_are_found_by_the_comparison(tmp_path: Path) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    file = vocabularies.sentencepiece(tmp_path / "tokenizer.model")
    proto = ModelProto.FromString(file.read_bytes())
    for piece in proto.pieces:
        piece.score = 0
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=r"cannot be matched exactly: .* there and would be"):
        from_sentencepiece(file)
    file.write_bytes(b"version https://git-lfs")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        from_sentencepiece(file)


def test_tiktoken(tmp_path: Path) -> None:
    ranks = vocabularies.tiktoken(tmp_path / "qwen.tiktoken", QWEN_WORDS)
    library = tiktoken.Encoding("qwen", pat_str=QWEN_WORDS, mergeable_ranks=ranks, special_tokens={})
    ours = from_tiktoken(tmp_path / "qwen.tiktoken", QWEN_WORDS)

    @settings(max_examples=500, deadline=None, database=None)
    @given(NEAR | ANY | st.text(st.sampled_from("'sSldaé \n\r\u00a0\u3000.1"), max_size=60), st.data())
    @example("it'S We'LL \r\n\r\n  x", None)
    def random(text: str, data: st.DataObject | None) -> None:
        ids = library.encode_ordinary(text)
        assert ours.encode(text).ids == ids
        if data is not None:
            ids = data.draw(st.lists(st.integers(0, len(ranks) - 1)))  # most are no valid text
        assert ours.decode(ids) == library.decode(ids)

    random()
    for text in vocabularies.TEXTS:
        assert ours.encode(text).ids == library.encode_ordinary(text)


def test_wrong_tiktoken_files(tmp_path: Path) -> None:
    file = tmp_path / "qwen.tiktoken"
    file.write_bytes(b"not base64\n")
    with pytest.raises(UserError, match="is not a tiktoken file"):
        from_tiktoken(file, QWEN_WORDS)
    file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i + 1) for i in range(256)))
    with pytest.raises(UserError, match="its ranks are not 0 to 255, each once"):
        from_tiktoken(file, QWEN_WORDS)
