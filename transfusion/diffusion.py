"""Noise processes: how images are noised in training, what is predicted, and how noise levels are drawn.

`DDPM` is the paper's process (arXiv:2408.11039, section 2.2): cosine schedule, epsilon prediction. `RectifiedFlow` is
the straight path of Liu et al. 2022 (arXiv:2209.03003) with the noise levels of Esser et al. 2024 (arXiv:2403.03206).

A noisy latent is always `x_t = alpha * x_0 + sigma * noise`. Shapes: latents (N, ...), `timestep` (N,), one each.
Scales are computed in float32 at least, whatever the dtype of the latents, and results come in the dtype of `x_0`.
"""

import copy
import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)

PREDICTION_TYPES = ("noise", "clean", "v", "velocity")
SCHEDULERS = {
    "ddpm": ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
    "flow": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
}

# Nichol & Dhariwal 2021 (arXiv:2102.09672), section 3.2.
COSINE_OFFSET = 0.008
MAX_BETA = 0.999

# How far a scheduler's alphas_cumprod may be from the cosine schedule; one rescaled to end in pure noise is by 5e-5.
SCHEDULE_TOLERANCE = 1e-3
# Sampling should not begin below this alpha: that of timestep 997 of 1000.
LOWEST_ALPHA = 0.003


