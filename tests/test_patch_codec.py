import pytest
import torch
from torch import Tensor, nn

from tests.tiny import make_batch, tiny_config, tiny_model
from transfusion.configuration import TransfusionConfig
from transfusion.latents import unpatchify
from transfusion.patch_codec import (
    FREQUENCY_DIM,
    LinearPatchDecoder,
    LinearPatchEncoder,
    group_by_grid,
    in_flat_order,
    make_patch_decoder,
    make_patch_encoder,
    num_norm_groups,
)
from transfusion.positions import sinusoids


PATCH_SIZES = [1, 2, 4, 8]
GRIDS = torch.tensor([[2, 3], [1, 1], [2, 3], [3, 2]])
NUM_PATCHES = 19


def places(image: int) -> slice:
    """Where the patches of one of the images of `GRIDS` lie."""
    starts = [0, 6, 7, 13, 19]
    return slice(starts[image], starts[image + 1])


class Codec:
    """A tiny U-Net in float64 whose last convolution is no longer zero, and a batch for it."""

    def __init__(self, patch_size: int = 2, **overrides: object) -> None:
        torch.manual_seed(0)
        config = tiny_config(patch_codec="unet", patch_size=patch_size, **overrides)
        self.encoder, self.decoder = make_patch_encoder(config).double(), make_patch_decoder(config).double()
        nn.init.normal_(self.decoder.conv_out.weight)
        self.patches = torch.randn(NUM_PATCHES, config.patch_dim, dtype=torch.float64)
        self.hidden = torch.randn(NUM_PATCHES, config.hidden_size, dtype=torch.float64)
        self.timesteps = torch.tensor([3.0, 700.0, 40.0, 500.0])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        halves = {"encoder": self.encoder, "decoder": self.decoder}
        return {f"{half}.{name}": p for half, m in halves.items() for name, p in m.named_parameters()}

    def encode(self, patches: Tensor, images: slice = slice(None)) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        return self.encoder(patches, self.timesteps[images], GRIDS[images])

    def decode(self, hidden: Tensor, skips: list[tuple[Tensor, ...]], images: slice = slice(None)) -> Tensor:
        return self.decoder(hidden, skips, self.timesteps[images], GRIDS[images])

    def both(self, patches: Tensor, hidden: Tensor, images: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """What enters the transformer, and the prediction if `hidden` leaves it."""
        encoded, skips = self.encode(patches, images)
        return encoded, self.decode(hidden, skips, images)

    def mix_nothing(self) -> None:
        """Switch off what looks beyond a patch: attention, norms, all but the middle of each 3 x 3 kernel."""
        for module in [*self.encoder.modules(), *self.decoder.modules()]:
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.Identity())
                if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
                    middle = child.weight[:, :, 1, 1].clone()
                    nn.init.zeros_(child.weight)
                    child.weight.data[:, :, 1, 1] = middle
                if name == "to_out":
                    nn.init.zeros_(child[0].weight)


@pytest.mark.parametrize("axial_positions", [False, True])
def test_the_encoder_adds_timestep_and_place_to_each_patch(axial_positions: bool) -> None:
    encoder = LinearPatchEncoder(tiny_config(axial_positions=axial_positions)).double()
    grids = torch.tensor([[2, 1], [1, 3]])
    patches, timesteps = torch.randn(5, 12, dtype=torch.float64), torch.tensor([3.0, 700.0], dtype=torch.float64)
    encoded, skips = encoder(patches, timesteps, grids)
    assert skips is None
    places = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 0, 2)]  # image, row, column
    for patch, (image, row, column), vector in zip(patches, places, encoded, strict=True):
        features = sinusoids(timesteps[image : image + 1], FREQUENCY_DIM).double()[0]
        first = encoder.time_embed.linear_1.weight @ features + encoder.time_embed.linear_1.bias
        second = encoder.time_embed.linear_2
        expected = encoder.proj.weight @ patch + encoder.proj.bias
        expected = expected + second.weight @ (first * torch.sigmoid(first)) + second.bias
        if axial_positions:
            rows, columns = (axis(torch.arange(3)) for axis in encoder.position_embed.axes)
            expected = expected + rows[row] + columns[column]
        torch.testing.assert_close(vector, expected)


