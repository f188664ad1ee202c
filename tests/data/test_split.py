from collections import Counter

from mft.batch import Message
from mft.data.split import digest_of, split_of


def conversations(n):
    return [[Message("user", f"q{i}"), Message("assistant", f"a{i}")] for i in range(n)]


def test_proportions_are_met_and_zero_means_none():
    counts = Counter(split_of(digest_of(c), [90, 10, 0]) for c in conversations(4000))
    assert set(counts) == {0, 1} and 320 < counts[1] < 480
    assert {split_of(digest_of(c), [0, 0, 3]) for c in conversations(50)} == {2}


def test_the_split_depends_on_the_conversation_alone():
    first = [split_of(digest_of(c), [80, 10, 10]) for c in conversations(300)]
    assert first == [split_of(digest_of(c), [0.8, 0.1, 0.1]) for c in conversations(600)][:300]
    plain, marked = Message("assistant", "a"), Message("assistant", "a", train=False)
    assert digest_of([plain]) == digest_of([marked])
