"""What has to hold before anything is timed: a fast model that computes something else is no fast model."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import ours
from .reference import PlainTransfusion
from .workloads import MIXED, PACKED, PATCH_DIM, ROW, Decoding, Denoising, Size, num_tokens


LIMIT = 1e-5  # relative, in float32
LIMITS = {"cpu": LIMIT, "cuda": 10 * LIMIT}  # whose fused kernels add in other orders


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference, relative to the largest number."""

    name: str
    error: float
    limit: float = LIMIT

    @property
    def holds(self) -> bool:
        """Whether the two agree; a NaN does not."""
        return self.error <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"holds": self.holds}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number of `expected`."""
    if found.shape != expected.shape:
        return float("inf")
    scale = expected.abs().max().clamp(min=1e-12)
    return float((found - expected).abs().max() / scale)


def batch_of(model: Any, packed_length: int | None = None) -> dict[str, Any]:
    """The mixed documents as a training batch, with the noise that each has by its seed."""
    rows = [row | {"sample_seed": index} for index, row in enumerate(ours.make_rows(MIXED, model.config))]
    return ours.to_device(ours.make_collator(model.config, packed_length, text_dropout=0.0)(rows), str(model.device))


def same_as_plain(model: Any, plain: PlainTransfusion) -> list[Check]:
    """Loss and predicted velocities of a padded training batch."""
    batch = batch_of(model)
    with torch.no_grad():
        outputs = model(**batch, skip_logits=True, use_cache=False)
        _, _, velocity = plain.predictions(batch)
        return [
            Check("training loss as the plain model's", relative_error(outputs.loss, plain.loss(batch))),
            Check("predicted velocities as the plain model's", relative_error(outputs.image_prediction, velocity)),
        ]


def packed_as_separate(model: Any) -> list[Check]:
    """Loss of documents in packed rows and in rows of their own."""
    with torch.no_grad():
        separate, packed = (
            model(**batch_of(model, length), skip_logits=True, use_cache=False).loss
            for length in (None, max(map(num_tokens, MIXED)))
        )
    return [Check("packed rows as separate ones", relative_error(packed, separate))]


def cached_as_full(model: Any) -> list[Check]:
    """Logits of single tokens on a cache, and those of all at once."""
    ids = ours.prompts(2, 24, str(model.device))
    with torch.no_grad():
        full = model(input_ids=ids).logits
        outputs = model(input_ids=ids[:, :8], use_cache=True)
        parts = [outputs.logits]
        for place in range(8, ids.shape[1]):
            outputs = model(input_ids=ids[:, place : place + 1], past_key_values=outputs.past_key_values)
            parts.append(outputs.logits)
    return [Check("cached decoding as a full pass", relative_error(torch.cat(parts, dim=1), full))]


def sampled_as_plain(model: Any, plain: PlainTransfusion) -> list[Check]:
    """What is written greedily and what is drawn with guidance, beside the plain model's."""
    text, image = Decoding("", 2, 12), Denoising("", 2, 12, 3.0, evaluations=4, grid=(4, 4))
    written = ours.write(model, text, 8)[:, text.prompt :]
    ids = ours.prompts(2, 12, str(model.device))
    noise = torch.randn(2, 16, PATCH_DIM, generator=torch.Generator().manual_seed(0)).to(model.device)
    begun = torch.cat([ids, torch.full_like(ids[:, :1], model.config.boi_token_id)], dim=1)
    drawn = ours.draw(model, image, latents=noise.flatten(0, 1))
    expected = plain.draw(begun, noise, image.evaluations, image.guidance).flatten(0, 1)
    differs = float((written != plain.write(ids, 8)).sum())
    return [
        Check("tokens written as the plain model's", differs),
        Check("images drawn as the plain model's", relative_error(drawn, expected), limit=10 * LIMIT),
    ]


def run_gate(size: Size, device: str = "cpu", say: Callable[[str], None] = lambda line: None) -> list[Check]:
    """All checks on fresh weights of `size`."""
    length = max(num_tokens(ROW), *map(num_tokens, MIXED))
    model = ours.build(ours.make_config(size, length), device)
    plain = PlainTransfusion(model.config).to(device).take_weights(model.state_dict())
    checks = [*cached_as_full(model.eval()), *sampled_as_plain(model, plain)]
    ours.for_training(model)
    checks += same_as_plain(model, plain)
    ours.for_training(model, PACKED)
    checks += packed_as_separate(model)
    checks = [replace(check, limit=check.limit / LIMIT * LIMITS[device]) for check in checks]
    for check in checks:
        say(f"  {'holds' if check.holds else 'FAILS'}: {check.name} ({check.error:.1e}, limit {check.limit:.0e})")
    return checks


def require(checks: Sequence[Check]) -> None:
    """Raise a ValueError where one fails: there are no tables then."""
    if failed := [
        f"{check.name} (error {check.error:.1e}, limit {check.limit:.0e})" for check in checks if not check.holds
    ]:
        raise ValueError(f"No measurement, as these do not hold: {'; '.join(failed)}. Mend the model first.")


__all__ = [
    "Check",
    "cached_as_full",
    "packed_as_separate",
    "relative_error",
    "require",
    "run_gate",
    "same_as_plain",
    "sampled_as_plain",
]
