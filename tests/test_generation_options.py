from typing import Any

import pytest
import torch

from tests.test_pipeline import make_pipeline
from tests.tiny import tiny_model
from transfusion.generation_options import NOT_WHILE_DRAWING, check_count, check_guidance, refuse_options


def test_guidance_that_can_be() -> None:
    assert check_guidance(3, [0.25, 1]) == (3.0, (0.25, 1.0))
    assert check_guidance(-1.5, (0, 0)) == (-1.5, (0.0, 0.0))


@pytest.mark.parametrize(
    ("scale", "interval", "message"),
    [
        (float("inf"), (0, 1), "guidance_scale=inf; give a finite number"),
        ("3", (0, 1), "guidance_scale='3'"),
        (True, (0, 1), "guidance_scale=True"),
        (3.0, 0.5, "guidance_interval=0.5; give two shares"),
        (3.0, (0.1, 0.2, 0.3), "give two shares"),
        (3.0, ("low", 1), "give two shares"),
        (3.0, (0.8, 0.2), "0 <= low <= high <= 1"),
        (3.0, (0.0, 1000), "0 is clean, 1 is noise"),
        (3.0, (float("nan"), 1.0), "0 <= low"),
    ],
)
def test_guidance_that_cannot_be_is_refused(scale: Any, interval: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_guidance(scale, interval)


def test_counts() -> None:
    check_count("steps", 1, 1)
    for value in (0, 1.0, True, "2"):
        with pytest.raises(ValueError, match="give an integer of 1 or more"):
            check_count("steps", value, 1)


def test_options_that_are_off_pass() -> None:
    refuse_options("image", dict.fromkeys(NOT_WHILE_DRAWING), NOT_WHILE_DRAWING)
    with pytest.raises(ValueError, match="num_beams=4 cannot draw"):
        refuse_options("image", {"num_beams": 4}, NOT_WHILE_DRAWING)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_a_guidance_interval_reaches_the_drawing(mode: str) -> None:
    model, rows = tiny_model(objective="flow"), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])) if "timesteps" in kwargs else None,
        with_kwargs=True,
    )
    ids, options = torch.tensor([[5, 97]]), {"num_inference_steps": 4, "max_new_tokens": 1, "do_sample": False}
    drawing = {"generation_mode": mode, "guidance_interval": (0.5, 0.8)}
    model.generate(ids, **drawing, **(options if mode == "interleaved" else {"num_inference_steps": 4}))
    assert rows == [1, 2, 2, 1]
    model.generation_config.guidance_interval = (0.0, 0.6)
    rows.clear()
    model.generate(ids, generation_mode="image", num_inference_steps=4)
    assert rows == [1, 1, 2, 2]
    handle.remove()
    with pytest.raises(ValueError, match="guidance_interval cannot work in text mode"):
        model.generate(ids, guidance_interval=(0.0, 0.5))


def test_the_pipeline_takes_a_guidance_interval() -> None:
    pipe = make_pipeline()
    seeded = {"num_inference_steps": 3, "output_type": "latent"}
    always, never, first = (
        pipe(
            "a heart",
            guidance_scale=scale,
            guidance_interval=interval,
            generator=torch.Generator().manual_seed(0),
            **seeded,
        ).images
        for scale, interval in ((5.0, None), (1.0, None), (5.0, (1.0, 1.0)))
    )
    assert not torch.equal(always, never) and not torch.equal(first, never) and not torch.equal(first, always)


@pytest.mark.parametrize(
    "options", [{"skip_logits": True}, {"patch_repeats": 2}, {"timesteps": torch.tensor([5.0])}], ids=str
)
@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_what_only_forward_reads_is_refused(options: dict[str, Any], mode: str) -> None:
    with pytest.raises(ValueError, match="can be given to the model's forward alone"):
        tiny_model().generate(torch.tensor([[5, 6]]), generation_mode=mode, **options)
