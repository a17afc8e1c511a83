from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from transfusion.data import load_emoji, load_glosses, load_tokenizer
from transfusion.data.tokenizer import TOKENIZER_FOLDER, train_tokenizer


TOKENIZER = load_tokenizer()
SPECIAL = ("<pad>", "<eos>", "<boi>", "<eoi>", "<image>")


def round_trip(text: str) -> str:
    return TOKENIZER.decode(TOKENIZER(text, split_special_tokens=True).input_ids)


def test_special_tokens() -> None:
    assert len(TOKENIZER) == 4096
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3, 4]
    assert (TOKENIZER.pad_token, TOKENIZER.eos_token, TOKENIZER.bos_token) == ("<pad>", "<eos>", None)
    assert (TOKENIZER.boi_token, TOKENIZER.eoi_token, TOKENIZER.image_token) == SPECIAL[2:]
    assert (TOKENIZER.boi_token_id, TOKENIZER.eoi_token_id, TOKENIZER.image_token_id) == (2, 3, 4)
    assert sum(file.stat().st_size for file in TOKENIZER_FOLDER.iterdir()) < 400_000


def test_adds_nothing_and_reads_special_tokens_where_asked() -> None:
    plain = TOKENIZER("a red heart").input_ids
    assert not set(plain) & set(range(5))
    assert TOKENIZER("a red heart<boi>").input_ids == [*plain, 2]


@pytest.mark.parametrize("token", SPECIAL)
def test_literal_control_strings_are_bytes(token: str) -> None:
    ids = TOKENIZER(f"a {token}{token} b", split_special_tokens=True).input_ids
    assert not set(ids) & set(range(5))
    assert TOKENIZER.decode(ids) == f"a {token}{token} b"


@pytest.mark.parametrize(
    "text", ["\U0001f3b7\u2764\ufe0f", " two  spaces\n\ttab ", "Curaçao … “x”", "n't 's  .", "\x00\x7f", "a , b ."]
)
def test_text_comes_back_exactly(text: str) -> None:
    assert round_trip(text) == text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(SPECIAL)).map(" ".join))
def test_any_text_comes_back_exactly(text: str) -> None:
    assert round_trip(text) == text
    assert not set(TOKENIZER(text, split_special_tokens=True).input_ids) & set(range(5))


def test_held_out_text_is_short_in_tokens() -> None:
    captions = [picture.captions[0] for picture in load_emoji("held_out")]
    tokens = sum(len(ids) for ids in TOKENIZER(captions).input_ids)
    assert tokens / len(captions) < 6
    glosses = load_glosses("held_out")[:1000]
    assert sum(map(len, glosses)) / sum(len(ids) for ids in TOKENIZER(glosses).input_ids) > 3.2


def test_saved_folder_loads_as_auto_tokenizer(tmp_path: Path) -> None:
    trained = train_tokenizer(["a red heart", "a red apple"], vocabulary_size=270)
    trained.save_pretrained(tmp_path)
    restored = AutoTokenizer.from_pretrained(tmp_path)
    assert restored.image_token_id == trained.image_token_id == 4
    assert restored("a red <image>").input_ids == trained("a red <image>").input_ids
    assert AutoTokenizer.from_pretrained(TOKENIZER_FOLDER).eoi_token_id == 3


def test_training_is_deterministic() -> None:
    texts = load_glosses("held_out")[:300]
    vocabularies = [train_tokenizer(texts, vocabulary_size=400).get_vocab() for _ in range(2)]
    assert vocabularies[0] == vocabularies[1] and len(vocabularies[0]) == 400
