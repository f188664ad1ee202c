import numpy as np
import pytest

from mft.data.cache.store import Samples
from mft.data.preview import chosen, spans
from mft.data.template import Template
from mft.data.tokenize import Encoder
from tests.data.conftest import TALK, chat


def test_spans_spell_the_text_and_divide_it_where_loss_begins_and_ends(kind):
    template = Template()
    ids_S, trained_S = Encoder(kind, template).encode(TALK)
    found = spans(ids_S, trained_S, kind)
    end = str(kind.eos_token)
    assert "".join(text for text, _ in found) == kind.decode(ids_S, clean_up_tokenization_spaces=False)
    assert [trained for _, trained in found] == [False, True, False, True, False]
    assert found[1][0].strip(" ") == "return w * h\n" + end and found[3][0].strip(" ") == "<im" + end


def test_a_first_token_is_not_shown_as_trained(tokenizer):
    ids_S, _ = Encoder(tokenizer, Template()).encode(TALK)
    found = spans(ids_S, np.ones(len(ids_S), bool), tokenizer)
    assert [trained for _, trained in found] == [False, True]


@pytest.mark.parametrize(("per_task", "lines"), [(3, [1, 4, 7, 1]), (1, [1, 1])])
def test_samples_are_spread_over_the_files(make_store, per_task, lines):
    stores = [make_store([chat(f"q{i}", "a") for i in range(9)], "a", split=[1, 0, 0])]
    stores.append(make_store([chat("q", "a")], "b", split=[1, 0, 0]))
    samples = Samples(stores, "train")
    found = [samples.origin(i).rsplit(":", 1)[1] for i in chosen(samples, per_task)]
    assert found == [str(line) for line in lines]
