from pathlib import Path

import pytest
import torch

from tests.tiny import make_batch, tiny_model
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration
from transfusion.training.averaging import AveragedWeights, warmed_decay


def changed(model: TransfusionForMultimodalGeneration, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_average_equals_its_formula(decay: float) -> None:
    model = tiny_model(tie_word_embeddings=True)
    averaged = AveragedWeights(model, decay)
    expected: dict[str, torch.Tensor] = {}
    for step in range(30):
        changed(model, step)
        averaged.update(model)
        for name, parameter in model.named_parameters():
            value = parameter.detach().clone()
            d = min(decay, (1 + step) / (10 + step))
            expected[name] = value if step == 0 else d * expected[name] + (1 - d) * value
    assert set(averaged.weights) == set(expected)
    for name, weight in averaged.weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-12)


def test_decay_warms_up() -> None:
    assert warmed_decay(0.999, 0) == 0.1 and warmed_decay(0.999, 90) == 0.91 and warmed_decay(0.999, 10**6) == 0.999


def test_swapping_is_undone_even_after_an_error() -> None:
    model, batch = tiny_model(), make_batch([[5, 6, 2]])
    averaged = AveragedWeights(model, 0.9)
    averaged.update(model)
    average_logits = model(**batch).logits
    changed(model, 1)
    logits = model(**batch).logits
    with pytest.raises(RuntimeError, match="inside"), averaged.swapped_into(model):
        assert torch.equal(model(**batch).logits, average_logits)
        raise RuntimeError("inside")
    assert torch.equal(model(**batch).logits, logits)
    with averaged.swapped_into(model):
        assert torch.equal(model(**batch).logits, average_logits)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    averaged = AveragedWeights(model, 0.9)
    for step in range(3):
        changed(model, step)
        averaged.update(model)
    averaged.snapshot(model)(tmp_path)
    loaded = AveragedWeights(tiny_model(), 0.9)
    loaded.load(tmp_path, num_averaged=3)
    from_folder = type(model).from_pretrained(tmp_path / "ema", dtype="auto")
    assert from_folder.config.use_cache
    for name, weight in from_folder.named_parameters():
        assert torch.equal(weight, averaged.weights[name])
    changed(model, 9)
    for one in (averaged, loaded):
        one.update(model)
    for name, weight in averaged.weights.items():
        assert torch.equal(weight, loaded.weights[name])
    assert {path.suffix for path in (tmp_path / "ema").iterdir()} == {".json", ".safetensors"}


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ema_decay is 1"):
        AveragedWeights(tiny_model(), 1.0)
    with pytest.raises(ValueError, match="bfloat16 weights"):
        AveragedWeights(tiny_model().to(torch.bfloat16), 0.9)
    with pytest.raises(ValueError, match="has no folder ema"):
        AveragedWeights(tiny_model(), 0.9).load(tmp_path, 1)
