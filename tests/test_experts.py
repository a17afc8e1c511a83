import torch
from torch import nn

from tests.tiny import make_batch, tiny_config, tiny_model
from transfusion.experts import by_modality, find_modalities
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration


def test_each_position_goes_through_the_module_of_its_kind() -> None:
    mask = torch.rand(3, 7) < 0.4
    hidden_states = torch.randn(3, 7, 2, 5, dtype=torch.float64)
    text, image = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    modalities = find_modalities(mask, int(mask.sum()))
    found = by_modality(hidden_states, modalities, text, image)
    for row in range(3):
        for position in range(7):
            module = image if mask[row, position] else text
            torch.testing.assert_close(found[row, position], module(hidden_states[row, position]), atol=1e-12, rtol=0)


def test_without_modalities_or_experts_all_is_text() -> None:
    hidden_states, text = torch.randn(1, 3, 5), nn.Linear(5, 5)
    modalities = find_modalities(torch.tensor([[True, False, True]]), 2)
    assert torch.equal(by_modality(hidden_states, None, text, nn.Linear(5, 5)), text(hidden_states))
    assert torch.equal(by_modality(hidden_states, modalities, text, None), text(hidden_states))


def copy_twins(model: TransfusionForMultimodalGeneration) -> None:
    """Make every image module equal to the text module whose twin it is."""
    values = model.state_dict()
    for name, parameter in model.named_parameters():
        if "image_" in name:
            parameter.data.copy_(values[name.replace("image_", "")])


def test_experts_equal_to_their_twins_are_the_plain_model() -> None:
    for kind in ("ffn", "all"):
        plain, experts = tiny_model(qk_norm=True), tiny_model(qk_norm=True, modality_experts=kind)
        experts.load_state_dict(plain.state_dict(), strict=False)
        copy_twins(experts)
        batch = make_batch([[5, (2, 3), 6, 7], [8, 9, (1, 2), (2, 2), 2]])
        timesteps = torch.tensor([0, 300, 600])
        expected, found = plain(**batch, timesteps=timesteps), experts(**batch, timesteps=timesteps)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-12, rtol=0)
        torch.testing.assert_close(found.image_prediction, expected.image_prediction, atol=1e-12, rtol=0)


def test_which_weights_are_the_patches_own() -> None:
    def moved_by_images(kind: str, rows: list[list[int | tuple[int, int]]]) -> set[str]:
        model = tiny_model(qk_norm=True, modality_experts=kind)
        batch = make_batch(rows)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        return {name.split(".", 3)[-1] for name in moved if ".layers.1." in name and "image_" in name}

    ffn = {f"image_mlp.{part}_proj.weight" for part in ("gate", "up", "down")} | {
        "image_post_attention_layernorm.weight"
    }
    attention = {f"self_attn.image_{part}_proj.weight" for part in "qkvo"} | {
        "self_attn.image_q_norm.weight",
        "self_attn.image_k_norm.weight",
        "image_input_layernorm.weight",
    }
    assert moved_by_images("ffn", [[5, (2, 2), 6]]) == ffn
    assert moved_by_images("all", [[5, (2, 2), 6]]) == ffn | attention
    assert moved_by_images("all", [[5, 6, 7]]) == set()  # text alone: every gradient is there, and zero


def test_text_alone_gives_experts_a_gradient_of_zero() -> None:
    model = TransfusionForMultimodalGeneration(tiny_config(modality_experts="all"))
    batch = make_batch([[5, 6, 7]])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
