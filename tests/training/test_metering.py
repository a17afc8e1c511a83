from typing import Any

import pytest
import torch

from tests.tiny import make_batch, tiny_model
from transfusion.training.metering import LevelSums, SpeedMeter, flops_per_token, matmul_rate, peak_memory


class Alone:
    """What the meters read of a trainer: one process on the CPU."""

    class accelerator:
        num_processes = 1

        @staticmethod
        def reduce(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            return tensor

    class args:
        device = torch.device("cpu")
        bf16 = False

    def __init__(self, model: Any = None) -> None:
        self.model = model


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_losses_by_level_are_those_of_images_at_these_levels(objective: str) -> None:
    model = tiny_model(objective=objective)
    batch: dict[str, Any] = make_batch([[5, (2, 2), 6, (1, 3)], [(2, 1), 7], [8, (1, 2)]])
    batch |= {"labels": batch["input_ids"], "noise": torch.randn_like(batch["latent_patches"])}
    timesteps = torch.tensor([100, 120, 600, 999])  # levels 0, 0, 2, 3
    batch["timesteps"] = timesteps if objective == "ddpm" else timesteps.double()
    batch["image_loss_mask"] = torch.tensor([True, False, True, True])
    sums = LevelSums()
    with torch.no_grad():
        sums.add(model.config, batch, model(**batch).image_prediction)
        expected = {}
        for name, image in (("0_to_0.25", 0), ("0.5_to_0.75", 2), ("0.75_to_1", 3)):
            only = torch.zeros(4, dtype=torch.bool)
            only[image] = True
            # In the same rows, so the other images stay noised: losses are taken from one prediction.
            full = model(**batch)
            index = torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [3] * 2)
            target = model.noise_process.target(batch["latent_patches"], batch["noise"], batch["timesteps"][index])
            error = (full.image_prediction - target).square()[only[index]].mean()
            expected[f"image_loss_at_{name}"] = float(error)
    found = sums.pop(Alone())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5)
    assert sums.pop(Alone()) == {}


def test_means_by_level_make_up_the_image_loss() -> None:
    model = tiny_model(objective="flow")
    batch: dict[str, Any] = make_batch([[5, (2, 2), 6, (1, 3)], [8, (1, 2)]])
    batch |= {"labels": batch["input_ids"], "noise": torch.randn_like(batch["latent_patches"])}
    batch["timesteps"] = torch.tensor([10.0, 700.0, 710.0], dtype=torch.float64)
    sums = LevelSums()
    with torch.no_grad():
        out = model(**batch)
        sums.add(model.config, batch, out.image_prediction)
    levels = sums.pop(Alone())
    mean = (4 * levels["image_loss_at_0_to_0.25"] + 5 * levels["image_loss_at_0.5_to_0.75"]) / 9
    assert mean == pytest.approx(float(out.image_loss), rel=1e-5)


def test_batches_without_images_or_noise_add_nothing() -> None:
    sums, model = LevelSums(), tiny_model()
    sums.add(model.config, make_batch([[5, 6]]), None)
    assert sums.entries == []


def test_tokens_that_are_no_padding_are_counted() -> None:
    meter, model = SpeedMeter(), tiny_model()
    batch: dict[str, Any] = make_batch([[5, 6, 7], [8]])
    meter.add(batch)  # the first step is not counted
    assert "tokens_per_second" not in meter.pop(Alone(model))
    meter.add(batch)
    meter.add({"input_ids": batch["input_ids"], "document_ids": torch.tensor([[0, 0, 1], [0, -1, -1]])})
    meter.add({"input_ids": batch["input_ids"]})
    assert sum(map(int, meter.tokens)) == 4 + 4 + 6
    found = meter.pop(Alone(model))
    assert meter.rate is not None
    assert found["tokens_per_second"] > 0 and 0 < found["mfu"] and meter.tokens == []
    assert meter.rate is not None
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * flops_per_token(model) / meter.rate, rel=1e-6)
    assert flops_per_token(model) == 6 * model.num_parameters()


def test_memory_is_that_of_this_process() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(60_000_000)  # 0.24 GB
    assert 0.1 < before < peak_memory(torch.device("cpu")) <= before + 0.5
    del held


def test_meters_draw_nothing_of_the_training() -> None:
    """Or a resumed training, which measures this machine again, would not end as one that never stopped."""
    before = torch.get_rng_state()
    matmul_rate(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
