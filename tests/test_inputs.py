import math

import pytest
import torch
from torch import Tensor

from tests.tiny import document, make_batch, tiny_config, tiny_model
from transfusion.inputs import check_inputs, images_without_prior_text, learned_labels


BOI, EOI, PATCH = 97, 98, 99
SIZED = {"size_token_grids": [(2, 3), (1, 2)], "size_token_ids": [95, 96]}


def slow_targets(row: list[int], labels: list[int], begins: tuple[int, ...] = (BOI,)) -> list[int]:
    """The paper's rule, one position at a time: nothing is learned where the input is BOI or a patch."""
    targets = []
    for position in range(len(row) - 1):
        learned = row[position] not in (*begins, PATCH) and labels[position + 1] != PATCH
        targets.append(labels[position + 1] if learned else -100)
    return targets


def test_learned_labels_equal_the_rule_position_by_position(batch: dict[str, Tensor]) -> None:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    targets = learned_labels(batch["input_ids"], labels, tiny_config())
    for row, row_labels, row_targets in zip(batch["input_ids"], labels, targets, strict=True):
        assert row_targets.tolist() == slow_targets(row.tolist(), row_labels.tolist())


def test_learned_labels_as_the_docstring_draws_them() -> None:
    a, red, heart, eos = 5, 6, 7, 2
    ids = torch.tensor([[a, red, BOI, PATCH, PATCH, EOI, heart, eos]])
    targets = learned_labels(ids, ids, tiny_config())
    assert targets.tolist() == [[red, BOI, -100, -100, -100, heart, eos]]


@pytest.mark.parametrize("row", [[5, BOI, 7, 8], [5, PATCH, 8], [PATCH, PATCH, EOI, 5], [BOI, BOI, EOI, EOI]])
def test_learned_labels_of_odd_rows(row: list[int]) -> None:
    ids = torch.tensor([row])
    assert learned_labels(ids, ids, tiny_config())[0].tolist() == slow_targets(row, row)


def test_every_begin_of_image_is_learned_and_nothing_after_it() -> None:
    ids = torch.tensor([[95, PATCH, EOI, 5, 96, PATCH, PATCH, EOI, 6, BOI, PATCH, EOI, 95, 7, 96, 95]])
    targets = learned_labels(ids, ids, tiny_config(**SIZED))[0].tolist()
    assert targets == slow_targets(ids[0].tolist(), ids[0].tolist(), (95, 96, BOI))
    assert [targets[3], targets[8], targets[11], targets[12], targets[14]] == [96, BOI, 95, -100, -100]
    plain = learned_labels(ids, ids, tiny_config())[0].tolist()  # without size tokens these ids are words
    assert plain == slow_targets(ids[0].tolist(), ids[0].tolist()) != targets


def test_embeddings_alone_leave_it_to_the_labels() -> None:
    labels = torch.tensor([[5, BOI, PATCH, -100, 8]])
    assert learned_labels(None, labels, tiny_config()).tolist() == [[BOI, PATCH, -100, 8]]


def slow_without_text(row: list[int]) -> list[bool]:
    found, seen_text, previous = [], False, None
    for token in row:
        if token == PATCH and previous != PATCH:
            found.append(not seen_text)
        seen_text |= token not in (BOI, EOI, PATCH, 0, 1)
        previous = token
    return found


@pytest.mark.parametrize(
    "row",
    [[5, (2, 2)], [(2, 2), 5], [1, (1, 1), (2, 2), 5, (1, 2)], [1, 5, (1, 1), (1, 2)], [5, 6]],
)
def test_images_without_prior_text(row: list) -> None:
    ids = document(*row)
    padded = torch.tensor([ids + [0, 0], [0, 0] + ids])
    mask = torch.tensor([[1] * len(ids) + [0, 0], [0, 0] + [1] * len(ids)])
    found = images_without_prior_text(padded, mask, tiny_config())
    assert found.tolist() == slow_without_text(ids) * 2


@pytest.mark.parametrize("row", [[95, PATCH, EOI, 5, 96, PATCH, EOI], [1, 95, PATCH, EOI, 96, PATCH, EOI, 5]])
def test_size_tokens_are_no_text(row: list[int]) -> None:
    ids = torch.tensor([row])
    as_plain = [BOI if token in (95, 96) else token for token in row]
    assert images_without_prior_text(ids, None, tiny_config(**SIZED)).tolist() == slow_without_text(as_plain)
    assert images_without_prior_text(ids, None, tiny_config()).tolist() == [False, False]


def refuse(batch: dict, *words: str) -> None:
    """Both the check and the model refuse, with the same words."""
    for call in (lambda: check_inputs(tiny_config(), **arguments(batch)), lambda: tiny_model()(**batch)):
        with pytest.raises(ValueError) as error:
            call()
        for word in words:
            assert word in str(error.value)


