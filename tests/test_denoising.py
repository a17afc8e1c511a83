import contextlib
from typing import Any

import diffusers
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from tests.tiny import make_batch, tiny_model
from transfusion.context import Context, Document, hide_text, read_documents
from transfusion.denoising import (
    Denoiser,
    Drawing,
    SchedulerGroup,
    StepGraph,
    can_capture,
    draw_images,
    draw_noise,
)
from transfusion.diffusion import DDPM, SCHEDULERS, check_scheduler, make_scheduler
from transfusion.modeling_transfusion import TransfusionForMultimodalGeneration


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def uncached_prediction(
    model: TransfusionForMultimodalGeneration,
    ids: list[int],
    visible: list[int],
    grid: tuple[int, int],
    x: Tensor,
    t: Tensor,
    before: Document | None = None,
) -> Tensor:
    """The image after `ids`, in one run over everything; the clean images of `before` stand in `ids`."""
    count, grids, images = grid[0] * grid[1], [grid], [x.double()]
    if before is not None:
        grids, images = [*before.grids, grid], [*before.images, x.double()]
    output = model(
        input_ids=torch.tensor([ids + [99] * count]),
        attention_mask=torch.tensor([visible + [1] * count]),
        latent_patches=torch.cat(images),
        image_grids=torch.tensor(grids),
        timesteps=torch.cat([t.new_zeros(len(grids) - 1), t[None]]),
    )
    return output.image_prediction[-count:]


def kind_of(model: TransfusionForMultimodalGeneration) -> torch.dtype:
    return torch.long if model.config.objective == "ddpm" else torch.float32


def with_leading_steps(objective: str, name: str) -> Any:
    """For ddpm, steps that do not begin where alpha is 5e-5: dividing by it would drown all that comes after."""
    if objective == "flow":
        return make_scheduler(objective, name)
    config = {**make_scheduler(objective).config, "timestep_spacing": "leading"}
    return getattr(diffusers, name).from_config(config)