def test_adding_after_the_projection_contains_the_papers_adding_before() -> None:
    """W (x + e) + b = (W x + b) + W e: a time embedding of W e gives the paper's form."""
    encoder = LinearPatchEncoder(tiny_config()).double()
    x, e = torch.randn(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(encoder.proj(x + e), encoder.proj(x) + encoder.proj.weight @ e)


@pytest.mark.parametrize("num_patches", [7, 0])
def test_the_decoder_maps_hidden_vectors_to_patches(num_patches: int) -> None:
    decoder = LinearPatchDecoder(tiny_config())
    grids = torch.tensor([[1, num_patches]])
    assert decoder(torch.zeros(num_patches, 32), None, torch.zeros(1), grids).shape == (num_patches, 12)


@pytest.mark.parametrize("branches", [1, 3])
def test_the_skip_adds_each_noisy_patch_times_a_scale_of_its_timestep(branches: int) -> None:
    config = tiny_config(patch_codec="linear_skip")
    encoder, decoder = make_patch_encoder(config).double(), make_patch_decoder(config).double()
    patches = torch.randn(NUM_PATCHES, config.patch_dim, dtype=torch.float64)
    hidden = torch.randn(branches * NUM_PATCHES, config.hidden_size, dtype=torch.float64)
    timesteps = torch.tensor([3.0, 700.0, 40.0, 500.0])
    encoded, skips = encoder(patches, timesteps, GRIDS)
    plain = LinearPatchEncoder(config).double()
    plain.load_state_dict(encoder.state_dict())
    assert torch.equal(encoded, plain(patches, timesteps, GRIDS)[0])
    found = decoder(hidden, skips, timesteps.repeat(branches), GRIDS.repeat(branches, 1))
    for row in range(branches * NUM_PATCHES):
        patch = row % NUM_PATCHES
        image = next(image for image in range(4) if patch in range(*places(image).indices(NUM_PATCHES)))
        scale = decoder.skip_scale(timesteps[image : image + 1], torch.float64)[0]
        expected = decoder.proj(hidden[row]) + scale * patches[patch]
        torch.testing.assert_close(found[row], expected, atol=1e-12, rtol=0)


def test_over_no_image_the_skip_has_gradients_of_zero() -> None:
    model = tiny_model(patch_codec="linear_skip")
    batch = make_batch([[5, 6, 7]])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.patch_decoder.parameters())


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_a_unet_has_one_hidden_vector_per_patch(patch_size: int) -> None:
    codec = Codec(patch_size)
    encoded, prediction = codec.both(codec.patches, codec.hidden)
    assert encoded.shape == (NUM_PATCHES, 32) and prediction.shape == codec.patches.shape
    sides = {tuple(activation.shape[-2:]) for activation in codec.encode(codec.patches)[1][0]}
    assert sides == {(2 * size, 3 * size) for size in PATCH_SIZES[: PATCH_SIZES.index(patch_size) + 1]}


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_each_patch_of_a_unet_is_at_its_place(patch_size: int) -> None:
    """Without norm, attention and the borders of the kernels, a picture is treated patch by patch."""
    codec = Codec(patch_size)
    codec.mix_nothing()
    alone, timesteps = torch.ones(NUM_PATCHES, 2, dtype=torch.long), codec.timesteps.repeat_interleave(GRIDS.prod(1))
    encoded, skips = codec.encoder(codec.patches, timesteps, alone)
    expected = encoded, codec.decoder(codec.hidden, skips, timesteps, alone)
    torch.testing.assert_close(codec.both(codec.patches, codec.hidden), expected)


def test_without_a_transformer_both_halves_are_the_unet_of_diffusers() -> None:
    from diffusers import UNet2DModel
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    codec = Codec(4, hidden_size=40, unet_channels=(8, 24, 40), unet_layers_per_block=1)
    reference = UNet2DModel(
        block_out_channels=(8, 24, 40),
        layers_per_block=1,
        down_block_types=["AttnDownBlock2D"] * 3,
        mid_block_type=None,
        up_block_types=["AttnUpBlock2D"] * 3,
        attention_head_dim=8,
        norm_num_groups=2,
    )
    reference.time_proj = Timesteps(FREQUENCY_DIM, flip_sin_to_cos=True, downscale_freq_shift=0)
    reference.time_embedding = TimestepEmbedding(FREQUENCY_DIM, 4 * 8)
    reference.double()
    renamed = {"time_embed": "time_embedding", "norm_out": "conv_norm_out"}
    states = {**codec.encoder.state_dict(), **codec.decoder.state_dict()}
    parts = [(name.split(".", 1), value) for name, value in states.items() if not name.startswith("proj.")]
    reference.load_state_dict({f"{renamed.get(part, part)}.{rest}": value for (part, rest), value in parts})
    codec.decoder.time_embed = codec.encoder.time_embed
    codec.encoder.time_embed.load_state_dict(reference.time_embedding.state_dict())
    for projection in (codec.encoder.proj, codec.decoder.proj):
        nn.init.eye_(projection.weight)
        nn.init.zeros_(projection.bias)

    encoded, skips = codec.encode(codec.patches)
    prediction = codec.decode(encoded, skips)
    for image, grid in enumerate(GRIDS.tolist()):
        latents = unpatchify(codec.patches[places(image)], tuple(grid), 4)[None]
        expected = reference(latents, codec.timesteps[image]).sample[0]
        torch.testing.assert_close(unpatchify(prediction[places(image)], tuple(grid), 4), expected)


