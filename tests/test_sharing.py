"""Saving with code, and what a process without the package does with it; uploads to a Hub in memory."""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files

from tests.fake_hub import FakeHub, make_fake_hub
from tests.remote_code import draw, use
from tests.tiny_processor import tiny_processor, tiny_vae
from transfusion import TransfusionPipeline
from transfusion.configuration import TransfusionConfig
from transfusion.data import load_emoji
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration, TransfusionModel
from transfusion.processing import TransfusionProcessor
from transfusion.sharing import save_code
from transfusion.training.finetuning import FinetuneRecipe, finetune, load_start


ROOT = Path(__file__).parents[1]
AUTO_CLASSES = {
    "AutoConfig": "TransfusionConfig",
    "AutoModel": "TransfusionForMultimodalGeneration",
    "AutoModelForCausalLM": "TransfusionForMultimodalGeneration",
    "AutoModelForImageTextToText": "TransfusionForMultimodalGeneration",
    "AutoModelForMultimodalLM": "TransfusionForMultimodalGeneration",
    "AutoProcessor": "TransfusionProcessor",
    "AutoImageProcessor": "TransfusionImageProcessor",
}


def make_pair() -> tuple[TransfusionForMultimodalGeneration, TransfusionProcessor]:
    """A tiny model and its processor, with a VAE."""
    processor = tiny_processor(vae=tiny_vae(), size=16)
    config = TransfusionConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        latent_channels=4,
        patch_size=2,
        default_image_grid=(2, 2),
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        image_token_id=processor.image_token_id,
    )
    torch.manual_seed(0)
    return TransfusionForMultimodalGeneration(config).eval(), processor


def make_pipeline() -> TransfusionPipeline:
    return TransfusionPipeline(*make_pair())


def closure(*rooms: str) -> set[str]:
    """The files of these rooms, and those that transformers finds that they import beside them."""
    sources = [str(ROOT / "transfusion" / f"{room}.py") for room in rooms]
    return {Path(path).name for source in sources for path in [source, *get_relative_import_files(source)]}


def code_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def texts_in(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_bytes().decode("latin-1") for path in files_in(folder)}


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def assert_same(used: dict[str, Any], expected: dict[str, Any]) -> None:
    """Texts are equal; drawings differ by rounding, as tensors that are loaded lie otherwise in memory."""
    used, expected = json.loads(json.dumps(used)), json.loads(json.dumps(expected))
    torch.testing.assert_close(torch.tensor(used.pop("drawn")), torch.tensor(expected.pop("drawn")))
    assert used == expected