def slow_drawing(
    model: TransfusionForMultimodalGeneration,
    ids: list[int],
    grid: tuple[int, int],
    noise: Tensor,
    scheduler: Any,
    steps: int,
    scale: float,
    before: Document | None = None,
) -> Tensor:
    """Sampling written out: no cache, no batch, one branch after the other."""
    scheduler.set_timesteps(steps)
    x, hidden = noise * getattr(scheduler, "init_noise_sigma", 1.0), [int(token >= 95) for token in ids]
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        given = uncached_prediction(model, ids, [1] * len(ids), grid, scaled, t.to(kind_of(model)), before)
        without = uncached_prediction(model, ids, hidden, grid, scaled, t.to(kind_of(model)), before)
        x = scheduler.step((without + scale * (given - without)).float(), t, x).prev_sample
    return x


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("objective", "name"),
    [
        ("ddpm", "DDIMScheduler"),
        ("ddpm", "DPMSolverMultistepScheduler"),
        ("ddpm", "EulerDiscreteScheduler"),  # over sigmas: it scales what the model sees
        ("flow", "FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_cached_batched_guided_drawing_equals_the_slow_one(objective: str, name: str, scale: float) -> None:
    model = tiny_model(objective=objective)
    prompts, grids = [[5, 6, 7, 97], [8, 97]], [(2, 3), (1, 2)]
    noise = draw_noise(grids, seeded(0, 1), 12, "cpu")
    scheduler = with_leading_steps(objective, name)
    check_scheduler(scheduler, objective)
    documents = [Document(torch.tensor(prompt)) for prompt in prompts]
    drawn = draw_images(model, documents, noise, grids, Drawing(scheduler, 4, scale), seeded(0, 1))
    for image, prompt, grid, start in zip(drawn, prompts, grids, noise, strict=True):
        expected = slow_drawing(model, prompt, grid, start, with_leading_steps(objective, name), 4, scale)
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-4)


SIZED = {"size_token_grids": [(2, 2), (3, 1)], "size_token_ids": [95, 96]}
LAYOUTS: list[list[int | tuple[int, int]]] = [
    [(1, 2), 5, 97],
    [5, (2, 2), 6, (1, 1), 7, 97],
    [(3, 1), (1, 3), 8, 9, 10, 97],
    [(2, 1), 97],
]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "sdpa compiled"])
@pytest.mark.parametrize(
    "overrides",
    [{}, SIZED, {"image_rope": "2d"}, {"image_attention": "causal"}, {"modality_experts": "all"}],
    ids=["plain", "sizes", "2d", "causal", "experts"],
)
def test_after_any_images_a_mixed_batch_draws_what_slow_rows_draw(
    objective: str, overrides: dict[str, Any], attention: str
) -> None:
    """Images before, between and after texts, of other sizes than the images that are drawn."""
    model = tiny_model(objective=objective, **overrides)
    model.set_attn_implementation(attention.removesuffix(" compiled"))
    if attention.endswith("compiled"):
        torch.compiler.reset()
        model.compile_layers(backend="eager")
    grids = [(2, 2), (1, 4), (3, 1), (1, 2)]
    batch = make_batch(LAYOUTS)
    documents = read_documents(**batch, config=model.config)
    for document, grid in zip(documents, grids, strict=True):
        document.input_ids[-1] = model.config.boi_token_for(grid)
    noise = draw_noise(grids, seeded(0, 1, 2, 3), 12, "cpu")
    name = {"ddpm": "DDIMScheduler", "flow": "FlowMatchHeunDiscreteScheduler"}[objective]
    drawing = Drawing(with_leading_steps(objective, name), 3, 2.0)
    drawn = draw_images(model, documents, noise, grids, drawing, [None] * 4)
    for image, before, grid, start in zip(drawn, documents, grids, noise, strict=True):
        ids = before.input_ids.tolist()
        slow = slow_drawing(model, ids, grid, start, with_leading_steps(objective, name), 3, 2.0, before)
        torch.testing.assert_close(image, slow, atol=1e-4, rtol=1e-4)
        alone = slow_drawing(model, [5, 97], grid, start, with_leading_steps(objective, name), 3, 2.0)
        assert (image - alone).abs().max() > 1e-2  # what stands before the image matters


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_images_are_encoded_once_for_all_branches(branches: int) -> None:
    model, encoded = tiny_model(objective="flow"), []
    model.model.patch_encoder.register_forward_hook(lambda module, args, out: encoded.append(len(args[0])))
    prompts, grids, t = [[5, 97], [6, 7, 97]] * branches, [(2, 2), (1, 3)], torch.tensor(300.0)
    prompts = [[8 + row, *prompt] for row, prompt in enumerate(prompts)]
    x = draw_noise(grids, seeded(0, 1), 12, "cpu")
    with torch.no_grad():
        context = Context.read(model, [Document(torch.tensor(prompt)) for prompt in prompts])
        predicted = Denoiser(context, grids)(x, t)
    assert encoded == [7] and len(predicted) == 2 * branches
    for row, prompt in enumerate(prompts):
        slow = uncached_prediction(model, prompt, [1] * len(prompt), grids[row % 2], x[row % 2], t)
        torch.testing.assert_close(predicted[row], slow.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("objective", "name"), [(o, n) for o, names in SCHEDULERS.items() for n in names])
def test_every_scheduler_draws_a_batch_as_it_draws_each_row(objective: str, name: str) -> None:
    model = tiny_model(objective=objective)
    prompts, grids = [[5, 6, 7, 97], [8, 97], [97]], [(2, 2), (1, 2), (2, 2)]
    drawing = Drawing(make_scheduler(objective, name), 6, 2.0)
    documents = [Document(torch.tensor(prompt)) for prompt in prompts]
    together = draw_images(
        model,
        documents,
        draw_noise(grids, seeded(0, 1, 2), 12, "cpu"),
        grids,
        drawing,
        generators := seeded(10, 11, 12),
    )
    assert generators
    for row in range(3):
        noise = draw_noise(grids[row : row + 1], seeded(row), 12, "cpu")
        alone = draw_images(model, documents[row : row + 1], noise, grids[row : row + 1], drawing, seeded(10 + row))[0]
        assert torch.isfinite(alone).all()
        torch.testing.assert_close(together[row], alone, atol=1e-3, rtol=1e-3)


def test_the_prefix_is_run_once_and_never_changed() -> None:
    model = tiny_model(objective="flow")
    shapes: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    documents = [Document(torch.tensor([5, 6, 7, 8, 97]))]
    for scale in (1.0, 2.0):
        drawing = Drawing(make_scheduler("flow"), 5, scale)
        draw_images(model, documents, draw_noise([(2, 2)], [None], 12, "cpu"), [(2, 2)], drawing, [None])
    handle.remove()
    # The prompt, then five times the four patches alone; guidance takes one more row, of which all text is left out.
    assert shapes == [(1, 5)] + [(1, 4)] * 5 + [(1, 5), (1, 1)] + [(2, 4)] * 5


