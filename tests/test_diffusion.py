"""Noise processes against their definitions, diffusers' schedulers, and the Gaussian, whose denoiser is known.

For data N(MEAN, STD**2), `x_t` is N(alpha * MEAN, alpha**2 * STD**2 + sigma**2), the best prediction is a posterior
mean, and the probability-flow ODE keeps `(x_t - alpha * MEAN) / std(x_t)`. So every sampler's error can be measured.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transfusion.configuration import TransfusionConfig
from transfusion.diffusion import (
    DDPM,
    PREDICTION_TYPES,
    SCHEDULERS,
    NoiseProcess,
    RectifiedFlow,
    check_scheduler,
    clean_and_noise,
    convert_prediction,
    logger,
    make_noise_process,
    make_scheduler,
    noise_process_of,
)


PROCESSES = {"ddpm": DDPM(), "flow": RectifiedFlow()}
ALL_SCHEDULERS = [(objective, name) for objective, names in SCHEDULERS.items() for name in names]
LARGEST_BELOW_ONE = 1 - 2.0**-24


def slow_alpha_bar(num_train_timesteps: int) -> list[float]:
    """The definition of Nichol & Dhariwal: the running product of one minus the capped betas."""

    def cosine(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    product, products = 1.0, []
    for step in range(num_train_timesteps):
        beta = 1 - cosine((step + 1) / num_train_timesteps) / cosine(step / num_train_timesteps)
        product *= 1 - min(beta, 0.999)
        products.append(product)
    return products


# Scales and noising.


@pytest.mark.parametrize("length", [1, 2, 3, 10, 1000, 4000])
def test_cosine_schedule_is_its_definition(length: int) -> None:
    alpha_bar = torch.tensor(slow_alpha_bar(length), dtype=torch.float64)
    alpha, sigma = DDPM(length).scales(torch.arange(length), torch.float64)
    torch.testing.assert_close(alpha**2, alpha_bar, rtol=1e-11, atol=0)
    torch.testing.assert_close(sigma**2, 1 - alpha_bar, rtol=1e-10, atol=0)


def test_cosine_schedule_is_that_of_diffusers() -> None:
    reference = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    alpha, _ = DDPM().scales(torch.arange(1000))
    torch.testing.assert_close(alpha**2, reference, rtol=0, atol=1e-6)
    torch.testing.assert_close(alpha[-1] ** 2, reference[-1], rtol=1e-4, atol=0)


def test_float32_scales_keep_their_digits_at_both_ends() -> None:
    timestep = torch.arange(1000)
    for single, double in zip(DDPM().scales(timestep), DDPM().scales(timestep, torch.float64), strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=5e-7, atol=0)


def test_flow_scales_are_a_straight_line() -> None:
    timestep = torch.tensor([0.0, 250.0, 500.0, 1000.0], dtype=torch.float64)
    alpha, sigma = RectifiedFlow().scales(timestep, torch.float64)
    assert sigma.tolist() == [0, 0.25, 0.5, 1]
    assert alpha.tolist() == [1, 0.75, 0.5, 0]


def test_ddpm_noises_as_diffusers_does() -> None:
    timestep = torch.arange(1000)
    x_0, noise = torch.randn(1000, 2, 3, 4), torch.randn(1000, 2, 3, 4)
    reference = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").add_noise(x_0, noise, timestep)
    # sqrt(1 - alpha_bar) loses digits at small timesteps in the float32 of diffusers.
    torch.testing.assert_close(DDPM().add_noise(x_0, noise, timestep), reference, rtol=1e-4, atol=1e-4)


def test_ddpm_noises_as_diffusers_does_with_exact_products() -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.alphas_cumprod = torch.tensor(slow_alpha_bar(1000), dtype=torch.float64)
    timestep = torch.arange(1000)
    x_0, noise = torch.randn(2, 1000, 5, dtype=torch.float64)
    reference = scheduler.add_noise(x_0, noise, timestep)
    torch.testing.assert_close(DDPM().add_noise(x_0, noise, timestep), reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_noises_as_diffusers_does(shift: float) -> None:
    scheduler = make_scheduler("flow", shift=shift)
    scheduler.set_timesteps(50)
    x_0, noise = torch.randn(2, 50, 3, 4)
    reference = scheduler.scale_noise(x_0, scheduler.timesteps, noise)
    torch.testing.assert_close(
        RectifiedFlow().add_noise(x_0, noise, scheduler.timesteps), reference, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("objective", PROCESSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_are_rounded_once(objective: str, dtype: torch.dtype) -> None:
    process = PROCESSES[objective]
    timestep = torch.tensor([3, 500, 990])
    x_0, noise = torch.randn(2, 3, 64).to(dtype)
    noisy = process.add_noise(x_0, noise, timestep)
    exact = process.add_noise(x_0.double(), noise.double(), timestep)
    assert noisy.dtype == process.target(x_0, noise, timestep).dtype == dtype
    assert process.to_clean(noise, noisy, timestep).dtype == process.to_noise(noise, noisy, timestep).dtype == dtype
    torch.testing.assert_close(noisy.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("objective", PROCESSES)
def test_training_step_compiles_to_one_graph(objective: str) -> None:
    process = PROCESSES[objective]

    def noise_and_target(x_0: Tensor, noise: Tensor, u: Tensor, capped: Tensor) -> tuple[Tensor, Tensor]:
        timestep = process.timestep_from_uniform(u, capped)
        return process.add_noise(x_0, noise, timestep), process.target(x_0, noise, timestep)

    arguments = (torch.randn(4, 6), torch.randn(4, 6), torch.rand(4), torch.tensor([True, False, True, False]))
    compiled = torch.compile(noise_and_target, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), noise_and_target(*arguments))


# Predictions.


MEANINGS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "noise": lambda x_0, noise, alpha, sigma: noise,
    "clean": lambda x_0, noise, alpha, sigma: x_0,
    "v": lambda x_0, noise, alpha, sigma: alpha * noise - sigma * x_0,
    "velocity": lambda x_0, noise, alpha, sigma: noise - x_0,
}
LATENTS = st.lists(st.floats(-10, 10), min_size=8, max_size=8).map(lambda v: torch.tensor(v).double().view(2, 1, 4))
REGULAR_TIMESTEPS = st.integers(20, 980)


@pytest.mark.parametrize("objective", PROCESSES)
@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("target", PREDICTION_TYPES)
@settings(deadline=None)
@given(latents=LATENTS, prediction=LATENTS, timestep=REGULAR_TIMESTEPS)
def test_conversions_mean_what_they_say_and_invert(
    objective: str, source: str, target: str, latents: Tensor, prediction: Tensor, timestep: int
) -> None:
    alpha, sigma = PROCESSES[objective].scales(torch.tensor([timestep]), torch.float64)
    x_0, noise = latents
    x_t = alpha * x_0 + sigma * noise
    converted = convert_prediction(MEANINGS[source](x_0, noise, alpha, sigma), source, target, x_t, alpha, sigma)
    torch.testing.assert_close(converted, MEANINGS[target](x_0, noise, alpha, sigma), rtol=0, atol=1e-10)
    # Any prediction, also one that no pair of latents and noise explains.
    there = convert_prediction(prediction, source, target, latents, alpha, sigma)
    back = convert_prediction(there, target, source, latents, alpha, sigma)
    torch.testing.assert_close(back, prediction, rtol=0, atol=1e-9)


@pytest.mark.parametrize("timestep", [0.0, 1000.0])
@pytest.mark.parametrize("prediction_type", ["v", "velocity"])
def test_v_and_velocity_are_regular_at_the_ends(timestep: float, prediction_type: str) -> None:
    alpha, sigma = RectifiedFlow().scales(torch.tensor([timestep]), torch.float64)
    x_0, noise = torch.randn(2, 5, dtype=torch.float64)
    prediction = MEANINGS[prediction_type](x_0, noise, alpha, sigma)
    pair = clean_and_noise(prediction, prediction_type, alpha * x_0 + sigma * noise, alpha, sigma)
    torch.testing.assert_close(pair, (x_0, noise), rtol=0, atol=1e-14)


def test_noise_does_not_determine_clean_where_there_is_no_signal() -> None:
    one, zero = torch.ones(1), torch.zeros(1)
    assert not convert_prediction(one, "noise", "clean", one, alpha=zero, sigma=one).isfinite().any()
    assert not convert_prediction(one, "clean", "noise", one, alpha=one, sigma=zero).isfinite().any()


def test_unknown_prediction_types_are_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"'epsilon'; allowed: noise, clean, v, velocity"):
        convert_prediction(one, "epsilon", "clean", one, one, one)
    with pytest.raises(ValueError, match=r"'sample'; allowed: noise, clean, v, velocity"):
        convert_prediction(one, "noise", "sample", one, one, one)


@pytest.mark.parametrize("objective", PROCESSES)
def test_target_gives_back_clean_and_noise(objective: str) -> None:
    process = PROCESSES[objective]
    timestep = torch.arange(1000)
    x_0, noise = torch.randn(2, 1000, 3, 4, dtype=torch.float64)
    x_t, target = process.add_noise(x_0, noise, timestep), process.target(x_0, noise, timestep)
    torch.testing.assert_close(process.to_clean(target, x_t, timestep), x_0, rtol=0, atol=1e-10)
    torch.testing.assert_close(process.to_noise(target, x_t, timestep), noise, rtol=0, atol=1e-10)


def test_targets_are_noise_and_velocity() -> None:
    x_0, noise = torch.randn(2, 3, 4)
    timestep = torch.tensor([0, 10, 999])
    assert torch.equal(DDPM().target(x_0, noise, timestep), noise)
    assert torch.equal(RectifiedFlow().target(x_0, noise, timestep), noise - x_0)


# Densities of timesteps.


FLOWS = [
    RectifiedFlow(timestep_density="uniform"),
    RectifiedFlow(timestep_density="uniform", timestep_shift=3.0),
    RectifiedFlow(),
    RectifiedFlow(timestep_mean=-0.8, timestep_std=0.8),
    RectifiedFlow(timestep_mean=0.3, timestep_std=1.5, timestep_shift=4.0),
    RectifiedFlow(timestep_mean=2.0, timestep_std=2.0, timestep_shift=1.7),  # the largest draw rounds above the limit
    RectifiedFlow(timestep_shift=0.5, num_train_timesteps=500),
]


def flow_distribution(process: RectifiedFlow, timestep: np.ndarray) -> np.ndarray:
    """Closed form of P(draw <= timestep): undo the shift, then a uniform or logit-normal distribution function."""
    shifted = timestep / process.num_train_timesteps
    sigma = shifted / (process.timestep_shift - (process.timestep_shift - 1) * shifted)
    if process.timestep_density == "uniform":
        return sigma
    deviations = (np.log(sigma / (1 - sigma)) - process.timestep_mean) / process.timestep_std
    return np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in deviations])


def kolmogorov_smirnov(distribution: np.ndarray) -> float:
    """Largest distance between the empirical distribution of draws and theirs, times sqrt(n); over 1.95 in 0.1 %."""
    values, count = np.sort(distribution), len(distribution)
    steps = np.arange(count + 1) / count
    distance = max((steps[1:] - values).max(), (values - steps[:-1]).max())
    return math.sqrt(count) * distance


@pytest.mark.parametrize("process", FLOWS, ids=str)
def test_flow_timesteps_follow_their_density(process: RectifiedFlow) -> None:
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    draws = process.timestep_from_uniform(u).double().numpy()
    assert kolmogorov_smirnov(flow_distribution(process, draws)) < 1.95


@pytest.mark.parametrize("process", FLOWS, ids=str)
def test_capped_flow_timesteps_follow_the_truncated_density(process: RectifiedFlow) -> None:
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    draws = process.timestep_from_uniform(u, torch.ones(20_000, dtype=torch.bool)).double().numpy()
    below_limit = flow_distribution(process, np.array([process.noise_limit]))
    assert draws.max() <= process.noise_limit
    assert kolmogorov_smirnov(flow_distribution(process, draws) / below_limit) < 1.95


@pytest.mark.parametrize("process", FLOWS, ids=str)
def test_flow_timesteps_invert_the_distribution(process: RectifiedFlow) -> None:
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    uncapped = process.timestep_from_uniform(u).numpy()
    np.testing.assert_allclose(flow_distribution(process, uncapped), u.numpy(), atol=1e-12)
    capped = process.timestep_from_uniform(u, torch.ones(999, dtype=torch.bool)).numpy()
    below_limit = flow_distribution(process, np.array([process.noise_limit]))
    np.testing.assert_allclose(flow_distribution(process, capped), u.numpy() * below_limit, atol=1e-12)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shift_moves_each_draw_by_its_formula(shift: float) -> None:
    u = torch.rand(1000, dtype=torch.float64)
    sigma = RectifiedFlow().timestep_from_uniform(u) / 1000
    shifted = RectifiedFlow(timestep_shift=shift).timestep_from_uniform(u) / 1000
    torch.testing.assert_close(shifted, shift * sigma / (1 + (shift - 1) * sigma), rtol=0, atol=1e-14)


@pytest.mark.parametrize("process", FLOWS, ids=str)
def test_flow_timesteps_reach_from_zero_to_the_limits(process: RectifiedFlow) -> None:
    u = torch.tensor([0.0, LARGEST_BELOW_ONE])
    uncapped = process.timestep_from_uniform(u)
    capped = process.timestep_from_uniform(u, torch.tensor([True, True]))
    assert uncapped[0] == capped[0] == 0
    assert 0.96 * process.num_train_timesteps < uncapped[1] <= process.num_train_timesteps
    assert 0.99999 * process.noise_limit < capped[1] <= process.noise_limit == process.num_train_timesteps / 2


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_ddpm_timesteps_are_uniform_integers(length: int) -> None:
    process, limit = DDPM(length), (length + 1) // 2
    count = 10 * length * limit
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    draws = process.timestep_from_uniform(u)
    capped = process.timestep_from_uniform(u, torch.ones(count, dtype=torch.bool))
    assert draws.dtype == capped.dtype == torch.long
    assert draws.bincount().tolist() == [count // length] * length
    assert capped.bincount().tolist() == [count // limit] * limit
    assert process.noise_limit == limit - 1


def test_ddpm_timesteps_stop_at_999_and_499() -> None:
    u = torch.tensor([0.0, 0.0, LARGEST_BELOW_ONE, LARGEST_BELOW_ONE])
    capped = torch.tensor([False, True, False, True])
    assert DDPM().timestep_from_uniform(u, capped).tolist() == [0, 0, 999, 499]
    assert DDPM().noise_limit == 499
    assert RectifiedFlow().noise_limit == 500.0


@pytest.mark.parametrize("process", FLOWS, ids=str)
@pytest.mark.parametrize("share", [0.2, 0.8, 1.0])
def test_another_share_truncates_the_density_of_flow_there(process: RectifiedFlow, share: float) -> None:
    process = dataclasses.replace(process, limited_share=share)
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    capped = process.timestep_from_uniform(u, torch.ones(999, dtype=torch.bool)).numpy()
    below_limit = flow_distribution(process, np.array([share * process.num_train_timesteps]))
    np.testing.assert_allclose(flow_distribution(process, capped), u.numpy() * below_limit, atol=1e-12)


@pytest.mark.parametrize(("share", "limit"), [(0.2, 200), (0.9995, 1000), (1.0, 1000), (0.0001, 1)])
def test_another_share_limits_ddpm_to_as_many_timesteps(share: float, limit: int) -> None:
    process = DDPM(limited_share=share)
    u = (torch.arange(10 * limit, dtype=torch.float64) + 0.5) / (10 * limit)
    capped = process.timestep_from_uniform(u, torch.ones(len(u), dtype=torch.bool))
    assert capped.bincount().tolist() == [10] * limit


@pytest.mark.parametrize("objective", PROCESSES)
def test_a_config_sets_the_share(objective: str) -> None:
    for share in (0.25, 1.0):
        process = noise_process_of(TransfusionConfig(objective=objective, noise_limit=share))
        assert process.limited_share == share
    with pytest.raises(ValueError, match="noise_limit is 0"):
        make_noise_process(objective, noise_limit=0)


@pytest.mark.parametrize("objective", PROCESSES)
def test_only_capped_images_are_capped(objective: str) -> None:
    process = PROCESSES[objective]
    u = torch.linspace(0, 0.999, 100)
    capped = torch.arange(100) % 2 == 0
    draws = process.timestep_from_uniform(u, capped)
    assert torch.equal(draws[~capped], process.timestep_from_uniform(u)[~capped])
    assert torch.equal(draws[capped], process.timestep_from_uniform(u, torch.ones_like(capped))[capped])
    assert draws[capped].max() <= process.noise_limit < draws[~capped].max()


def test_half_precision_numbers_are_drawn_from_in_float32() -> None:
    u = torch.tensor([0.66796875], dtype=torch.bfloat16)
    assert DDPM().timestep_from_uniform(u).tolist() == [667]
    assert RectifiedFlow(timestep_density="uniform").timestep_from_uniform(u).tolist() == [667.96875]


# What is refused.


@pytest.mark.parametrize(
    ("process", "timestep", "message"),
    [
        (DDPM(), torch.tensor([0.0, 5.0]), r"dtype torch.float32; the objective ddpm takes integers from 0 to 999"),
        (DDPM(), torch.tensor([True]), r"dtype torch.bool; the objective ddpm takes integers"),
        (DDPM(), torch.tensor([0, 1000]), r"\[0, 1000\]; give values from 0 to 999"),
        (DDPM(), torch.tensor([-1, 3]), r"\[-1, 3\]; give values from 0 to 999"),
        (DDPM(100), torch.tensor([100]), r"\[100, 100\]; give values from 0 to 99"),
        (RectifiedFlow(), torch.tensor([0.0, 1000.5]), r"\[0.0, 1000.5\]; give values from 0 to 1000"),
        (RectifiedFlow(), torch.tensor([-0.5]), r"\[-0.5, -0.5\]; give values from 0 to 1000"),
        (RectifiedFlow(), torch.tensor([math.nan]), r"\[nan, nan\]; give values from 0 to 1000"),
        (RectifiedFlow(), torch.tensor([False]), r"dtype torch.bool; the objective flow takes real numbers"),
    ],
)
def test_bad_timesteps_are_refused(process: NoiseProcess, timestep: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process.validate_timesteps(timestep)


def test_good_timesteps_are_accepted() -> None:
    DDPM().validate_timesteps(torch.tensor([0, 999]))
    RectifiedFlow().validate_timesteps(torch.tensor([0.0, 0.1, 1000.0]))
    RectifiedFlow().validate_timesteps(torch.tensor([0, 1000]))


def test_make_noise_process_passes_every_field() -> None:
    assert make_noise_process("ddpm", num_train_timesteps=50, timestep_shift=3.0) == DDPM(50)
    fields: dict[str, Any] = {
        "num_train_timesteps": 50,
        "timestep_density": "uniform",
        "timestep_mean": 1.0,
        "timestep_std": 2.0,
        "timestep_shift": 3.0,
    }
    assert make_noise_process("flow", **fields) == RectifiedFlow(**fields)
    assert make_noise_process("flow") == RectifiedFlow()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_noise_process("edm"), r"objective is 'edm'; allowed: ddpm, flow"),
        (lambda: make_noise_process("ddpm", 0), r"num_train_timesteps is 0; give 1 or more"),
        (lambda: RectifiedFlow(timestep_density="cosine"), r"'cosine'; allowed: 'logit_normal', 'uniform'"),
        (lambda: RectifiedFlow(timestep_std=0.0), r"timestep_std is 0.0; give a number above 0"),
        (lambda: RectifiedFlow(timestep_shift=-1.0), r"timestep_shift is -1.0; give a number above 0"),
        (lambda: make_scheduler("edm"), r"objective is 'edm'; allowed: ddpm, flow"),
        (lambda: make_scheduler("flow", "DDIMScheduler"), r"'DDIMScheduler'; allowed with the objective flow: FlowM"),
        (lambda: make_scheduler("ddpm", shift=3.0), r"shift is 3.0; the objective ddpm has none"),
    ],
)
def test_bad_choices_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Schedulers.


def test_default_schedulers_are_ddim_and_euler() -> None:
    assert type(make_scheduler("ddpm")) is diffusers.DDIMScheduler
    assert type(make_scheduler("flow")) is diffusers.FlowMatchEulerDiscreteScheduler
    assert make_scheduler("flow", shift=3.0).config.shift == 3.0


@pytest.mark.parametrize("name", SCHEDULERS["ddpm"])
def test_ddpm_schedulers_are_set_for_latents(name: str) -> None:
    scheduler = make_scheduler("ddpm", name)
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.timestep_spacing == "leading"
    assert not scheduler.config.get("clip_sample", False)
    assert "clip_sample" not in scheduler.config.get("_unexpected", {})


@pytest.mark.parametrize("name", SCHEDULERS["ddpm"])
def test_a_small_error_of_the_prediction_stays_small(name: str) -> None:
    """Data N(0.5, 0.5^2), the exact prediction and 3 % of error: samples keep their deviation (trailing: 9.3)."""
    scheduler = make_scheduler("ddpm", name)
    scheduler.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    x, error = torch.randn(2, 1, 100, 100, generator=generator)
    for timestep in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[timestep]
        prediction = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * 0.5) / (alpha_bar * 0.25 + 1 - alpha_bar)
        x = scheduler.step(prediction + 0.03 * error, timestep, x).prev_sample
    assert x.mean() == pytest.approx(0.5, abs=0.05)
    assert x.std() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("objective", "name"), ALL_SCHEDULERS)
def test_schedulers_take_the_length_of_the_schedule(objective: str, name: str) -> None:
    scheduler = make_scheduler(objective, name, num_train_timesteps=100)
    scheduler.set_timesteps(10)
    make_noise_process(objective, num_train_timesteps=100).validate_timesteps(scheduler.timesteps)
    assert scheduler.timesteps[0] == {"ddpm": 90, "flow": 100}[objective]


@pytest.mark.parametrize(("objective", "name"), ALL_SCHEDULERS)
def test_check_scheduler_tells_the_objectives_apart(objective: str, name: str) -> None:
    scheduler = make_scheduler(objective, name)
    check_scheduler(scheduler, objective)
    other = {"ddpm": "flow", "flow": "ddpm"}[objective]
    with pytest.raises(ValueError, match=rf"{name} takes the prediction .*make_scheduler\('{other}'\)"):
        check_scheduler(scheduler, other)


def test_check_scheduler_takes_what_fits_and_no_more() -> None:
    ddpm = make_scheduler("ddpm")
    check_scheduler(diffusers.EulerDiscreteScheduler.from_config(ddpm.config), "ddpm")
    solver = diffusers.DPMSolverMultistepScheduler
    check_scheduler(solver(prediction_type="flow_prediction", use_flow_sigmas=True), "flow")
    for scheduler in (
        diffusers.DDIMScheduler.from_config(ddpm.config, prediction_type="v_prediction"),
        diffusers.DDIMScheduler.from_config(ddpm.config, beta_schedule="linear"),
        solver.from_config(ddpm.config, prediction_type="flow_prediction", use_flow_sigmas=True),
    ):
        with pytest.raises(ValueError, match="takes the prediction"):
            check_scheduler(scheduler, "ddpm")
    with pytest.raises(ValueError, match="allowed: ddpm, flow"):
        check_scheduler(ddpm, "edm")


def test_check_scheduler_compares_the_schedule_itself() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000).numpy()
    with pytest.raises(ValueError, match="alphas_cumprod .* differ .* by up to 0.[0-9]+"):
        check_scheduler(
            diffusers.DDIMScheduler.from_config(make_scheduler("ddpm").config, trained_betas=betas), "ddpm"
        )


@pytest.mark.parametrize(("objective", "name"), ALL_SCHEDULERS)
def test_check_scheduler_compares_the_length_with_the_model(objective: str, name: str) -> None:
    scheduler = make_scheduler(objective, name, num_train_timesteps=500)
    check_scheduler(scheduler, objective, 500)
    with pytest.raises(ValueError, match=r"num_train_timesteps=500.*was trained on 1000.*num_train_timesteps=1000"):
        check_scheduler(scheduler, objective, 1000)


@pytest.mark.parametrize("option", ["invert_sigmas", "use_dynamic_shifting"])
def test_flow_options_of_other_models_are_refused(option: str) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{option: True})
    with pytest.raises(ValueError, match=rf"{option}=True.*from_config\(scheduler.config, {option}=False\)"):
        check_scheduler(scheduler, "flow")
    check_scheduler(diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **{option: False}), "flow")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("UnCLIPScheduler", "takes prev_timestep for a step"),
        ("RePaintScheduler", "takes mask, original_image for a step"),
        ("DDIMInverseScheduler", "has no step from noise to a picture"),
        ("ScoreSdeVeScheduler", "has no step from noise to a picture"),
        ("IPNDMScheduler", "has no alphas_cumprod"),
        ("EDMEulerScheduler", "has no alphas_cumprod"),
    ],
)
def test_schedulers_of_other_samplings_are_refused(name: str, words: str) -> None:
    scheduler = getattr(diffusers, name).from_config(make_scheduler("ddpm").config)
    with pytest.raises(ValueError, match=f"{name} {words}.*make_scheduler"):
        check_scheduler(scheduler, "ddpm")


@pytest.mark.parametrize("name", ["DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "SASolver", "UniPC"])
def test_flow_options_that_part_noise_levels_from_timesteps_are_refused(name: str) -> None:
    scheduler_class = getattr(diffusers, f"{name}{'Multistep' * (name == 'UniPC')}Scheduler")
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = scheduler_class.from_config(make_scheduler("flow", shift=2.0).config, flow_shift=2.0, **flow)
    check_scheduler(scheduler, "flow")
    for option in ("use_exponential_sigmas", *(() if name == "UniPC" else ("use_karras_sigmas",))):
        with pytest.raises(ValueError, match="noise level 157.4 at timestep 999, where this model's is 0.999"):
            check_scheduler(scheduler_class.from_config(scheduler.config, **{option: True}), "flow")


@pytest.mark.parametrize(("objective", "name"), [("ddpm", "LCMScheduler"), ("flow", "FlowMatchLCMScheduler")])
def test_schedulers_for_distilled_models_are_warned_of(
    objective: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    logger.warning_once.cache_clear()
    check_scheduler(make_scheduler(objective), objective)
    assert "distilled" not in caplog.text
    check_scheduler(getattr(diffusers, name).from_config(make_scheduler(objective).config), objective)
    assert f"{name} draws new noise onto each guess" in caplog.text


def is_warned(scheduler: Any, caplog: pytest.LogCaptureFixture) -> bool:
    """Whether `check_scheduler` says that steps begin at the very end."""
    caplog.clear()
    logger.warning_once.cache_clear()
    check_scheduler(scheduler, "ddpm", 1000)
    return "begins at timestep 99" in caplog.text


def test_steps_that_begin_where_an_error_grows_most_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    leading = make_scheduler("ddpm").config
    for _, name in ALL_SCHEDULERS[:4]:
        for spacing, warned in (("leading", False), ("trailing", True), ("linspace", True)):
            scheduler = getattr(diffusers, name).from_config(leading, timestep_spacing=spacing)
            assert is_warned(scheduler, caplog) == warned, (name, spacing)
            assert not warned or f"{name}.from_config(scheduler.config, timestep_spacing='leading')" in caplog.text
    for name in ("DPMSolverSinglestepScheduler", "LCMScheduler", "TCDScheduler"):
        assert is_warned(getattr(diffusers, name).from_config(leading), caplog), name
        assert "DDIMScheduler.from_config(scheduler.config, timestep_spacing='leading')" in caplog.text
    for name in ("EulerDiscreteScheduler", "PNDMScheduler", "HeunDiscreteScheduler"):
        assert not is_warned(getattr(diffusers, name).from_config(leading), caplog), name
    karras = {"use_karras_sigmas": True}  # whatever the spacing: 998
    assert is_warned(diffusers.DPMSolverMultistepScheduler.from_config(leading, **karras), caplog)


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_steps_that_clip_are_warned_of(option: str, caplog: pytest.LogCaptureFixture) -> None:
    leading = make_scheduler("ddpm").config
    assert not is_warned(diffusers.DDIMScheduler.from_config(leading), caplog) and "clips" not in caplog.text
    assert not is_warned(diffusers.DDIMScheduler.from_config(leading, **{option: True}), caplog)
    assert f"DDIMScheduler.from_config(scheduler.config, {option}=False)" in caplog.text


MEAN, STD = 0.7, 0.4


def best_prediction(process: NoiseProcess, x_t: Tensor, timestep: Tensor) -> Tensor:
    """The posterior mean of the target at `x_t` for data N(MEAN, STD**2): no network could predict better."""
    alpha, sigma = process.scales(timestep[None], torch.float64)
    residual = (x_t.double() - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    noise, clean = sigma * residual, MEAN + alpha * STD**2 * residual
    prediction = {"noise": noise, "velocity": noise - clean}[process.prediction_type]
    return prediction.to(x_t.dtype)


def sample_gaussian(scheduler: Any, objective: str, start: Tensor, steps: int, **step: Any) -> tuple[Tensor, int]:
    """Draw from `start` with the best predictions; the samples, and how often the network was asked."""
    scheduler.set_timesteps(steps)
    x_t, evaluations = start, 0
    for timestep in scheduler.timesteps:
        prediction = best_prediction(PROCESSES[objective], x_t, timestep)
        x_t = scheduler.step(prediction, timestep, x_t, **step).prev_sample
        evaluations += 1
    return x_t, evaluations


def exact_sample(objective: str, start: Tensor, timestep: Tensor) -> Tensor:
    """Where the probability-flow ODE carries `start`, taken for a sample at `timestep`."""
    alpha, sigma = PROCESSES[objective].scales(timestep[None], torch.float64)
    return MEAN + STD * (start - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


def sampling_error(objective: str, name: str, steps: int) -> float:
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    scheduler = make_scheduler(objective, name)
    samples, _ = sample_gaussian(scheduler, objective, start, steps)
    return (samples - exact_sample(objective, start, scheduler.timesteps[0])).abs().max().item()


@pytest.mark.parametrize(("objective", "name"), ALL_SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 25])
def test_every_scheduler_asks_the_network_as_often_as_it_says(objective: str, name: str, steps: int) -> None:
    start = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    samples, evaluations = sample_gaussian(make_scheduler(objective, name), objective, start, steps)
    assert samples.shape == start.shape
    assert samples.isfinite().all()
    assert evaluations == (2 * steps - 1 if name == "FlowMatchHeunDiscreteScheduler" else steps)


# Flow matching cuts [1, 0.001] into steps - 1 and takes the rest, too short to matter, at the end. It works in
# float32, so the steps are few enough for truncation to stand far above rounding. DDIM works in float64 here, and its
# spacing is even where the steps divide 1000.
@pytest.mark.parametrize(
    ("objective", "name", "intervals", "extra", "order"),
    [
        ("flow", "FlowMatchEulerDiscreteScheduler", (16, 32, 64, 128), 1, 1),
        ("flow", "FlowMatchHeunDiscreteScheduler", (32, 64, 128), 1, 2),
        ("ddpm", "DDIMScheduler", (20, 40, 100, 200, 500), 0, 1),
    ],
)
def test_order_of_convergence(objective: str, name: str, intervals: tuple[int, ...], extra: int, order: int) -> None:
    errors = [sampling_error(objective, name, count + extra) for count in intervals]
    assert min(errors) > 1e-5
    slope = np.polyfit(np.log(intervals), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.06)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("steps", [20, 25, 40])
def test_multistep_solvers_beat_ddim_at_few_steps(name: str, steps: int) -> None:
    # No order is fitted: the first and last step are of order one on an unbounded log-SNR, and the error changes sign.
    assert sampling_error("ddpm", name, steps) < sampling_error("ddpm", "DDIMScheduler", steps) / 5


def ancestral_moments(steps: int) -> tuple[float, float]:
    """Mean and variance that exact ancestral sampling ends with: each step is affine in `x_t`, plus known noise.

    Ho et al. 2020 (arXiv:2006.11239), equations 6 and 7, with the betas of the steps taken.
    """
    alpha_bar = [slow_alpha_bar(1000)[round(1000 / steps * step) - 1] for step in range(steps, 0, -1)]
    mean, variance = 0.0, 1.0
    for now, then in zip(alpha_bar, [*alpha_bar[1:], 1.0], strict=True):
        beta = 1 - now / then
        of_clean, of_noisy = math.sqrt(then) * beta / (1 - now), math.sqrt(now / then) * (1 - then) / (1 - now)
        gain = math.sqrt(now) * STD**2 / (now * STD**2 + 1 - now)
        slope = of_clean * gain + of_noisy
        mean = slope * mean + of_clean * (1 - gain * math.sqrt(now)) * MEAN
        variance = slope**2 * variance + beta * (1 - then) / (1 - now)
    return mean, variance


def test_ancestral_sampling_draws_the_gaussian() -> None:
    count, steps = 100_000, 100
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    samples, _ = sample_gaussian(make_scheduler("ddpm", "DDPMScheduler"), "ddpm", start, steps, generator=generator)
    mean, variance = ancestral_moments(steps)
    assert samples.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / count))
    assert samples.var().item() == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / count))
    # With every step of the schedule these are the moments of the data.
    assert ancestral_moments(1000) == pytest.approx((MEAN, STD**2), rel=0.01)
