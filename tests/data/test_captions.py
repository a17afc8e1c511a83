import pytest

from transfusion.data.captions import phrasings, readable_name, slug, split_of, with_article


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("flag: Niue", "flag of Niue"),
        ("flag: Bosnia & Herzegovina", "flag of Bosnia and Herzegovina"),
        ("keycap: 1", "keycap 1"),
        ("man: red hair", "man with red hair"),
        ("woman: bald", "bald woman"),
        ("man running: facing right", "man running facing right"),
        ("family: man, woman, boy", "family of man, woman and boy"),
        ("couple with heart: woman, man", "couple with heart, woman and man"),
        ("Japanese “here” button", 'Japanese "here" button'),
        ("woman’s hat", "woman's hat"),
    ],
)
def test_labels_become_plain_words(label: str, name: str) -> None:
    assert readable_name(label) == name


@pytest.mark.parametrize(
    "caption",
    [
        "a red heart", "an apple", "an hourglass done", "a unicorn", "a ewe", "an umbrella", "an x-ray", "a bus",
        "a NEW button", "an NG button", "an SOS button", "the flag of Niue", "the Statue of Liberty", "scissors",
        "grapes", "rice", "people hugging", "a person lifting weights", "a face savoring food", "one o'clock",
        "women with bunny ears", "sunglasses", "a woman with bunny ears", "a glass of milk", "Aries", "no smoking",
        "Santa Claus", "a sun with face", "a house with garden", "a hippopotamus", "a compass", "a bag of apples",
    ],
)  # fmt: skip
def test_articles(caption: str) -> None:
    first, _, rest = caption.partition(" ")
    assert with_article(rest if first in {"a", "an", "the"} else caption) == caption


def test_phrasings_begin_with_the_plain_one_and_leave_out_known_words() -> None:
    assert phrasings("red heart", ["red", "Heart", "love", "valentine", "emotion", "more"], "noto") == [
        "a red heart",
        "an emoji of a red heart",
        "a flat picture of a red heart",
        "red heart, love, valentine, emotion",
        "a red heart, noto style",
    ]
    assert phrasings("red heart", ["red"]) == phrasings("red heart", [])


def test_slug_keeps_ascii_words() -> None:
    assert slug("Curaçao (the flag), woman's") == "curacao-the-flag-womans"


def test_split_is_a_tenth_and_ignores_who_is_shown() -> None:
    names = [f"thing {number}" for number in range(3000)]
    share = sum(split_of(name) == "held_out" for name in names) / len(names)
    assert 0.08 < share < 0.12
    for activity in range(30):
        assert len({split_of(f"{who} doing {activity}") for who in ("man", "woman", "person")}) == 1
    assert split_of("man surfing facing right") == split_of("woman surfing")
    assert split_of("Piñata") == split_of("pinata")


def test_split_is_fixed() -> None:
    """Trained models and the embedded data depend on it."""
    names = ("bell", "bison", "heart", "apple", "brown heart", "red heart")
    assert [name for name in names if split_of(name) == "held_out"] == ["bell", "bison", "brown heart"]