def clean_and_noise(
    prediction: Tensor, prediction_type: str, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve `x_t = alpha * x_0 + sigma * noise` and the meaning of `prediction` for `x_0` and `noise`.

    Args:
        prediction: Any shape.
        prediction_type: `"noise"`, `"clean"`, `"v"` (`alpha * noise - sigma * x_0`, Salimans & Ho 2022,
            arXiv:2202.00512) or `"velocity"` (`noise - x_0`). Noise alone does not determine `x_0` where `alpha` is 0,
            nor does clean determine `noise` where `sigma` is 0; near there these two magnify errors by
            `sigma / alpha` and `alpha / sigma`. `v` and velocity determine both everywhere.
        x_t: The noisy latents, in the shape of `prediction`.
        alpha, sigma: Signal and noise scale, broadcastable to `x_t`.

    Raises:
        ValueError: `prediction_type` is another.
    """
    if prediction_type == "noise":
        return (x_t - sigma * prediction) / alpha, prediction
    if prediction_type == "clean":
        return prediction, (x_t - alpha * prediction) / sigma
    if prediction_type == "v":
        square = alpha**2 + sigma**2
        return (alpha * x_t - sigma * prediction) / square, (sigma * x_t + alpha * prediction) / square
    if prediction_type == "velocity":
        return (x_t - sigma * prediction) / (alpha + sigma), (x_t + alpha * prediction) / (alpha + sigma)
    raise ValueError(f"prediction_type is {prediction_type!r}; allowed: {', '.join(PREDICTION_TYPES)}.")


def convert_prediction(
    prediction: Tensor, source: str, target: str, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Turn a prediction of type `source` into the same prediction as type `target`.

    The arguments are those of `clean_and_noise`; it is singular where that is, for `source`, unless `target` is
    `source` or needs only the other one of `x_0` and `noise`.

    Raises:
        ValueError: `source` or `target` is none of `PREDICTION_TYPES`.
    """
    x_0, noise = clean_and_noise(prediction, source, x_t, alpha, sigma)
    if target == "noise":
        return noise
    if target == "clean":
        return x_0
    if target == "v":
        return alpha * noise - sigma * x_0
    if target == "velocity":
        return noise - x_0
    raise ValueError(f"prediction_type is {target!r}; allowed: {', '.join(PREDICTION_TYPES)}.")


@dataclass(frozen=True)
class NoiseProcess(ABC):
    """What `DDPM` and `RectifiedFlow` share.

    Attributes:
        num_train_timesteps: T, the length of the schedule.
        limited_share: Share of the schedule below `noise_limit`.
    """

    num_train_timesteps: int = 1000
    limited_share: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        """Check the schedule."""
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; give 1 or more.")
        if not 0 < self.limited_share <= 1:
            raise ValueError(f"noise_limit is {self.limited_share}; give a share of the schedule above 0, up to 1.")

    @property
    @abstractmethod
    def prediction_type(self) -> str:
        """What the model predicts, one of `PREDICTION_TYPES`."""

    @property
    @abstractmethod
    def noise_limit(self) -> float:
        """The highest timestep of an image that comes before its caption (paper, section 4.3.4)."""

    @abstractmethod
    def scales(self, timestep: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Signal scale alpha and noise scale sigma at `timestep` (N,): two (N,) in `dtype`."""

    @abstractmethod
    def target(self, x_0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the model has to predict, in the shape and dtype of `x_0`."""

    @abstractmethod
    def timestep_from_uniform(self, u: Tensor, capped: Tensor | None = None) -> Tensor:
        """Turn uniform numbers into timesteps by the inverse distribution function of the training density.

        Args:
            u: (N,) in [0, 1).
            capped: (N,) bool; where True the density is cut off at `noise_limit` and rescaled, so that no draws pile
                up on the limit.

        Returns:
            (N,) timesteps, long for `DDPM` and floating for `RectifiedFlow`.
        """

    @abstractmethod
    def validate_timesteps(self, timestep: Tensor) -> None:
        """Raise a `ValueError` where `timestep` is outside the schedule or of a wrong dtype; reads on the host."""

    def add_noise(self, x_0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Noise `x_0` (N, ...) to `timestep` (N,): `alpha * x_0 + sigma * noise`, in the dtype of `x_0`."""
        alpha, sigma = self._scales_like(x_0, timestep)
        return (alpha * x_0 + sigma * noise).to(x_0.dtype)

    def to_clean(self, prediction: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
        """The clean latents that the model's `prediction` at `x_t` (N, ...) stands for.

        Never singular, but under `DDPM` an error of the prediction grows by sigma / alpha, 20,000-fold at t = 999.
        """
        alpha, sigma = self._scales_like(x_t, timestep)
        return convert_prediction(prediction, self.prediction_type, "clean", x_t, alpha, sigma).to(x_t.dtype)

    def to_noise(self, prediction: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
        """The noise that the model's `prediction` at `x_t` (N, ...) stands for; never singular."""
        alpha, sigma = self._scales_like(x_t, timestep)
        return convert_prediction(prediction, self.prediction_type, "noise", x_t, alpha, sigma).to(x_t.dtype)

    def _scales_like(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Scales at `timestep` (N,), shaped to broadcast over the trailing axes of `x` (N, ...)."""
        alpha, sigma = self.scales(timestep, torch.promote_types(x.dtype, torch.float32))
        shape = (-1,) + (1,) * (x.dim() - 1)
        return alpha.view(shape), sigma.view(shape)

    def _check_range(self, timestep: Tensor, highest: int) -> None:
        # Not (all inside) rather than any outside, so that NaN is refused.
        if not ((timestep >= 0) & (timestep <= highest)).all():
            raise ValueError(
                f"timesteps lie in [{timestep.min().item()}, {timestep.max().item()}]; "
                f"give values from 0 to {highest}."
            )


@dataclass(frozen=True)
class DDPM(NoiseProcess):
    """The paper's process (section 2.2): cosine schedule of Nichol & Dhariwal, integer timesteps, noise prediction.

    `alpha**2` is alpha_bar, the running product of `1 - beta` with betas capped at 0.999: diffusers'
    `squaredcos_cap_v2`.
    """

    @property
    def prediction_type(self) -> str:
        """`"noise"`, which diffusers calls epsilon."""
        return "noise"

    @property
    def noise_limit(self) -> int:
        """The last timestep of the lower share: for the half, 499 of 0..999."""
        return math.ceil(self.num_train_timesteps * self.limited_share) - 1

    def scales(self, timestep: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """`sqrt(alpha_bar)` and `sqrt(1 - alpha_bar)` at integer `timestep` (N,): two (N,) in `dtype`.

        The product of uncapped betas telescopes to `cos(a)**2 / cos(b)**2`, with `a` and `b` the angles at
        `timestep` and at the start. Written in sines of what is left and of what has passed, neither scale suffers
        cancellation, so float32 keeps its relative precision at both ends of the schedule, without a table.
        """
        unit = math.pi / 2 / (1 + COSINE_OFFSET)
        start = unit * COSINE_OFFSET
        passed = unit * ((timestep + 1).to(dtype) / self.num_train_timesteps)
        left = unit * ((self.num_train_timesteps - 1 - timestep).to(dtype) / self.num_train_timesteps)
        alpha = torch.sin(left) / math.cos(start)
        sigma = torch.sqrt(torch.sin(passed) * torch.sin(passed + 2 * start)) / math.cos(start)
        # Only the last beta exceeds the cap: it would be 1, the one before is near 3/4.
        is_last = timestep == self.num_train_timesteps - 1
        last = math.sqrt(1 - MAX_BETA) * math.sin(unit / self.num_train_timesteps) / math.cos(start)
        return alpha.masked_fill(is_last, last), sigma.masked_fill(is_last, math.sqrt(1 - last**2))

    def target(self, x_0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The noise (paper, equation 3)."""
        return noise.to(x_0.dtype)

    def timestep_from_uniform(self, u: Tensor, capped: Tensor | None = None) -> Tensor:
        """Uniform integers from `u` (N,) in [0, 1): 0..T-1, and 0..`noise_limit` where `capped` (N,)."""
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        timestep = (u * self.num_train_timesteps).long()
        if capped is None:
            return timestep
        return torch.where(capped, (u * (self.noise_limit + 1)).long(), timestep)

    def validate_timesteps(self, timestep: Tensor) -> None:
        """Raise a `ValueError` unless `timestep` holds integers from 0 to T - 1; reads on the host."""
        if timestep.is_floating_point() or timestep.dtype == torch.bool:
            raise ValueError(
                f"timesteps have dtype {timestep.dtype}; the objective ddpm takes integers from 0 to "
                f"{self.num_train_timesteps - 1}, for example timesteps.long()."
            )
        self._check_range(timestep, self.num_train_timesteps - 1)


@dataclass(frozen=True)
class RectifiedFlow(NoiseProcess):
    """The straight path `x_t = (1 - sigma) * x_0 + sigma * noise` with `sigma = timestep / T`; velocity prediction.

    Attributes:
        num_train_timesteps: T; timesteps are floats in [0, T].
        timestep_density: `"uniform"`, or `"logit_normal"` (Esser et al. 2024, section 3.1): sigma is the sigmoid of a
            normal number of mean `timestep_mean` and standard deviation `timestep_std`.
        timestep_mean, timestep_std: Of the logit-normal density; a higher mean gives more noise.
        timestep_shift: Moves each drawn sigma to `shift * sigma / (1 + (shift - 1) * sigma)` (section 5.3.2); more
            than 1 gives more noise, for larger images.
    """

    timestep_density: str = "logit_normal"
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    timestep_shift: float = 1.0

    def __post_init__(self) -> None:
        """Check the schedule and the density."""
        super().__post_init__()
        if self.timestep_density not in ("logit_normal", "uniform"):
            raise ValueError(f"timestep_density is {self.timestep_density!r}; allowed: 'logit_normal', 'uniform'.")
        for name, value in (("timestep_std", self.timestep_std), ("timestep_shift", self.timestep_shift)):
            if value <= 0:
                raise ValueError(f"{name} is {value}; give a number above 0.")

    @property
    def prediction_type(self) -> str:
        """`"velocity"`, from the image towards the noise."""
        return "velocity"

    @property
    def noise_limit(self) -> float:
        """The end of the lower share: for the half, 500.0 of 1000."""
        return self.num_train_timesteps * self.limited_share

    def scales(self, timestep: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """`1 - sigma` and `sigma` at `timestep` (N,): two (N,) in `dtype`."""
        sigma = timestep.to(dtype) / self.num_train_timesteps
        return 1 - sigma, sigma

    def target(self, x_0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The velocity `noise - x_0`."""
        return (noise - x_0).to(x_0.dtype)

    def timestep_from_uniform(self, u: Tensor, capped: Tensor | None = None) -> Tensor:
        """Timesteps in [0, T] of the density from `u` (N,) in [0, 1), in [0, `noise_limit`] where `capped` (N,)."""
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        if capped is None:
            return self._inverse_cdf(u)
        # The minimum only takes off what rounding adds.
        below = self._inverse_cdf(u * self._probability_below_limit()).clamp(max=self.noise_limit)
        return torch.where(capped, below, self._inverse_cdf(u))

    def validate_timesteps(self, timestep: Tensor) -> None:
        """Raise a `ValueError` unless `timestep` holds numbers from 0 to T; reads on the host."""
        if timestep.is_complex() or timestep.dtype == torch.bool:
            raise ValueError(
                f"timesteps have dtype {timestep.dtype}; the objective flow takes real numbers from 0 to "
                f"{self.num_train_timesteps}."
            )
        self._check_range(timestep, self.num_train_timesteps)

    def _inverse_cdf(self, u: Tensor) -> Tensor:
        sigma = u
        if self.timestep_density == "logit_normal":
            sigma = torch.sigmoid(self.timestep_mean + self.timestep_std * torch.special.ndtri(u))
        sigma = self.timestep_shift * sigma / (1 + (self.timestep_shift - 1) * sigma)
        return sigma * self.num_train_timesteps

    def _probability_below_limit(self) -> float:
        """The probability of a draw below the limit: of a sigma whose odds, which the shift multiplies, are below."""
        if self.limited_share == 1:
            return 1.0
        odds = self.limited_share / (1 - self.limited_share)
        if self.timestep_density == "uniform":
            return 1 / (1 + self.timestep_shift / odds)
        deviations = (math.log(odds) - math.log(self.timestep_shift) - self.timestep_mean) / self.timestep_std
        return math.erfc(-deviations / math.sqrt(2)) / 2


def make_noise_process(
    objective: str,
    num_train_timesteps: int = 1000,
    timestep_density: str = "logit_normal",
    timestep_mean: float = 0.0,
    timestep_std: float = 1.0,
    timestep_shift: float = 1.0,
    noise_limit: float = 0.5,
) -> NoiseProcess:
    """The noise process of a config's `objective`: `DDPM` for `"ddpm"`, `RectifiedFlow` for `"flow"`.

    The remaining arguments are the config's fields; `ddpm` draws its timesteps uniformly and uses only the first.

    Raises:
        ValueError: `objective` is another, or a value is out of its range.
    """
    _check_objective(objective)
    if objective == "ddpm":
        return DDPM(num_train_timesteps, limited_share=noise_limit)
    return RectifiedFlow(
        num_train_timesteps,
        timestep_density,
        timestep_mean,
        timestep_std,
        timestep_shift,
        limited_share=noise_limit,
    )


def noise_process_of(config: Any) -> NoiseProcess:
    """The noise process that a model of `config`, a `TransfusionConfig`, trains with."""
    return make_noise_process(
        config.objective,
        num_train_timesteps=config.num_train_timesteps,
        timestep_density=config.timestep_density,
        timestep_mean=config.timestep_mean,
        timestep_std=config.timestep_std,
        timestep_shift=config.timestep_shift,
        noise_limit=config.noise_limit,
    )


def make_scheduler(
    objective: str, name: str | None = None, shift: float = 1.0, num_train_timesteps: int = 1000
) -> Any:
    """A diffusers scheduler that samples what the model of `objective` has learned.

    Args:
        objective: `"ddpm"` or `"flow"`.
        name: One of `SCHEDULERS[objective]`; by default the first, DDIM or Euler.
        shift: For `flow`: above 1 spends more of the steps at high noise.
        num_train_timesteps: Length of the schedule in training.

    Returns:
        The scheduler. For `ddpm` with the cosine schedule and no clipping of latents, and with leading steps: at the
        very end of the cosine schedule alpha is 5e-5, and a step from there magnifies any error of the prediction
        some hundred times, whereas the last of 50 leading steps, 980, is as good as pure noise. Take a divisor of
        `num_train_timesteps` for the number of steps; others begin lower.

    Raises:
        ValueError: `objective` or `name` is not allowed, or `ddpm` is given a shift.
    """
    import diffusers

    _check_objective(objective)
    allowed = SCHEDULERS[objective]
    name = name or allowed[0]
    if name not in allowed:
        raise ValueError(f"scheduler is {name!r}; allowed with the objective {objective}: {', '.join(allowed)}.")
    scheduler_class = getattr(diffusers, name)
    if objective == "flow":
        return scheduler_class(num_train_timesteps=num_train_timesteps, shift=shift)
    if shift != 1:
        raise ValueError(f"shift is {shift}; the objective ddpm has none, leave it at 1.")
    # The two multistep solvers do not clip and have no such option.
    clipping = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    return scheduler_class(
        num_train_timesteps=num_train_timesteps,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        timestep_spacing="leading",
        **clipping,
    )


def check_scheduler(scheduler: Any, objective: str, num_train_timesteps: int | None = None) -> None:
    """Refuse a diffusers `scheduler` that takes another prediction, or another path of noise, than `objective` gives.

    A `ddpm` scheduler whose steps begin at the very end of the schedule fits, but magnifies errors; one that clips
    fits pixels, but not latents; and one for distilled models draws blurred pictures. These are warned of.

    Args:
        scheduler: The scheduler.
        objective: `"ddpm"` or `"flow"`.
        num_train_timesteps: Length of the model's schedule, which the scheduler's must be; None compares none.

    Raises:
        ValueError: The prediction type, the noise schedule or its length does not fit, an option moves the noise
            levels away from the timesteps, its steps are none from noise to a picture, or `objective` is unknown.
    """
    _check_objective(objective)
    _check_steps(scheduler, objective)
    config, name = scheduler.config, type(scheduler).__name__
    if name.startswith("FlowMatch"):  # these alone have neither entry
        found = ("flow_prediction", "flow")
    else:
        schedule = "flow" if config.get("use_flow_sigmas") else config.get("beta_schedule")
        found = (config.get("prediction_type"), schedule)
    expected = {"ddpm": ("epsilon", "squaredcos_cap_v2"), "flow": ("flow_prediction", "flow")}[objective]
    if found != expected:
        raise ValueError(
            f"{name} takes the prediction {found[0]!r} on the noise schedule {found[1]!r}, but the objective "
            f"{objective} has {expected[0]!r} on {expected[1]!r}; make one with make_scheduler({objective!r}), or "
            "with from_config from the scheduler saved beside the model."
        )
    if num_train_timesteps not in (None, config["num_train_timesteps"]):
        raise ValueError(
            f"{name} has num_train_timesteps={config['num_train_timesteps']}, but the model was trained on "
            f"{num_train_timesteps}; take {name}.from_config(scheduler.config, num_train_timesteps="
            f"{num_train_timesteps})."
        )
    _warn_of_distillation(scheduler)
    if objective == "flow":
        _check_flow_options(scheduler)
        _check_noise_levels(scheduler)
    else:
        _check_cosine_schedule(scheduler)
        _warn_of_the_very_end(scheduler)
        _warn_of_clipping(scheduler)


def _check_steps(scheduler: Any, objective: str) -> None:
    """Refuse what has no step (prediction, timestep, sample) towards the picture, with the next timestep implied."""
    name, step = type(scheduler).__name__, getattr(scheduler, "step", None)
    parameters = {} if step is None else inspect.signature(step).parameters
    taken = {key for key, value in parameters.items() if value.default is value.empty and value.kind < 2}
    foreign = taken - {"model_output", "timestep", "sample"} or parameters.keys() & {"prev_timestep"}
    if foreign or step is None or "Inverse" in name:
        why = f"takes {', '.join(sorted(foreign))} for a step" if foreign else "has no step from noise to a picture"
        raise ValueError(f"{name} {why}; make a scheduler with make_scheduler({objective!r}).")


def _warn_of_distillation(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if "LCM" in name or scheduler.config.get("stochastic_sampling"):
        logger.warning_once(
            f"{name} draws new noise onto each guess of the picture, as models distilled for few steps want it; this "
            "model's pictures it blurs. Take the scheduler saved beside the model."
        )


def _check_noise_levels(scheduler: Any) -> None:
    """Refuse where the noise level of a timestep is not that of the model's schedule."""
    probe, name = copy.deepcopy(scheduler), type(scheduler).__name__
    try:
        probe.set_timesteps(10)
    except Exception as error:  # whatever it lacks
        raise ValueError(f"{name} gives no timesteps: {error!r}; make one with make_scheduler('flow').") from error
    timesteps, sigmas = probe.timesteps.double().cpu(), probe.sigmas.double().cpu()
    length = scheduler.config["num_train_timesteps"]
    expected = timesteps / length
    if not torch.allclose(sigmas[: len(expected)], expected, rtol=0, atol=1.5 / length):  # some round timesteps
        raise ValueError(
            f"{name} has the noise level {sigmas[0]:.4g} at timestep {timesteps[0]:.4g}, where this model's is "
            f"{expected[0]:.4g}; leave its options of sigmas out (use_karras_sigmas, use_exponential_sigmas, ...)."
        )


def _check_flow_options(scheduler: Any) -> None:
    name = type(scheduler).__name__
    for option in ("invert_sigmas", "use_dynamic_shifting"):
        if scheduler.config.get(option):
            raise ValueError(
                f"{name} has {option}=True, with which this model's latents cannot be denoised; take "
                f"{name}.from_config(scheduler.config, {option}=False)."
            )


def _check_cosine_schedule(scheduler: Any) -> None:
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod, so none of the cosine schedule of the objective ddpm; "
            "make a scheduler with make_scheduler('ddpm')."
        )
    found = scheduler.alphas_cumprod.double().cpu()
    alpha, _ = DDPM(len(found)).scales(torch.arange(len(found)), torch.float64)
    if (difference := float((found - alpha**2).abs().max())) > SCHEDULE_TOLERANCE:
        raise ValueError(
            f"alphas_cumprod of {type(scheduler).__name__} differ from the cosine schedule of the objective ddpm by "
            f"up to {difference:.3f}; make a scheduler with make_scheduler('ddpm')."
        )


def _warn_of_the_very_end(scheduler: Any) -> None:
    """Warn where the first step is one of alpha near 0; see `make_scheduler`."""
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(min(10, (scheduler.config["num_train_timesteps"] + 1) // 2))
    first = int(probe.timesteps[0])
    if (alpha := float(probe.alphas_cumprod[first].sqrt())) >= LOWEST_ALPHA:
        return
    name = type(scheduler).__name__
    has_spacing = scheduler.config.get("timestep_spacing") in ("linspace", "trailing")
    logger.warning_once(
        f"{name} begins at timestep {first}, where it divides errors of the prediction by {alpha:.1g}, and may draw "
        f"nothing but noise. Take {name if has_spacing else 'DDIMScheduler'}.from_config(scheduler.config, "
        "timestep_spacing='leading')."
    )


def _warn_of_clipping(scheduler: Any) -> None:
    """Warn where every step clips to [-1, 1], as DDIM and DDPM do by default: right for pixels, wrong for latents."""
    name = type(scheduler).__name__
    for option in ("clip_sample", "thresholding"):
        if scheduler.config.get(option):
            logger.warning_once(
                f"{name} has {option}=True and clips each step, which spoils latents. Unless pixels are the latents, "
                f"take {name}.from_config(scheduler.config, {option}=False)."
            )


def _check_objective(objective: str) -> None:
    if objective not in SCHEDULERS:
        raise ValueError(f"objective is {objective!r}; allowed: {', '.join(SCHEDULERS)}.")


__all__ = [
    "DDPM",
    "PREDICTION_TYPES",
    "SCHEDULERS",
    "NoiseProcess",
    "RectifiedFlow",
    "check_scheduler",
    "clean_and_noise",
    "convert_prediction",
    "make_noise_process",
    "make_scheduler",
    "noise_process_of",
]
