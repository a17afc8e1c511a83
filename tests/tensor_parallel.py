"""A model on two processes against the same on one, started by torchrun."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig


sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny import make_batch, tiny_config
from transfusion import TransfusionForMultimodalGeneration


def compare_generations(one: Any, two: Any) -> None:
    """Text after text and after an image, and images, must not depend on the sharding."""
    prompt = make_batch([[5, 6, (2, 3), 8], [9, 10, 11]])
    written = [model.generate(**prompt, max_new_tokens=8, do_sample=False) for model in (one, two)]
    assert torch.equal(*written)
    caption = make_batch([[5, 6, 8], [9, 10, 11]])
    drawn = []
    for model in (one, two):
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        options = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": generators}
        drawn.append(model.generate_images(**caption, image_grids=(2, 3), **options).latent_patches)
    torch.testing.assert_close(*drawn)


def main(folder: str) -> None:
    """Compare a training step of a model with everything that the plan may shard."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        options = {"qk_norm": True, "modality_experts": "all", "tie_word_embeddings": True, "num_residual_streams": 2}
        config = tiny_config(objective="flow", **options)
        TransfusionForMultimodalGeneration(config).double().save_pretrained(folder)
    dist.barrier()
    batch = make_batch([[5, 6, (2, 3), 8], [(2, 2), 9, 10, (1, 3)]])
    batch |= {"labels": batch["input_ids"], "timesteps": torch.tensor([20.0, 500.0, 980.0])}
    outputs, models = [], []
    for options in ({}, {"distributed_config": DistributedConfig(tp_size=2)}):
        model = TransfusionForMultimodalGeneration.from_pretrained(folder, dtype="auto", **options).train()
        outputs.append(model(**batch, noise=torch.ones(13, 12, dtype=torch.float64)))
        outputs[-1].loss.backward()
        models.append(model)
    one, two = outputs
    torch.testing.assert_close(two.loss, one.loss)
    torch.testing.assert_close(two.image_prediction, one.image_prediction)
    num_sharded = 0
    for whole, shard in zip(*(model.parameters() for model in models), strict=True):
        assert whole.grad is not None and shard.grad is not None
        num_sharded += isinstance(shard, DTensor)
        gradient = shard.grad.full_tensor() if isinstance(shard.grad, DTensor) else shard.grad
        if gradient.shape == whole.grad.shape:
            torch.testing.assert_close(gradient, whole.grad)
    assert num_sharded > 0
    compare_generations(*(model.eval() for model in models))
    two_folder = Path(folder, "two")
    models[1].save_pretrained(two_folder)
    loaded = TransfusionForMultimodalGeneration.from_pretrained(two_folder, dtype="auto")
    for name, weight in models[0].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