def assert_draws_the_same(drawn: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(drawn), torch.tensor(expected))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with code."""
    folder = tmp_path_factory.mktemp("with_code")
    make_pipeline().save_pretrained(folder, with_code=True)
    return folder


def download_to(cache: Path, repository: Path) -> None:
    """Make `cache` what it is when huggingface_hub has downloaded the repository as `user/name`."""
    download = cache / "models--user--name"
    shutil.copytree(repository, download / "snapshots" / ("0" * 40))
    (download / "refs").mkdir()
    (download / "refs" / "main").write_text("0" * 40)


@pytest.fixture(scope="module", params=["folder", "hub"])
def remote(
    request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a process without the package made of it, as a folder and as a download of the Hub."""
    folder = tmp_path_factory.mktemp("remote")
    name = str(repository)
    if request.param == "hub":
        name = "user/name"
        download_to(folder / "hub", repository)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    caches = {"HF_HUB_CACHE": str(folder / "hub"), "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "remote_code.py"), name, str(folder)],
        cwd=folder,
        env={**environment, **caches, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {**read_json(folder / "results.json"), "folder": folder}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return make_fake_hub(tmp_path, monkeypatch)


def test_without_trust_each_auto_class_refuses(remote: dict[str, Any]) -> None:
    assert set(remote["refusals"]) == set(AUTO_CLASSES)
    assert all("trust_remote_code=True" in message for message in remote["refusals"].values())


def test_auto_classes_load_code_without_the_package(remote: dict[str, Any]) -> None:
    assert remote["classes"] == AUTO_CLASSES
    assert remote["modules"] == []  # nothing of the package was imported after all


def test_code_does_what_the_package_does(remote: dict[str, Any]) -> None:
    model, processor = make_pair()
    assert_same(remote["first"], use(model, processor))
    assert_draws_the_same(remote["pipeline"], draw(make_pipeline()))


def test_code_saves_itself_again(remote: dict[str, Any], repository: Path) -> None:
    assert_same(remote["again"], remote["first"])
    again = remote["folder"] / "again"
    assert code_in(again) == code_in(repository)
    for name in ("config.json", "model_index.json", "processor_config.json"):
        assert read_json(again / name) == read_json(repository / name)
    assert "auto_map" not in read_json(again / "tokenizer_config.json")


def test_all_code_is_copied_and_no_more(repository: Path, tmp_path: Path) -> None:
    assert code_in(repository) == closure("modeling_transfusion", "processing", "pipeline")
    model, processor = make_pair()
    model.save_pretrained(tmp_path / "model", with_code=True)
    assert code_in(tmp_path / "model") == closure("modeling_transfusion")
    processor.image_processor.save_pretrained(tmp_path / "image", with_code=True)
    assert code_in(tmp_path / "image") == closure("image_processing")
    auto_map = read_json(tmp_path / "image" / "preprocessor_config.json")["auto_map"]
    assert auto_map == {"AutoImageProcessor": "image_processing.TransfusionImageProcessor"}


def test_diffusers_copies_all_that_the_pipeline_needs() -> None:
    """It copies what the file imports, and not what those files import."""
    text = (ROOT / "transfusion" / "pipeline.py").read_text()
    needed = closure("pipeline") - {"pipeline.py"}
    assert all(f"from .{name.removesuffix('.py')} import" in text for name in needed), needed


def test_the_transformer_alone_is_no_chat_model(tmp_path: Path) -> None:
    model, _ = make_pair()
    TransfusionModel(model.config).save_pretrained(tmp_path, with_code=True)
    assert read_json(tmp_path / "config.json")["auto_map"] == {
        "AutoConfig": "configuration.TransfusionConfig",
        "AutoModel": "modeling_transfusion.TransfusionModel",
    }


def test_by_default_no_code_and_no_auto_map(repository: Path, tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path / "new")
    # The package's classes win over those of a repository.
    model, processor = AutoModel.from_pretrained(repository), AutoProcessor.from_pretrained(repository)
    assert type(model) is TransfusionForMultimodalGeneration
    assert type(AutoConfig.from_pretrained(repository)) is TransfusionConfig
    TransfusionPipeline(model, processor).save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "new", tmp_path / "again"):
        assert not code_in(folder)
        assert not [name for name, text in texts_in(folder).items() if "auto_map" in text]


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_the_package_loads_a_pipeline_with_code_without_trust(place: str, repository: Path, tmp_path: Path) -> None:
    if place == "hub":
        download_to(tmp_path, repository)
        pipe = TransfusionPipeline.from_pretrained("user/name", cache_dir=tmp_path)
    else:
        pipe = TransfusionPipeline.from_pretrained(repository)
    assert type(pipe) is TransfusionPipeline
    assert type(pipe.model) is TransfusionForMultimodalGeneration
    assert_draws_the_same(draw(pipe), draw(make_pipeline()))


def test_save_pretrained_keeps_the_options_of_transformers(tmp_path: Path) -> None:
    model, _ = make_pair()
    model.save_pretrained(tmp_path / "other", is_main_process=False, with_code=True)
    assert not code_in(tmp_path / "other")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB", with_code=True)
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    model.save_pretrained(tmp_path / "variant", variant="bf16", save_original_format=False)
    assert (tmp_path / "variant" / "model.bf16.safetensors").exists()
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "zeros", state_dict=zeros)
    assert not any(value.any() for value in AutoModel.from_pretrained(tmp_path / "zeros").parameters())