def test_kernels_reach_the_neighbours() -> None:
    codec = Codec()
    borders = codec.decoder.conv_out.weight.detach().clone()
    codec.mix_nothing()
    codec.decoder.conv_out.weight.data = borders
    grid, timesteps = torch.tensor([[4, 5]]), torch.tensor([10.0])
    patches, hidden = torch.randn(20, 12, dtype=torch.float64), torch.randn(20, 32, dtype=torch.float64)
    _, skips = codec.encoder(patches, timesteps, grid)
    before = codec.decoder(hidden, skips, timesteps, grid)
    hidden[1 * 5 + 3] += 1
    changed = (codec.decoder(hidden, skips, timesteps, grid) - before).abs().amax(dim=1).view(4, 5) > 1e-12
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[0:3, 2:5] = True
    assert changed.equal(expected)


def test_attention_reaches_the_whole_image() -> None:
    codec = Codec()
    attention_weights = [p for name, p in codec.parameters.items() if "to_out.0.weight" in name]
    kept = [weight.detach().clone() for weight in attention_weights]
    codec.mix_nothing()
    for weight, value in zip(attention_weights, kept, strict=True):
        weight.data = value
    patches = codec.patches.clone()
    patches[0] += 1
    change = (codec.encode(patches)[0] - codec.encode(codec.patches)[0]).abs().amax(dim=1)
    assert (change[places(0)] > 1e-12).all()


def test_permuting_the_patches_changes_more_than_their_order() -> None:
    codec = Codec()
    order = torch.tensor([3, 0, 5, 1, 4, 2, *range(6, NUM_PATCHES)])
    encoded, prediction = codec.both(codec.patches, codec.hidden)
    permuted, permuted_prediction = codec.both(codec.patches[order], codec.hidden[order])
    assert (permuted - encoded[order])[:6].abs().amax(dim=1).min() > 1e-3
    assert (permuted_prediction - prediction[order])[:6].abs().amax(dim=1).min() > 1e-3


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_images_of_any_grids_do_not_see_each_other(patch_size: int) -> None:
    """A batch of several grids is the same as one call per image."""
    codec = Codec(patch_size, axial_positions=True)
    encoded, prediction = codec.both(codec.patches, codec.hidden)
    for image in range(len(GRIDS)):
        here = places(image)
        alone = codec.both(codec.patches[here], codec.hidden[here], slice(image, image + 1))
        torch.testing.assert_close((encoded[here], prediction[here]), alone)


def test_the_axial_embedding_tells_places() -> None:
    codec = Codec(axial_positions=True)
    embedding, codec.encoder.position_embed = codec.encoder.position_embed, None
    without, _ = codec.encode(codec.patches)
    codec.encoder.position_embed = embedding
    added = torch.cat([embedding(grid) for grid in GRIDS.tolist()])
    torch.testing.assert_close(codec.encode(codec.patches)[0], without + added)


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_guidance_branches_share_one_encoding(branches: int) -> None:
    codec = Codec()
    _, skips = codec.encode(codec.patches)
    hidden = torch.randn(branches, *codec.hidden.shape, dtype=torch.float64)
    together = codec.decoder(hidden.flatten(0, 1), skips, codec.timesteps.repeat(branches), GRIDS.repeat(branches, 1))
    torch.testing.assert_close(together, torch.cat([codec.decode(vectors, skips) for vectors in hidden]))


def test_every_skip_matters() -> None:
    codec = Codec(4)
    _, skips = codec.encode(codec.patches)
    before = codec.decode(codec.hidden, skips)
    assert len(skips) == 3 and len(skips[0]) == 9  # grids; conv_in, two blocks on each level, two halvings
    for group, image in enumerate([0, 1, 3]):
        for number in range(9):
            changed = list(skips[group])
            changed[number] = changed[number] + torch.randn_like(changed[number])
            after = codec.decode(codec.hidden, [*skips[:group], tuple(changed), *skips[group + 1 :]])
            change = (after - before).abs().amax(dim=1) > 1e-9
            assert change[places(image)].all() and not change[places(1 if image != 1 else 3)].any()


def test_both_halves_know_the_timestep() -> None:
    codec = Codec()
    encoded, skips = codec.encode(codec.patches)
    prediction = codec.decode(codec.hidden, skips)
    codec.timesteps[2] = 900
    for before, after in [(encoded, codec.encode(codec.patches)[0]), (prediction, codec.decode(codec.hidden, skips))]:
        change = (after - before).abs().amax(dim=1) > 1e-6
        assert change[places(2)].all() and change.sum() == 6


