"""The suite for a GPU: training at 8k tokens, what the mask costs, decoding and denoising beside the device's limits.

A part that fails leaves a line and its reason, and the next one runs.
"""

import contextlib
import functools
import gc
import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import modeling_transfusion
from . import ours
from .flops import Peak, decoding_bytes, decoding_flops, denoising_flops, training_flops
from .results import Place, Result
from .timing import CudaClock, Samples, WallClock, interleave, marginal, per_unit
from .workloads import (
    GPU_ONE_8K,
    GPU_PACKED_8K,
    GUIDANCE_SCALE,
    SIZES,
    Decoding,
    Denoising,
    Size,
    Training,
)


DEVICE = "cuda"
ROUNDS, WARMUP = 10, 3
NUM_KERNELS = 15
DENOISING = Denoising("8 images of 256 patches, guided", 8, 32, GUIDANCE_SCALE, evaluations=30)
DECODING = Decoding("text, prompt 32, static cache", 1, 32, fewer=32, more=160)


class MasterStep:
    """A step of a model whose weights are bfloat16, with a float32 copy of them that AdamW (fused) learns."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor], batches: Iterator[Any]) -> None:
        self.loss, self.batches = loss, batches
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.masters = [nn.Parameter(weight.detach().float()) for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    def __call__(self) -> Tensor:
        """One step."""
        loss = self.loss(next(self.batches))
        loss.backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return loss.detach()


class MaskWatch:
    """Device seconds that the building of masks takes, while it is entered."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.build = modeling_transfusion.transfusion_mask

    def __enter__(self) -> "MaskWatch":
        modeling_transfusion.transfusion_mask = self.timed
        return self

    def __exit__(self, *_: Any) -> None:
        modeling_transfusion.transfusion_mask = self.build

    def timed(self, *args: Any, **kwargs: Any) -> Any:
        """As the function itself."""
        found: list[Any] = []
        self.seconds.append(CudaClock()(lambda: found.append(self.build(*args, **kwargs))))
        return found[0]


def device_batches(workload: Training, config: Any) -> Iterator[dict[str, Any]]:
    """Batches on the device that take turns; loaders make them while the device is busy."""
    collate = ours.make_collator(config, workload.packed_length)
    rows = [ours.make_rows(workload.documents, config, seed) for seed in range(ours.NUM_BATCHES)]
    return itertools.cycle([ours.to_device(collate(one), DEVICE) for one in rows])


def loss_of(model: Any) -> Callable[[dict[str, Any]], Tensor]:
    """The training loss of a batch."""
    return lambda batch: model(**batch, skip_logits=True, use_cache=False).loss