def test_an_adapter_has_no_code_and_no_config(tmp_path: Path) -> None:
    from peft import LoraConfig

    model, _ = make_pair()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, with_code=True)
    assert not code_in(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_code_of_a_class_that_no_file_defines(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no file defines Mine; put it into a module"):
        save_code(tmp_path, ("config.json", (), {"AutoModel": type("Mine", (), {"__module__": "__main__"})}), True)


def test_a_distributed_checkpoint_is_not_uploaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distributed_checkpoint=True is for going on"):
        make_pair()[0].save_pretrained(tmp_path, push_to_hub=True, distributed_checkpoint=True)


def test_model_and_processor_share_a_repository(hub: FakeHub, tmp_path: Path) -> None:
    model, processor = make_pair()
    model.push_to_hub("user/name", with_code=True, commit_message="The model")
    processor.push_to_hub("user/name", with_code=True)
    names = set(hub.repositories["user/name"])
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= names
    assert {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"} <= names
    assert closure("modeling_transfusion", "processing") <= names
    assert hub.commits[0]["commit_message"] == "The model"
    folder = hub.write("user/name", tmp_path)
    loaded = use(AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder))
    assert_same(loaded, use(model, processor))


def test_a_pipeline_arrives_whole(hub: FakeHub, tmp_path: Path) -> None:
    pipe = make_pipeline()
    pipe.push_to_hub("user/name", with_code=True)
    pipe.save_pretrained(tmp_path / "local", with_code=True)
    expected = {path.relative_to(tmp_path / "local").as_posix() for path in files_in(tmp_path / "local")}
    assert set(hub.repositories["user/name"]) == expected | {"README.md"}
    assert {"vae/config.json", "scheduler/scheduler_config.json", "model_index.json", "pipeline.py"} <= expected
    assert_draws_the_same(draw(TransfusionPipeline.from_pretrained(hub.write("user/name", tmp_path))), draw(pipe))


@pytest.mark.parametrize("part", ["model", "processor", "pipeline"])
def test_save_pretrained_uploads_too(part: str, hub: FakeHub, tmp_path: Path) -> None:
    pipe = make_pipeline()
    shared = {"model": pipe.model, "processor": pipe.processor, "pipeline": pipe}[part]
    shared.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="user/other", private=True)
    names = {path.relative_to(tmp_path / "mine").as_posix() for path in files_in(tmp_path / "mine")}
    assert set(hub.repositories["user/other"]) == names
    assert "README.md" in names
    shared.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert "user/mine" in hub.repositories


def test_only_the_main_process_uploads(hub: FakeHub, tmp_path: Path) -> None:
    make_pair()[0].save_pretrained(tmp_path, is_main_process=False, push_to_hub=True, repo_id="user/name")
    assert not hub.repositories


def test_an_upload_to_a_branch(hub: FakeHub) -> None:
    make_pair()[0].push_to_hub("user/name", revision="new", commit_description="why", create_pr=False)
    assert "config.json" in hub.repositories["user/name@new"]
    assert not hub.repositories["user/name"]
    assert hub.commits[0]["revision"] == "new"
    assert hub.commits[0]["commit_description"] == "why"


def test_files_that_were_there_are_not_uploaded(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("diary")
    make_pair()[0].save_pretrained(tmp_path, push_to_hub=True, repo_id="user/name")
    assert "private.txt" not in hub.repositories["user/name"]


def test_options_that_a_pipeline_does_not_know(hub: FakeHub) -> None:
    with pytest.raises(ValueError, match="subfolder: no option of save_pretrained or push_to_hub"):
        make_pipeline().push_to_hub("user/name", subfolder="part")


def test_a_processor_refuses_options_that_it_does_not_know(tmp_path: Path) -> None:
    _, processor = make_pair()
    for part in (processor, processor.image_processor):
        with pytest.raises(ValueError, match="with_cod: no option of save_pretrained or push_to_hub"):
            part.save_pretrained(tmp_path, with_cod=True)


def test_options_may_be_given_as_diffusers_takes_them(hub: FakeHub) -> None:
    make_pipeline().push_to_hub("user/name", "The message", subfolder=None, variant=None, safe_serialization=True)
    assert hub.commits[0]["commit_message"] == "The message"
    make_pipeline().push_to_hub("user/name", commit_message=None)
    assert hub.commits[1]["commit_message"] == "Upload with transfusion"


def test_code_that_needs_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text(
        "from transfusion import TransfusionForMultimodalGeneration\n"
        "class Needy(TransfusionForMultimodalGeneration):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("needy").Needy(make_pair()[0].config)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="needy.py has `from transfusion`, and the code is to run without"):
        model.save_pretrained(tmp_path / "code", with_code=True)


@pytest.mark.parametrize("is_there", [True, False])
def test_an_adapter_forgets_where_its_model_was(is_there: bool, hub: FakeHub, tmp_path: Path) -> None:
    from peft import LoraConfig

    make_pair()[0].save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    if not is_there:
        shutil.rmtree(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.push_to_hub("user/adapter")
    adapter = json.loads(hub.repositories["user/adapter"]["adapter_config.json"])
    assert adapter["base_model_name_or_path"] is None
    model.load_adapter(str(hub.write("user/adapter", tmp_path)), "again")


def train_tiny(source: Path, folder: Path, lora_rank: int | None, hub: FakeHub) -> None:
    """Fine-tune `source` by the recipe, with TensorBoard, and upload it as `user/<name of the folder>`."""
    model, processor = load_start(source)
    recipe = FinetuneRecipe(batch_size=2, num_inference_steps=1, lora_rank=lora_rank, bf16=False)
    trainer = finetune(model, processor, load_emoji("train")[:2], folder, recipe, max_steps=1)
    assert [path for path in folder.rglob("*") if "tfevents" in path.name]
    trainer.args.hub_model_id = f"user/{folder.name}"
    trainer.push_to_hub()
    names = set(hub.repositories[trainer.args.hub_model_id])
    assert {"README.md", "training_args.json", "processor_config.json"} <= names
    assert not [name for name in names if "tfevents" in name or "samples" in name]


def test_no_file_tells_of_the_machine(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "Secret" * 5
    monkeypatch.setenv("HF_TOKEN", token)
    make_pipeline().save_pretrained(tmp_path / "source")
    places = {"token": token, "cache_dir": str(tmp_path / "cache")}
    model = AutoModel.from_pretrained(tmp_path / "source", **places)
    processor = AutoProcessor.from_pretrained(tmp_path / "source", **places)
    pipe = TransfusionPipeline.from_pretrained(tmp_path / "source", **places)
    for name, part in {"model": model, "processor": processor, "pipeline": pipe}.items():
        part.save_pretrained(tmp_path / "saved" / name, with_code=True)
        part.push_to_hub(f"user/{name}", token=token, card={"license": "mit"})
    processor.image_processor.save_pretrained(tmp_path / "saved" / "image")
    for name in hub.repositories:
        hub.write(name, tmp_path / "saved" / "pushed")
    for lora_rank in (None, 2):
        train_tiny(tmp_path / "source", tmp_path / "saved" / f"trained_{lora_rank}", lora_rank, hub)
    for name in hub.repositories:
        hub.write(name, tmp_path / "saved" / "pushed")
    # At home, adapters know where their model is, and TensorBoard the name of the machine.
    saved = {name: text for name, text in texts_in(tmp_path / "saved").items() if "tfevents" not in name}
    del saved["trained_2/adapter_config.json"]
    assert len(saved) > 80
    host = socket.gethostname()
    secrets = [token, str(tmp_path), tmp_path.name, str(Path.home()) + "/", *([host] if len(host) > 4 else [])]
    leaks = [(name, secret) for name, text in saved.items() for secret in secrets if secret in text]
    assert not leaks
