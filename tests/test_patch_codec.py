import pytest
import torch

from tests.tiny import tiny_config
from transfusion.patch_codec import FREQUENCY_DIM, LinearPatchDecoder, LinearPatchEncoder
from transfusion.positions import sinusoids


@pytest.mark.parametrize("axial_positions", [False, True])
def test_the_encoder_adds_timestep_and_place_to_each_patch(axial_positions: bool) -> None:
    encoder = LinearPatchEncoder(tiny_config(axial_positions=axial_positions)).double()
    grids = torch.tensor([[2, 1], [1, 3]])
    patches, timesteps = torch.randn(5, 12, dtype=torch.float64), torch.tensor([3.0, 700.0], dtype=torch.float64)
    encoded = encoder(patches, timesteps, grids)
    places = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 0, 2)]  # image, row, column
    for patch, (image, row, column), vector in zip(patches, places, encoded, strict=True):
        features = sinusoids(timesteps[image : image + 1], FREQUENCY_DIM).double()[0]
        first = encoder.time_embed.linear_1.weight @ features + encoder.time_embed.linear_1.bias
        second = encoder.time_embed.linear_2
        expected = encoder.proj.weight @ patch + encoder.proj.bias
        expected = expected + second.weight @ (first * torch.sigmoid(first)) + second.bias
        if axial_positions:
            rows, columns = (axis(3) for axis in encoder.position_embed.axes)
            expected = expected + rows[row] + columns[column]
        torch.testing.assert_close(vector, expected)


def test_adding_after_the_projection_contains_the_papers_adding_before() -> None:
    """W (x + e) + b = (W x + b) + W e: a time embedding of W e gives the paper's form."""
    encoder = LinearPatchEncoder(tiny_config()).double()
    x, e = torch.randn(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(encoder.proj(x + e), encoder.proj(x) + encoder.proj.weight @ e)


def test_the_decoder_maps_hidden_vectors_to_patches() -> None:
    decoder = LinearPatchDecoder(tiny_config())
    assert decoder(torch.zeros(7, 32)).shape == (7, 12)
    assert decoder(torch.zeros(0, 32)).shape == (0, 12)