def test_layers_that_are_compiled_share_one_whole_graph_of_a_step() -> None:
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    model = tiny_model(objective="flow", num_hidden_layers=12)  # more than Dynamo would compile one by one
    prompts = [Document(torch.tensor([5, 6, 97])), Document(torch.tensor([97]))]
    context = Context.read(model, prompts)
    x, t = draw_noise([(2, 2)], seeded(0), 12, "cpu"), torch.tensor(300.0)
    expected = Denoiser(context, [(2, 2)])(x, t)
    model.compile_layers(backend=graphs)
    with torch.no_grad():
        predicted = Denoiser(context, [(2, 2)])(x, t)
    assert graphs.frame_count == 1
    torch.testing.assert_close(predicted, expected)


def test_a_prediction_leaves_the_context_as_it_was() -> None:
    model = tiny_model(objective="flow")
    batch = make_batch([[5, (1, 2), 6]])
    documents = read_documents(**batch, config=model.config)
    with torch.no_grad():
        context = Context.read(model, documents)
        keys = [layer.keys.clone() for layer in context.cache.layers]
        Denoiser(context, [(2, 2)])([torch.randn(4, 12)], torch.tensor(500.0))
    for layer, before in zip(context.cache.layers, keys, strict=True):
        assert torch.equal(layer.keys, before)
    assert context.attention_mask.shape == (1, 6)


def test_hidden_text_cannot_be_seen_and_images_can() -> None:
    """The unconditional branch is the same whatever the text says, and differs with another picture in the prompt."""
    model = tiny_model(objective="flow")
    x, grid, t = torch.randn(2, 12, dtype=torch.float64), (1, 2), torch.tensor(300.0)

    def unconditional(batch: dict[str, Tensor]) -> Tensor:
        documents = read_documents(**batch, config=model.config)
        with torch.no_grad():
            context = Context.read(model, documents, [hide_text(d.input_ids, model.config) for d in documents])
            return Denoiser(context, [grid])([x], t)[0]

    one, other = make_batch([[5, 6, (2, 2), 7, 97]]), make_batch([[8, 9, (2, 2), 10, 97]])
    torch.testing.assert_close(unconditional(one), unconditional(other))
    assert not torch.allclose(unconditional(one), unconditional(make_batch([[5, 6, (2, 2), 7, 97]], seed=1)))


def test_training_and_sampling_build_the_unconditional_branch_alike() -> None:
    """A training row whose text is hidden by the mask predicts what the sampler's unconditional branch predicts."""
    model = tiny_model(objective="flow")
    ids, t, x = [5, 6, 97], torch.tensor(400.0), torch.randn(4, 12, dtype=torch.float64)
    trained = uncached_prediction(model, ids, [0, 0, 1], (2, 2), x, t)
    with torch.no_grad():
        context = Context.read(model, [Document(torch.tensor(ids))], [hide_text(torch.tensor(ids), model.config)])
        sampled = Denoiser(context, [(2, 2)])([x], t)[0]
    torch.testing.assert_close(sampled.double(), trained, atol=1e-6, rtol=1e-6)


def test_callback_sees_and_may_replace_the_latents() -> None:
    model, seen = tiny_model(objective="flow"), []

    def zero_at_the_end(step: int, timestep: Tensor, x_t: Tensor) -> Tensor | None:
        seen.append((step, float(timestep), tuple(x_t.shape)))
        return torch.zeros_like(x_t) if step == 3 else None

    drawing = Drawing(make_scheduler("flow"), 4, 1.0, zero_at_the_end)
    documents = [Document(torch.tensor([5, 97])), Document(torch.tensor([97]))]
    grids = [(1, 2), (2, 2)]
    drawn = draw_images(model, documents, draw_noise(grids, [None, None], 12, "cpu"), grids, drawing, [None, None])
    assert seen == [(step, 1000.0 - 250 * step, (6, 12)) for step in range(4)]
    assert [image.abs().sum().item() for image in drawn] == [0, 0]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8), (0.5, 0.5), (1.0, 1.0)])
