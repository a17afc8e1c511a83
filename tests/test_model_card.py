"""The model card: what it says, what it does not, whose it is, and whether its example runs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from tests.fake_hub import FakeHub, make_fake_hub
from tests.test_sharing import ROOT, make_pair, make_pipeline
from tests.tiny_processor import picture
from transfusion.model_card import CARD_MARK, CardContents, usage, write_card


CONTENTS: dict[str, Any] = {
    "license": "apache-2.0",
    "datasets": ["user/pictures", "the emoji of a well-known font"],
    "metrics": {"drawn_nearest": 0.875, "num_pictures": 100, "settings": {"seed": 0, "name": "x"}, "done": True},
    "evaluated_on": "held-out emoji",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return make_fake_hub(tmp_path, monkeypatch)


def read_card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def card_of(hub: FakeHub, repo_id: str) -> ModelCard:
    return ModelCard(hub.repositories[repo_id]["README.md"].decode())


def data_of(card: ModelCard) -> Any:
    """The front matter, whose fields are those that were given."""
    return card.data


def example(card: ModelCard) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    return code


def test_metadata(tmp_path: Path) -> None:
    write_card(tmp_path, "user/name", card=CONTENTS, tags=["emoji"], with_code=True)
    data = data_of(read_card(tmp_path))
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "any-to-any"
    assert {"transfusion", "diffusers", "text-to-image", "image-to-text", "custom_code", "emoji"} <= set(data.tags)
    assert data.license == "apache-2.0"
    assert data.datasets == ["user/pictures"]  # the Hub takes names alone
    assert data.model_name == "name"
    assert {(one.metric_type, one.metric_value) for one in data.eval_results} == {
        ("drawn_nearest", 0.875),
        ("num_pictures", 100),
    }
    assert {one.dataset_name for one in data.eval_results} == {"held-out emoji"}


def test_text(tmp_path: Path) -> None:
    write_card(tmp_path, "user/name", card=CardContents(**CONTENTS))
    text = read_card(tmp_path).text
    assert "# name\n" in text
    assert "- [user/pictures](https://huggingface.co/datasets/user/pictures)\n- the emoji of a well-known font" in text
    assert "| drawn nearest | 0.875 |\n| num pictures | 100 |" in text
    assert "Measured on: held-out emoji." in text
    assert "Settings: seed 0." in text
    assert "## Licence\n\napache-2.0" in text


def test_what_is_not_said_is_not_guessed(tmp_path: Path) -> None:
    write_card(tmp_path, "user/name")
    card = read_card(tmp_path)
    assert data_of(card).license is None
    assert data_of(card).datasets is None
    assert data_of(card).eval_results is None
    assert "widget" not in data_of(card).to_dict()
    for title in ("Training data", "Results", "Licence"):
        assert f"## {title}\n\nNot stated." in card.text
    assert "## Samples" not in card.text


def test_samples_are_shown(tmp_path: Path) -> None:
    marked = picture(1)
    marked.save(tmp_path / "mine.png", icc_profile=b"my screen")
    write_card(tmp_path, "user/name", card={"samples": [("a red heart", picture()), tmp_path / "mine.png"]})
    card = read_card(tmp_path)
    assert data_of(card).widget == [
        {"text": "a red heart", "output": {"url": "assets/sample_0.png"}},
        {"text": "", "output": {"url": "assets/sample_1.png"}},
    ]
    shown = re.findall(r"!\[(.*)\]\((.*)\)", card.text)
    assert shown == [("a red heart", "assets/sample_0.png"), ("", "assets/sample_1.png")]
    for index, (_, file) in enumerate(shown):
        with Image.open(tmp_path / file) as saved:
            assert saved.tobytes() == picture(index).tobytes()
            assert not saved.info


def test_metadata_of_a_photo_stays_at_home(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "my camera"
    exif[0x0112] = 6  # the camera lay on its side
    picture(height=4, width=6).save(tmp_path / "photo.jpg", exif=exif)
    write_card(tmp_path, "user/name", card={"samples": [tmp_path / "photo.jpg"]})
    assert b"my camera" not in (tmp_path / "assets" / "sample_0.png").read_bytes()
    with Image.open(tmp_path / "assets" / "sample_0.png") as saved:
        assert (saved.height, saved.width) == (6, 4)


@pytest.mark.parametrize("name", ["license", "datasets", "evaluated_on", "base_model"])
def test_paths_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a path of this machine; give a name that others know"):
        write_card(tmp_path, "user/name", card={name: str(tmp_path)})


@pytest.mark.parametrize("name", ["~/pictures", "../mine", "..", r"C:\Users\me", "file:///home/me", r"\\server\x"])
def test_paths_of_every_system_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a path of this machine"):
        CardContents(datasets=[name])


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"license": ["mit"]}, r"\['mit'\]; give a string"),
        ({"samples": "x.png"}, "samples='x.png'; give a list"),
        ({"samples": [3]}, "Sample 0 is 3"),
        ({"samples": [(picture(), picture(), picture())]}, "Sample 0 is"),
        ({"metrics": 3}, "metrics=3"),
        ({"base_model": "my old model"}, "base_model='my old model'; give its name on the Hub"),
        ({"base_model": "runs/of/mine"}, "base_model='runs/of/mine'; give its name on the Hub"),
    ],
)
def test_wrong_contents_are_refused(card: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        write_card(tmp_path, "user/name", card=card)


def test_prompts_are_shown_as_they_are(tmp_path: Path) -> None:
    write_card(tmp_path, "user/name", card={"samples": [("a ](x) <b>\n# H", picture())]})
    text = read_card(tmp_path).text
    assert r"![a \]\(x\) \<b\> \# H](assets/sample_0.png)" in text and "\n# H" not in text


def test_an_example_for_adapters(tmp_path: Path) -> None:
    write_card(tmp_path, "user/adapter", "adapter", {"base_model": "user/base"})
    card = read_card(tmp_path)
    assert data_of(card).base_model == "user/base" and data_of(card).library_name == "peft"
    assert 'AutoModel.from_pretrained("user/base")' in example(card)
    assert 'model.load_adapter("user/adapter")' in example(card)
    write_card(tmp_path, "user/adapter", "adapter")
    assert "```" not in read_card(tmp_path).text and "does not name" in read_card(tmp_path).text


def test_unknown_contents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="card has 'licence'; allowed: license, datasets"):
        write_card(tmp_path, "user/name", card={"licence": "mit"})
    with pytest.raises(ValueError, match="card=True; give a dictionary"):
        write_card(tmp_path, "user/name", card=True)


def test_push_writes_a_card_with_its_pictures(hub: FakeHub) -> None:
    make_pipeline().push_to_hub("user/name", card={**CONTENTS, "samples": [picture()]}, tags="emoji")
    assert "assets/sample_0.png" in hub.repositories["user/name"]
    card = card_of(hub, "user/name")
    assert data_of(card).license == "apache-2.0"
    assert "emoji" in data_of(card).tags
    assert "custom_code" not in data_of(card).tags


def test_save_pretrained_writes_a_card_where_asked(tmp_path: Path) -> None:
    model, processor = make_pair()
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()
    processor.save_pretrained(tmp_path / "name", card={"license": "mit"}, repo_id="user/name")
    assert data_of(read_card(tmp_path / "name")).license == "mit"
    assert '"user/name"' in read_card(tmp_path / "name").text


def test_a_card_of_ours_is_written_again_only_with_new_contents(hub: FakeHub) -> None:
    model, processor = make_pair()
    model.push_to_hub("user/name", card={"license": "mit"})
    processor.push_to_hub("user/name")
    assert data_of(card_of(hub, "user/name")).license == "mit"
    processor.push_to_hub("user/name", card={"license": "apache-2.0"})
    assert data_of(card_of(hub, "user/name")).license == "apache-2.0"


@pytest.mark.parametrize("place", ["folder", "repository", "both"])
def test_a_card_that_a_person_wrote_stays(place: str, hub: FakeHub, tmp_path: Path) -> None:
    own = "---\nlicense: mit\n---\n\n# My model\n"
    folder = tmp_path / "mine"
    folder.mkdir()
    if place != "repository":
        (folder / "README.md").write_text(own if place == "folder" else "# What the repository does not know")
    if place != "folder":
        hub.repositories["user/name"] = {"README.md": own.encode()}
    model, _ = make_pair()
    model.save_pretrained(folder, push_to_hub=True, repo_id="user/name", card={"license": "apache-2.0"})
    assert hub.repositories["user/name"]["README.md"].decode() == own
    model.push_to_hub("user/name", card={"license": "apache-2.0"}, tags=["emoji"])
    changed = card_of(hub, "user/name")
    assert changed.data.to_dict() == {"license": "mit", "tags": ["emoji"]}
    assert changed.text.strip() == "# My model"


def test_a_card_that_cannot_be_read_is_not_written_over(hub: FakeHub) -> None:
    hub.repositories["user/name"] = {"README.md": b"# Mine"}
    hub.is_down = True
    with pytest.raises(OSError, match="did not answer"):
        make_pair()[0].push_to_hub("user/name")
    assert hub.repositories["user/name"] == {"README.md": b"# Mine"}


def test_a_branch_has_its_own_card(hub: FakeHub) -> None:
    hub.repositories["user/name"] = {"README.md": b"# On main"}
    hub.repositories["user/name@new"] = {"README.md": b"# On the branch"}
    model, _ = make_pair()
    model.push_to_hub("user/name", revision="new", tags=["emoji"])
    assert b"# On the branch" in hub.repositories["user/name@new"]["README.md"]
    model.push_to_hub("user/name", revision="other", tags=["emoji"])  # begins as main is
    assert b"# On main" in hub.repositories["user/name@other"]["README.md"]
    assert hub.repositories["user/name"] == {"README.md": b"# On main"}


def test_a_card_speaks_of_code_where_there_is_some(hub: FakeHub, tmp_path: Path) -> None:
    model, processor = make_pair()
    (tmp_path / "train.py").write_text("print(1)")
    model.save_pretrained(tmp_path, card={"license": "mit"})
    assert "custom_code" not in data_of(read_card(tmp_path)).tags
    model.push_to_hub("user/name", with_code=True)
    processor.push_to_hub("user/name", card={"license": "mit"})
    assert "custom_code" in data_of(card_of(hub, "user/name")).tags
    assert "trust_remote_code=True" in example(card_of(hub, "user/name"))


def test_edited_cards_are_kept_once_the_mark_is_gone(hub: FakeHub) -> None:
    model, _ = make_pair()
    model.push_to_hub("user/name")
    edited = hub.repositories["user/name"]["README.md"].decode().replace(CARD_MARK, "Mine.")
    hub.repositories["user/name"]["README.md"] = edited.encode()
    model.push_to_hub("user/name", card={"license": "mit"})
    assert hub.repositories["user/name"]["README.md"].decode() == edited


def test_the_card_loads_the_repository_by_its_name(hub: FakeHub) -> None:
    for part in (*make_pair(), make_pipeline()):
        part.push_to_hub("user/name")
        assert 'from_pretrained("user/name")' in example(card_of(hub, "user/name"))
        hub.repositories.clear()


@pytest.mark.parametrize("with_code", [False, True])
def test_the_example_of_a_pushed_card_runs_in_a_new_process(with_code: bool, hub: FakeHub, tmp_path: Path) -> None:
    """As it stands; where the repository has its code, without the package."""
    make_pipeline().push_to_hub("user/name", with_code=with_code)
    code = example(card_of(hub, "user/name"))
    hub.write("user/name", tmp_path)
    hide = "import sys\nfrom remote_code import PackageIsAbsent\nsys.meta_path.insert(0, PackageIsAbsent())\n"
    paths = ROOT / "tests" if with_code else ROOT
    done = subprocess.run(
        [sys.executable, "-c", (hide if with_code else "") + code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(paths), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a_red_heart.png") as drawn:
        assert drawn.size == (16, 16)


@pytest.mark.parametrize("with_code", [False, True])
@pytest.mark.parametrize("kind", ["model", "image_processor"])
def test_the_other_examples_run(
    kind: str, with_code: bool, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_pair()
    for part in (model, processor) if kind == "model" else (processor.image_processor,):
        part.push_to_hub("user/name", with_code=with_code)
    code = example(card_of(hub, "user/name"))
    assert code.strip() == usage("user/name", kind, with_code)
    hub.write("user/name", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "a_red_heart.png").exists() == (kind == "model")


def test_the_example_of_adapters_runs(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    make_pipeline().push_to_hub("user/base")
    model, _ = make_pair()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.push_to_hub("user/adapter", card={"base_model": "user/base"})
    code = example(card_of(hub, "user/adapter"))
    for name in ("user/base", "user/adapter"):
        hub.write(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "a_red_heart.png").exists()