def arguments(batch: dict) -> dict:
    names = ("input_ids", "latent_patches", "image_grids", "timesteps", "noise", "image_loss_mask")
    return {name: batch.get(name) for name in names}


def test_refuses_more_images_than_placeholders(batch: dict[str, Tensor]) -> None:
    batch["image_grids"] = torch.cat([batch["image_grids"], torch.tensor([[1, 2]])])
    batch["latent_patches"] = torch.cat([batch["latent_patches"], torch.zeros(2, 12)])
    refuse(batch, "3 runs of image placeholders", "4 images")


def test_refuses_placeholders_without_images(batch: dict[str, Tensor]) -> None:
    refuse({"input_ids": batch["input_ids"]}, "13 image placeholders", "no images")


def test_refuses_adjacent_images_without_a_token_between() -> None:
    ids = torch.tensor([[5, BOI, PATCH, PATCH, EOI]])
    refuse(
        {"input_ids": ids, "latent_patches": torch.zeros(2, 12), "image_grids": torch.tensor([[1, 1], [1, 1]])},
        "1 runs",
        "2 images",
        "between two images",
    )


def test_refuses_wrong_channels() -> None:
    batch = make_batch([[5, (1, 2)]], patch_dim=16)
    refuse(batch, "(2, 16)", "latent_channels=3", "patch_size=2")


def test_patches_of_images_lie_flat_and_grids_are_whole_numbers(batch: dict[str, Tensor]) -> None:
    refuse({**batch, "latent_patches": torch.zeros(2, 6, 12)}, "(2, 6, 12)", "concatenate", "TransfusionDataCollator")
    refuse({**batch, "image_grids": batch["image_grids"].double()}, "image_grids has dtype torch.float64")


@pytest.mark.parametrize("name", ["pixel_values", "pixel_attention_mask", "image_sizes", "images"])
def test_pictures_under_the_names_of_other_models_are_refused(batch: dict[str, Tensor], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*latent_patches and image_grids.*processor"):
        tiny_model()(torch.tensor([[5]]), **{name: torch.zeros(1, 3, 4, 4)})
    for harmless in ({name: None}, {"image_id": 7}):
        assert tiny_model()(torch.tensor([[5]]), **harmless).logits is not None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["latent_patches", "noise"])
def test_refuses_values_that_are_not_finite(batch: dict[str, Tensor], name: str, value: float) -> None:
    batch["noise"] = torch.zeros_like(batch["latent_patches"])
    batch["timesteps"] = torch.tensor([3, 4, 5])
    batch[name] = batch[name].clone()
    batch[name][3, 1] = value
    refuse(batch, name, "NaN or infinity")


def test_refuses_grids_that_do_not_fit(batch: dict[str, Tensor]) -> None:
    refuse({**batch, "image_grids": torch.tensor([[2, 3], [2, 2], [1, 2]])}, "12 patches", "latent_patches 13")
    refuse({**batch, "image_grids": torch.tensor([2, 3])}, "image_grids has shape (2,)")
    refuse({**batch, "image_grids": None}, "image_grids has shape None")
    empty = {"latent_patches": torch.zeros(0, 12), "image_grids": torch.tensor([[0, 3]])}
    refuse({"input_ids": torch.tensor([[5]]), **empty}, "every image needs a row and a column")
    negative = torch.tensor([[-2, -3], [2, 2], [1, 3]])
    refuse({**batch, "image_grids": negative}, "every image needs a row and a column")
    huge = {"latent_patches": torch.zeros(127, 12), "image_grids": torch.tensor([[127, 1]])}
    refuse({"input_ids": torch.tensor([document(5, (127, 1))]), **huge}, "127 patches", "129", "128")


def test_refuses_an_empty_batch_and_orphans(batch: dict[str, Tensor]) -> None:
    refuse({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "the batch is empty")
    refuse({"input_ids": torch.tensor([[5]]), "noise": torch.zeros(1, 12)}, "noise came without latent_patches")
    refuse({**batch, "timesteps": torch.tensor([1, 2])}, "timesteps has shape (2,)", "3 images")
    refuse({**batch, "image_loss_mask": torch.tensor([True])}, "image_loss_mask has shape (1,)", "3 images")
    refuse({**batch, "noise": torch.zeros(3, 12)}, "noise has shape (3, 12)")
    refuse({**batch, "image_loss_mask": torch.tensor([1, 0, 1])}, "image_loss_mask has dtype torch.int64", "bool")


def test_refuses_timesteps_outside_the_schedule(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="1000"):
        tiny_model(objective="ddpm")(**batch, timesteps=torch.tensor([0, 5, 1000]))
    with pytest.raises(ValueError, match="integer"):
        tiny_model(objective="ddpm")(**batch, timesteps=torch.tensor([0.0, 5.0, 9.0]))
    with pytest.raises(ValueError, match="1000"):
        tiny_model(objective="flow")(**batch, timesteps=torch.tensor([0.0, 5.0, 1000.5]))
