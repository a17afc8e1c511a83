"""What `scripts/compare_peer.py` does by itself: the other package is not installed here."""

import itertools

import torch

from scripts.compare_peer import batches, config_of_size, num_parameters, peer_items, schedule, table
from tests.tiny_processor import tiny_processor
from transfusion import TransfusionForMultimodalGeneration
from transfusion.data.pictures import CaptionedPicture
from transfusion.experiments.runs import shapes_processor
from transfusion.training.rows import CaptionedPictureRows


def make_rows(seed: int = 0) -> CaptionedPictureRows:
    pictures = [CaptionedPicture(f"{i}.png", "heart", (f"heart {i}",), "", "", "", b"") for i in range(6)]
    latents = [torch.randn(3, 4, 6) for _ in pictures]
    return CaptionedPictureRows(pictures, latents, tiny_processor(), ["word: what it means"], 0.5, 0.5, seed)


def test_the_peer_gets_the_same_rows() -> None:
    rows = make_rows()
    orders = set()
    for row in [*rows]:
        items = peer_items(row, rows.processor)
        texts = [item for item in items if not isinstance(item, tuple)]
        assert rows.processor.decode(texts[0]) == rows.processor.decode(row["input_ids"], skip_special_tokens=True)
        orders.add(tuple(isinstance(item, tuple) for item in items))
        for kind, picture in (item for item in items if isinstance(item, tuple)):
            assert kind == 0 and picture.shape == (2, 3, 12)
            assert torch.equal(picture[1, 2], row["latent_patches"][5])
        starts_with_picture = int(row["input_ids"][0]) == rows.processor.boi_token_id
        assert isinstance(items[0], tuple) == starts_with_picture
    assert orders == {(False,), (True, False), (False, True)}


def test_batches_hold_every_row_once_an_epoch_in_an_order_of_the_seed() -> None:
    def ids(seed: int) -> list[str]:
        return [row["sample_id"] for batch in itertools.islice(batches(make_rows(seed), 3), 6) for row in batch]

    first = ids(0)
    assert sorted(first[:9]) == sorted(row["sample_id"] for row in [*make_rows()])
    assert first == ids(0) and first != ids(1) and first[:9] != first[9:]


def test_the_config_has_as_many_parameters_as_asked() -> None:
    processor = shapes_processor(4)
    for parameters, layers in ((2_000_000, 4), (4_000_000, 6)):
        config = config_of_size(processor, parameters, layers)
        with torch.device("meta"):
            model = TransfusionForMultimodalGeneration(config)
        assert abs(num_parameters(model) / parameters - 1) < 0.01
        assert config.num_hidden_layers == layers
        assert 2 < (config.intermediate_size or 0) / config.hidden_size < 4.5


def test_the_schedule_rises_and_falls() -> None:
    values = [schedule(progress / 1000) for progress in range(1001)]
    peak = values.index(max(values))
    assert peak == 30 and max(values) == 1 and 0 < values[0] < 0.05 and values[-1] < 1e-9
    assert values == sorted(values[: peak + 1]) + sorted(values[peak + 1 :], reverse=True)


def test_the_table_has_means_over_seeds_and_floors() -> None:
    runs = [
        {"system": name, "budget": "steps", "parameters": 1000, "steps": 10, "seconds": 2.0, "scores": scores}
        for name, values in (("ours", (0.5, 0.7)), ("peer", (0.25, 0.25)))
        for scores in ({"held_out: drawn all, guidance 3": value, "perplexity": 20.0} for value in values)
    ]
    lines = table(runs, {"held_out: drawn all": 0.01}).splitlines()
    assert lines[0] == "| | ours, same steps | peer, same steps | floor |"
    assert lines[2] == "| parameters | 1,000 | 1,000 | |"
    assert lines[5] == "| held out: drawn all, guidance 3 | 60 ± 10 % | 25 ± 0 % | 1 % |"
    assert lines[6] == "| perplexity | 20.0 ± 0.0 | 20.0 ± 0.0 |  |"