class GpuBench:
    """Runs the suite; yields results part by part."""

    def __init__(self, peak: Peak, say: Callable[[str], None], only: str = "") -> None:
        self.peak, self.say, self.only = peak, say, only

    def run(self, suite: str) -> Iterator[list[Result]]:
        """All parts."""
        small, large = SIZES["0.3B"], SIZES["1.2B"]
        parts: dict[str, Callable[[], list[Result]]] = {  # the first ones matter most, where time runs out
            "training 1.2B": lambda: self.training(large, pure=(False, True)),
            "denoising 1.2B": lambda: self.denoising(large),
            "decoding 1.2B": lambda: self.decoding(large),
            "training 0.3B": lambda: self.training(small, pure=(False,)),
            "attention 0.3B": lambda: self.attention(small),
        }
        for name, part in parts.items():
            if any(part in name for part in self.only.split(",")):
                start = time.perf_counter()
                yield self.attempt(name, part)
                self.say(f"{name}: {time.perf_counter() - start:.0f} s in all")

    def attempt(self, name: str, part: Callable[[], list[Result]]) -> list[Result]:
        """The results of `part`, or why there are none; the device is empty afterwards."""
        self.say(f"gpu: {name}")
        try:
            return part()
        except Exception as error:  # whatever it is, the time on the device goes to the next part
            self.say(traceback.format_exc())
            note = f"{type(error).__name__}: {error}"[:160]
            return [Result(Place("gpu", name, "", "bf16", "step"), "ours", None, note=note)]
        finally:
            clear()

    # -- training

    def training(self, size: Size, pure: tuple[bool, ...]) -> list[Result]:
        """Packed rows of 8k: float32 weights under autocast, or bfloat16 ones with a float32 copy; and the kernels."""
        results = []
        for is_pure in pure:
            model = self.trainee(GPU_PACKED_8K, size, "flex_attention")
            step = self.make_step(model, GPU_PACKED_8K, is_pure)
            name = "ours, bf16 weights" if is_pure else "ours, autocast"
            results += self.step_results(name, model, step, GPU_PACKED_8K, size)
            if not is_pure:
                results += self.kernels(step, size)
            del model, step
            clear()
        return results

    def trainee(self, workload: Training, size: Size, attention: str) -> Any:
        """A model with compiled layers and this attention."""
        model = ours.build(ours.make_config(size, workload.longest), DEVICE)
        model.set_attn_implementation(attention)
        model.compile_layers()
        return model

    def step_results(
        self, name: str, model: Any, step: Callable[[], Tensor], workload: Training, size: Size
    ) -> list[Result]:
        """Time, work and memory of a step of `model`, and what of it the mask takes."""
        torch.cuda.reset_peak_memory_stats()
        found = interleave({name: step}, CudaClock(), ROUNDS, WARMUP, self.say)[name]
        with MaskWatch() as watch:
            step()
        megabytes = torch.cuda.max_memory_allocated() / 1e6
        note = f"{megabytes:,.0f} MB at the peak, first call {found.first:.0f} s"
        if watch.seconds:
            note += f", mask {1000 * sum(watch.seconds):.2f} ms ({100 * sum(watch.seconds) / found.median:.1f} %)"
        self.say(f"  {name}: {note}")
        work: dict[str, Any] = {"parameters": ours.num_parameters(model)}
        work["flops"] = training_flops(size, workload.documents)
        place = Place("gpu", workload.name, size.name, "bf16", "step")
        return [Result(place, name, found, tokens=workload.tokens, **work, note=note)]

    def make_step(self, model: Any, workload: Training, pure: bool) -> Callable[[], Tensor]:
        """A training step on batches that are on the device."""
        batches = device_batches(workload, model.config)
        if pure:
            return MasterStep(model.train().to(torch.bfloat16), loss_of(model), batches)
        return ours.TrainingStep(model, loss_of(model), batches, bf16=True, device=DEVICE)

    def attention(self, size: Size) -> list[Result]:
        """Fused attention with a dense mask, and blocks that skip what the mask hides, at 8k."""
        results = []
        pairs = ((GPU_ONE_8K, "sdpa"), (GPU_ONE_8K, "flex_attention"), (GPU_PACKED_8K, "sdpa"))
        for workload, implementation in pairs:  # packed rows by blocks are what `training` measures
            model = self.trainee(workload, size, implementation)
            step = self.make_step(model, workload, pure=False)
            with contextlib.suppress(torch.OutOfMemoryError):
                results += self.step_results(f"ours, {implementation}", model, step, workload, size)
            del model, step
            clear()
        return results

    # -- sampling

    def denoising(self, size: Size) -> list[Result]:
        """Guided images, eager and with compiled layers."""
        workload = DENOISING
        length = workload.prompt + workload.patches + 2
        model = ours.build(ours.make_config(size, length), DEVICE).eval().to(torch.bfloat16)
        flops = denoising_flops(size, workload.prefixes, workload.patches)
        place = Place("gpu", workload.name, size.name, "bf16", "evaluation")
        results = []
        for name in ("ours", "ours, compiled"):
            if name != "ours":
                model.compile_layers()
            torch.cuda.reset_peak_memory_stats()
            failures: dict[str, str] = {}
            call = {name: lambda: ours.draw(model, workload)}
            found = interleave(call, CudaClock(), ROUNDS, WARMUP, self.say, failures)
            samples = per_unit(found[name], workload.evaluations) if name in found else None
            note = failures.get(name, f"{torch.cuda.max_memory_allocated() / 1e6:,.0f} MB at the peak")
            results.append(Result(place, name, samples, parameters=ours.num_parameters(model), flops=flops, note=note))
        return results

    def decoding(self, size: Size) -> list[Result]:
        """One row by a growing cache, and by one of fixed size, whose steps transformers compiles into CUDA graphs."""
        workload = DECODING
        model = ours.build(ours.make_config(size, 1024), DEVICE).eval().to(torch.bfloat16)
        length = workload.prompt + (workload.fewer + workload.more) // 2
        work: dict[str, Any] = {
            "parameters": ours.num_parameters(model),
            "flops": decoding_flops(size, length, workload.batch),
            "bytes": decoding_bytes(size, length, workload.batch, itemsize=2),
        }
        results = []
        for name, options in (("ours, growing cache", {}), ("ours, static cache", {"cache_implementation": "static"})):
            pair = (workload.fewer, workload.more)
            # The largest first: a static cache that is too small is made anew, and its graphs with it.
            calls = {
                str(tokens): functools.partial(ours.write, model, workload, tokens, **options)
                for tokens in reversed(pair)
            }
            found = interleave(calls, WallClock(), ROUNDS, WARMUP, self.say)
            each = marginal(found[str(pair[1])], found[str(pair[0])], pair[1] - pair[0])
            place = Place("gpu", workload.name, size.name, "bf16", "token")
            note = f"first call {found[str(pair[1])].first:.0f} s"
            results.append(Result(place, name, each, tokens=workload.batch, **work, note=note))
        return results

    def kernels(self, step: Callable[[], Tensor], size: Size) -> list[Result]:
        """The kernels that take most of a step that is warm."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        events = [event for event in profiler.key_averages() if device_seconds(event) > 0]
        events = sorted(events, key=device_seconds, reverse=True)
        place = Place("gpu", f"kernels of a step, {GPU_PACKED_8K.name}", size.name, "bf16", "step")
        total = sum(map(device_seconds, events))
        return [Result(place, "all kernels", Samples([total]))] + [
            Result(place, event.key[:80], Samples([device_seconds(event)]), note=f"{event.count} calls")
            for event in events[:NUM_KERNELS]
        ]


def device_seconds(event: Any) -> float:
    """What the kernels of a profiler's event took by themselves; operators, which only start them, count nothing."""
    is_kernel = "CUDA" in str(getattr(event, "device_type", ""))
    return event.self_device_time_total / 1e6 if is_kernel else 0.0


def clear() -> None:
    """Empty the device for the next part."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


__all__ = ["GpuBench", "MaskWatch", "MasterStep", "device_batches"]