def test_an_untrained_unet_predicts_zero() -> None:
    codec = Codec()
    codec.decoder.conv_out.reset_parameters()
    prediction = codec.both(codec.patches, codec.hidden)[1]
    assert prediction.count_nonzero() == 0 and prediction.requires_grad


@torch.no_grad()
def test_the_initialisation_of_a_model_keeps_that_zero() -> None:
    batch = make_batch([[5, (2, 3), 6]])
    model = tiny_model(patch_codec="unet")
    assert model(**batch, timesteps=torch.tensor([500])).image_prediction.count_nonzero() == 0


def test_gradient_checkpointing_reaches_the_blocks_and_changes_nothing() -> None:
    model, batch = tiny_model(patch_codec="unet").train(), make_batch([[5, (2, 3), 6], [7, (1, 1), (2, 3)]])
    nn.init.normal_(model.patch_decoder.conv_out.weight)
    batch |= {"labels": batch["input_ids"], "noise": torch.randn_like(batch["latent_patches"])}
    gradients = []
    for _ in range(2):
        model(**batch, timesteps=torch.tensor([5, 300, 900])).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
        model.activation_checkpointing_enable()
    assert all(block.gradient_checkpointing for block in model.patch_decoder.up_blocks)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_the_gradient_reaches_every_parameter(patch_size: int) -> None:
    codec = Codec(patch_size, axial_positions=True)
    encoded, skips = codec.encode(codec.patches)
    codec.decode(encoded, skips).square().sum().backward()
    without = {name for name, p in codec.parameters.items() if p.grad is None or p.grad.abs().max() == 0}
    # The softmax of attention does not see what all keys share.
    assert all("to_k.bias" in name for name in without), without


def test_over_no_image_every_gradient_is_zero() -> None:
    codec = Codec(axial_positions=True)
    encoded, prediction = codec.both(codec.patches[:0], codec.hidden[:0].requires_grad_(), slice(0))
    assert encoded.shape == (0, 32) and prediction.shape == (0, 12)
    (encoded.sum() + prediction.sum()).backward()
    for name, parameter in codec.parameters.items():
        assert parameter.grad is not None and parameter.grad.count_nonzero() == 0, name


def test_an_image_of_one_patch_is_not_normalised_to_nothing() -> None:
    codec = Codec()
    for block in codec.encoder.down_blocks[-1].resnets:
        hidden = torch.randn(1, 32, 1, 1, dtype=torch.float64)
        normalised = block.norm1(hidden)
        assert normalised.std() > 0.1


@pytest.mark.parametrize(
    ("channels", "groups"),
    [((512, 1152), 32), ((192, 384, 640, 1024), 32), ((64, 128), 16), ((32, 32), 8), ((24, 48), 4), ((7, 64), 1)],
)
def test_groups_divide_every_width(channels: tuple[int, ...], groups: int) -> None:
    assert num_norm_groups(channels) == groups


def test_grids_are_grouped_and_put_back() -> None:
    groups = group_by_grid(GRIDS)
    assert [group.grid for group in groups] == [(2, 3), (1, 1), (3, 2)]
    assert [group.images.tolist() for group in groups] == [[0, 2], [1], [3]]
    assert groups[0].patches.tolist() == [list(range(6)), list(range(7, 13))]
    values = torch.randn(NUM_PATCHES, 5)
    assert in_flat_order([values[group.patches].flatten(0, 1) for group in groups], groups).equal(values)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("preset", ["0.16b", "0.37b", "0.76b", "1.4b", "7b"])
def test_the_papers_unet_has_0_27_billion_parameters(preset: str, patch_size: int) -> None:
    """Section 4.3.2: whatever the size of the transformer and of the patches."""
    config = TransfusionConfig.from_preset(preset, patch_codec="unet", patch_size=patch_size)
    with torch.device("meta"):
        halves = [make_patch_encoder(config), make_patch_decoder(config)]
    count = sum(parameter.numel() for half in halves for parameter in half.parameters())
    assert count == pytest.approx(0.27e9, rel=0.03 if preset == "7b" else 0.04)


def test_bfloat16_autocast_changes_little() -> None:
    codec = Codec()
    codec.encoder.float(), codec.decoder.float()
    patches, hidden = codec.patches.float(), codec.hidden.float()
    _, expected = codec.both(patches, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        encoded, prediction = codec.both(patches, hidden)
    assert encoded.dtype == prediction.dtype == torch.bfloat16
    torch.testing.assert_close(prediction.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
