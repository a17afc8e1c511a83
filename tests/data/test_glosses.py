import re
from pathlib import Path

import pytest

from transfusion.data import load_glosses
from transfusion.data.captions import split_of
from transfusion.data.glosses import gloss_file, read_counted_words, read_synsets, select_glosses, wordnet_licence


DATA = {
    "noun": """  1 This software is licensed.
00001740 03 n 01 entity 0 000 | that which is perceived
02084071 05 n 02 dog 0 domestic_dog 0 000 | a member of the genus Canis; "the dog barked all night"
00007846 09 n 01 flying_start 0 000 | an auspicious beginning of things
02958343 06 n 01 motor_car 0 000 | a wheeled vehicle with a motor
09044862 15 n 01 Paris 0 000 | the capital of France
""",
    "verb": "01835496 38 v 01 move 0 000 01 + 02 00 | change location; move or proceed\n",
    "adj": "00005205 00 a 01 whole(a) 0 000 | including all components\n",
}
SENSES = """dog%1:05:00:: 02084071 1 42
flying_start%1:09:00:: 00007846 1 3
motor_car%1:06:00:: 02958343 1 2
move%2:38:00:: 01835496 1 130
paris%1:15:00:: 09044862 1 9
whole%3:00:00:: 00005205 1 60
entity%1:03:00:: 00001740 1 0
"""


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    for part, text in DATA.items():
        (tmp_path / f"data.{part}").write_text(text, encoding="utf-8")
    (tmp_path / "index.sense").write_text(SENSES, encoding="utf-8")
    return tmp_path


def test_synsets_are_read_without_licence_examples_and_markers(dictionary: Path) -> None:
    synsets = {synset.words[0]: synset for synset in read_synsets(dictionary)}
    assert list(synsets) == ["entity", "dog", "flying start", "motor car", "Paris", "move", "whole"]
    assert synsets["dog"].words == ("dog", "domestic dog")
    assert synsets["dog"].gloss == "a member of the genus Canis"
    assert (synsets["whole"].part_of_speech, synsets["move"].gloss) == ("a", "change location; move or proceed")


def test_selection_takes_common_words_named_words_and_no_abstract_phrases(dictionary: Path) -> None:
    assert "entity" not in read_counted_words(dictionary)
    words = [gloss.partition(":")[0] for gloss in select_glosses(dictionary, set())]
    assert words == ["dog", "motor car", "move", "whole"]
    named = [gloss.partition(":")[0] for gloss in select_glosses(dictionary, {"entity", "flying start"})]
    assert named == ["entity", "dog", "flying start", "motor car", "move", "whole"]


def test_licence_is_the_head_of_the_data_files(dictionary: Path) -> None:
    assert wordnet_licence(dictionary) == "This software is licensed.\n"


def test_embedded_glosses() -> None:
    train, held_out = load_glosses("train"), load_glosses("held_out")
    assert (len(train), len(held_out)) == (30867, 3452)
    assert load_glosses("all") == train + held_out
    assert sum(gloss_file(split).stat().st_size for split in ("train", "held_out")) < 1_000_000
    assert all(re.fullmatch(r"[^:]+: \S.*\S", gloss) for gloss in train + held_out)
    words = [{gloss.partition(":")[0] for gloss in part} for part in (train, held_out)]
    assert not words[0] & words[1]
    assert all(split_of(word) == "held_out" for word in words[1])
    assert {"heart", "apple", "dog", "red"} <= words[0] | words[1]
    with pytest.raises(ValueError, match="'valid'"):
        load_glosses("valid")
