"""Vocabulary and encoding: the meaning of the article's listings, with the corners they leave open."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattn.text import PAD, UNK, build_vocab, encode_texts, separate_punctuation

TEXTS = ["The cat sat", "the mat\tTHE end", "A cat"]


def test_vocabulary_numbers_words_by_frequency_then_by_first_appearance():
    assert build_vocab(TEXTS) == {
        "<PAD>": 0, "<UNK>": 1, "the": 2, "cat": 3, "sat": 4, "mat": 5, "end": 6, "a": 7,
    }  # fmt: skip


def test_vocabulary_keeps_the_most_frequent_words():
    assert build_vocab(TEXTS, max_vocab=2) == {"<PAD>": 0, "<UNK>": 1, "the": 2, "cat": 3}


def test_words_that_look_like_the_special_ones_do_not_displace_them():
    vocab = build_vocab(["<PAD> <unk> <PAD>"])
    assert (vocab["<PAD>"], vocab["<UNK>"], vocab["<pad>"], vocab["<unk>"]) == (PAD, UNK, 2, 3)


def test_encoding_lower_cases_pads_truncates_and_marks_unknown_words():
    encoded = encode_texts(["THE dog", "", "the cat sat the"], build_vocab(TEXTS), max_len=3)
    assert encoded.tolist() == [[2, UNK, PAD], [PAD, PAD, PAD], [2, 3, 4]]
    assert encoded.dtype == torch.int64


@given(st.lists(st.text(alphabet="ab AB\n\u3000ß", max_size=12), max_size=8), st.integers(1, 6), st.integers(1, 6))
def test_encoding_is_the_definition(texts, max_vocab, max_len):
    vocab = build_vocab(texts, max_vocab)
    expected = []
    for text in texts:
        ids = [vocab.get(word, UNK) for word in text.lower().split()][:max_len]
        expected.append(ids + [PAD] * (max_len - len(ids)))
    encoded = encode_texts(iter(texts), vocab, max_len)  # texts may come from a generator
    assert encoded.shape == (len(texts), max_len)
    assert encoded.tolist() == expected


@pytest.mark.parametrize("call", [build_vocab, lambda text: encode_texts(text, {})])
def test_one_string_is_not_taken_for_its_letters(call):
    with pytest.raises(TypeError, match=r"expected several texts, got one string, 'hello'.*\[text\]"):
        call("hello")


def test_sizes_below_one_are_errors():
    with pytest.raises(ValueError, match="max_vocab: expected at least 1, got 0"):
        build_vocab(TEXTS, max_vocab=0)
    with pytest.raises(ValueError, match="max_len: expected at least 1, got -1"):
        encode_texts(TEXTS, {}, max_len=-1)


def test_punctuation_becomes_words_of_its_own():
    assert separate_punctuation("Close the socket_fd (café's).") == "Close the socket_fd ( café ' s ) ."
