"""What the models return."""

import pytest
import torch
from torch import Tensor

from tests.tiny import make_batch, tiny_model
from transfusion.outputs import TransfusionModelOutput


@pytest.mark.parametrize("num_residual_streams", [1, 3])
def test_hidden_states_have_one_shape(num_residual_streams: int, batch: dict[str, Tensor]) -> None:
    """What goes in, what comes out of each layer, and at last what the heads read."""
    model = tiny_model(num_residual_streams=num_residual_streams)
    outputs = model.model(**batch, output_hidden_states=True)
    shape = (*batch["input_ids"].shape, 32)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [shape] * 3
    assert outputs.hidden_states[-1] is outputs.last_hidden_state
    first = outputs.hidden_states[0]
    first.retain_grad()
    outputs.last_hidden_state.sum().backward()
    assert first.grad is not None and first.grad.any()
    text = batch["input_ids"] != 99
    torch.testing.assert_close(first[text], model.model.embed_tokens(batch["input_ids"])[text])


def test_recorded_streams_become_their_mean() -> None:
    streams = torch.randn(2, 5, 3, 8)
    output = TransfusionModelOutput(last_hidden_state=torch.zeros(2, 5, 8))
    output["hidden_states"] = (streams, None, streams[:, :, 0])
    mean, missing, plain = output.hidden_states
    assert torch.equal(mean, streams.mean(2)) and missing is None and torch.equal(plain, streams[:, :, 0])


def test_layers_of_choice(batch: dict[str, Tensor]) -> None:
    """transformers can record some layers alone, and leaves None for the others."""
    model = tiny_model(num_residual_streams=2)
    every = model(**batch, output_hidden_states=True).hidden_states
    some = model(**batch, output_hidden_states=[1]).hidden_states
    assert some[0] is None and torch.equal(some[1], every[1])


def test_text_alone_has_no_prediction() -> None:
    batch = make_batch([[5, 6, 7]])
    output = tiny_model()(**batch, labels=batch["input_ids"])
    assert output.image_prediction is None and output.image_loss == 0