def test_guidance_works_within_its_interval_alone(interval: tuple[float, float]) -> None:
    model, rows = tiny_model(objective="flow"), []
    documents, grids = [Document(torch.tensor([5, 6, 97])), Document(torch.tensor([7, 97]))], [(2, 2), (1, 3)]
    noise = draw_noise(grids, seeded(0, 1), 12, "cpu")
    drawing = Drawing(make_scheduler("flow"), 4, 3.0, guidance_interval=interval)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    drawn = draw_images(model, documents, noise, grids, drawing, [None, None])
    handle.remove()
    guided = [interval[0] <= share <= interval[1] for share in (1.0, 0.75, 0.5, 0.25)]
    assert rows[-4:] == [4 if both else 2 for both in guided]
    for image, document, grid, x in zip(drawn, documents, grids, noise, strict=True):
        ids = document.input_ids.tolist()
        for t, both in zip((1000.0, 750.0, 500.0, 250.0), guided, strict=True):
            at = torch.tensor(t)
            given = uncached_prediction(model, ids, [1] * len(ids), grid, x, at)
            hidden = uncached_prediction(model, ids, [0] * (len(ids) - 1) + [1], grid, x, at)
            x = x - 0.25 * (hidden + 3.0 * (given - hidden) if both else given).float()
        torch.testing.assert_close(image, x, atol=1e-5, rtol=1e-4)


def test_a_context_that_has_run_is_not_run_again() -> None:
    model, shapes = tiny_model(objective="flow"), []
    batch = make_batch([[5, (1, 2), 6, 97], [7, 97]])
    documents, grids = read_documents(**batch, config=model.config), [(2, 2), (1, 3)]
    noise, drawing = draw_noise(grids, seeded(0, 1), 12, "cpu"), Drawing(make_scheduler("flow"), 3, 2.0)
    expected = draw_images(model, documents, noise, grids, drawing, [None, None])
    context = Context.read(model, documents)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    drawn = draw_images(model, documents, noise, grids, drawing, [None, None], context=context)
    handle.remove()
    assert shapes == [(2, 5)] + [(4, 4)] * 3  # the branch without text, and three steps
    for image, other in zip(drawn, expected, strict=True):
        torch.testing.assert_close(image, other)


def test_a_recorded_step_is_replayed_with_new_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the thinnest seam, as there is no CUDA device: a graph is what runs the function again in place."""
    calls = []

    class FakeGraph:
        def replay(self) -> None:
            calls.append("replay")
            assert step.inputs is not None
            output.copy_(step.inputs[0] * step.inputs[1])

    def function(x: Tensor, t: Tensor) -> Tensor:
        calls.append("run")
        return output.copy_(x * t)

    output = torch.zeros(3)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    step = StepGraph(function)
    results = [step(torch.full((3,), float(x)), torch.full((3,), 2.0)) for x in range(4)]
    assert calls == ["run", "run", "replay", "replay", "replay"]
    assert [result.tolist() for result in results[1:]] == [[2.0 * x] * 3 for x in range(1, 4)]


def test_a_step_is_recorded_where_that_can_work() -> None:
    assert not can_capture(tiny_model())  # on the CPU


def test_no_step_is_recorded_that_reads_values_or_moves_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the thinnest seam, as there is no CUDA device: the model says that it is on one."""
    monkeypatch.setattr(type(tiny_model()), "device", torch.device("cuda"))
    assert can_capture(tiny_model())
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not can_capture(tiny_model(rope_parameters=rope))
    assert not can_capture(tiny_model(patch_codec="unet"))
    for name in ("_hf_hook", "_diffusers_hook"):
        model = tiny_model()
        setattr(model.model.layers[1], name, object())
        assert not can_capture(model)
    model = tiny_model()
    model.is_quantized = True
    assert not can_capture(model)
    model = tiny_model()
    model.compile_layers(backend="eager")
    assert can_capture(model)
    model.forward = torch.compile(model.forward, backend="eager")
    assert not can_capture(model)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("name", ["DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep"])
def test_noise_levels_that_round_to_one_timestep_are_gone_through_in_order(name: str, option: str) -> None:
    """Data are normal, so that the best prediction is a formula; samples must have their mean and deviation."""
    mean, std = 0.3, 0.5
    scheduler_class = getattr(diffusers, f"{name}Scheduler")
    scheduler = scheduler_class.from_config(make_scheduler("ddpm").config, **{option: True})
    group = SchedulerGroup(Drawing(scheduler, 50, 1.0), [0], [None], "cpu")
    x_t = [torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))]
    assert len(set(group.scheduler.timesteps.tolist())) < 50
    for timestep in group.scheduler.timesteps:
        alpha, sigma = (float(scale) for scale in DDPM().scales(timestep[None], torch.float64))
        noise = sigma / (alpha**2 * std**2 + sigma**2) * (x_t[0].double() - alpha * mean)
        group.step([noise.float()], timestep, x_t)
    assert abs(float(x_t[0].mean()) - mean) < 0.03 and abs(float(x_t[0].std()) - std) < 0.05
