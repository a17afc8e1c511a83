import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers.distributed import DistributedConfig

from tests.tiny import tiny_model
from tests.training.test_trainer import arguments
from tests.training.tiny_rows import largest_difference
from tests.training.trajectories import launched, run, save_model
from transfusion.training.distributed import is_sharded, load_weights, model_writer, named_weights, whole_tensors
from transfusion.training.trainer import TransfusionTrainer


def test_refuses_what_is_missing_unknown_or_of_another_shape() -> None:
    weights = {"a": torch.zeros(2), "b": torch.zeros(3)}
    for saved, message in (
        ({"a": torch.ones(2)}, "lack b"),
        ({**weights, "c": torch.ones(1)}, "hold c"),
        ({**weights, "b": torch.ones(1)}, r"b has shape \(1,\) and the model's \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights(weights, saved)
    load_weights(weights, {"a": torch.ones(2), "b": torch.ones(3)})
    assert all(weight.eq(1).all() for weight in weights.values())


def test_a_whole_model_is_written_as_it_is_loaded(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    assert not is_sharded(model)
    weights = whole_tensors({name: weight for weight, name in named_weights(model).items()})
    assert "lm_head.weight" not in weights
    model_writer(model, model.config, weights)(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype="auto")
    assert largest_difference(loaded.state_dict(), model.state_dict()) == 0
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_what_sharding_cannot_do_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.distributed_config = DistributedConfig(fsdp_mixed_precision=True)
    with pytest.raises(ValueError, match="round timesteps to bfloat16"):
        TransfusionTrainer(model, arguments(tmp_path))
    options = ["--fsdp_version", "1", "--fsdp_sync_module_states", "false"]
    with launched("fsdp2.yaml", *options), pytest.raises(ValueError, match="fsdp_version is 1"):
        TransfusionTrainer(tiny_model(), arguments(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)


RECIPES = Path(__file__).parents[2] / "scripts" / "recipes" / "accelerate"
NAMES = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "hsdp": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
    "tensor_parallel": DistributedType.MULTI_GPU,
}


def test_accelerate_reads_the_shipped_configs() -> None:
    """As `accelerate launch` does: it refuses fields that it does not know, but within sections it lets them pass."""
    assert {path.stem for path in RECIPES.iterdir()} == set(NAMES)
    for name, kind in NAMES.items():
        config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
        assert config.distributed_type == kind and config.mixed_precision == "bf16"
        known = vars(launch_command_parser().parse_args(["script.py"]))
        for section in (config.fsdp_config, config.deepspeed_config, config.parallelism_config):
            assert set(section) <= set(known), name
    wrapped = load_config_from_file(str(RECIPES / "fsdp2.yaml")).fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    assert wrapped in {type(module).__name__ for module in tiny_model().modules()}
    sizes = load_config_from_file(str(RECIPES / "hsdp.yaml")).parallelism_config
    assert math.prod(sizes.values()) == load_config_from_file(str(RECIPES / "hsdp.yaml")).num_processes


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_gpus_follow_the_trajectory_of_one_processor(name: str, tmp_path: Path) -> None:
    num_gpus = 4 if name == "hsdp" else 2
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    save_model(tmp_path / "model", "streams")
    options = ["--num_processes", str(num_gpus), "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--parallelism_config_dp_shard_size", "2"] if name == "hsdp" else []
    script = [str(Path(__file__).with_name("on_gpus.py")), str(tmp_path), name]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES / f"{name}.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parents[2])}
    finished = subprocess.run(command + options + script, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    steps = json.loads((tmp_path / name / "steps.json").read_text())
    for one, other in zip(steps, run(tmp_path / "model", tmp_path / "single", ema_decay=None), strict=True):
        for quantity in ("text_loss", "image_loss"):
            assert one[quantity] == pytest.approx(other[quantity], rel=1e-3)
