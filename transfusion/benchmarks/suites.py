"""The suites: which systems meet at which workload, and what each measurement costs at least."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import ours, peer, reference, startup
from .floor import FloorStep
from .flops import DTYPES, decoding_bytes, decoding_flops, denoising_flops, training_flops
from .memory import WORKLOADS as MEMORY_WORKLOADS
from .memory import MemoryJob, measure_apart
from .ours import Call
from .reference import PlainTransfusion
from .results import Place, Result
from .timing import Samples, interleave, make_clock, marginal, per_unit
from .workloads import (
    DECODING,
    DENOISING,
    INTERLEAVING,
    ONE_ROW,
    TRAINING,
    Decoding,
    Denoising,
    Size,
    Training,
    num_tokens,
)


SAME_SHAPE, SAME_PARAMETERS = MATCHES = ("shape", "parameters")
STREAMS: dict[str, dict[str, Any]] = {
    "1 stream": {},
    "4 streams, static": {"num_residual_streams": 4, "hyper_connections": "static"},
    "4 streams, dynamic": {"num_residual_streams": 4, "hyper_connections": "dynamic"},
    "4 streams, manifold": {"num_residual_streams": 4, "hyper_connections": "manifold"},
}
NO_CACHE_UP_TO = 64  # tokens of a prompt, as the peer's default way to write takes minutes after longer ones


@dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
        sizes: Of the models.
        matches: `shape` gives ours the peer's width and depth, `parameters` its number of parameters.
        dtypes: `fp32`, `bf16`.
        compiled: Also with compiled layers.
        threads: Of torch.
        rounds: Samples of each.
        warmup: Calls before them.
        with_peer: Whether it is there, and asked for.
        workloads: Only those whose name holds this.
        say: Gets a line for whatever happens.
    """

    sizes: tuple[Size, ...]
    matches: tuple[str, ...] = MATCHES
    dtypes: tuple[str, ...] = ("fp32",)
    compiled: bool = False
    threads: int = 1
    rounds: int = 5
    warmup: int = 2
    with_peer: bool = field(default_factory=peer.is_installed)
    workloads: str = ""
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Candidate:
    """A system ready to be timed, and what a call of it has to do at least."""

    call: Call
    parameters: int | None = None
    flops: int | None = None
    note: str = ""


Candidates = dict[str, Candidate]
Measure = Callable[[Any, Size, str, str], list[Result]]  # of a workload, at a size and a dtype, for a suite


class Bench:
    """Runs suites; each yields its results workload by workload, so that a break loses little."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.clock = make_clock("cpu", options.threads)

    def run(self, suite: str) -> Iterator[list[Result]]:
        """The results of `suite`, a list at a time."""
        if suite in TRAINING:
            return self.each(suite, TRAINING[suite], self.training)
        if suite in ("memory", "startup"):
            return self.peaks() if suite == "memory" else self.starts()
        named: dict[str, tuple[Sequence[Any], Measure]] = {
            "decode": (DECODING, self.decoding),
            "denoise": (DENOISING, self.denoising),
            "interleaved": (INTERLEAVING, self.interleaving),
            "streams": ((ONE_ROW,), self.streams),
            "codec": ((ONE_ROW,), self.codec),
        }
        return self.each(suite, *named[suite])

    def each(self, suite: str, workloads: Sequence[Any], measure: Measure) -> Iterator[list[Result]]:
        """`measure` at every workload, size and dtype."""
        for size in self.options.sizes:
            for dtype in self.options.dtypes:
                for workload in workloads:
                    if self.options.workloads in workload.name:
                        self.options.say(f"{suite}: {workload.name}, {size.name}, {dtype}")
                        yield measure(workload, size, dtype, suite)

    def inners(self, size: Size) -> dict[str, int]:
        """Width of our feed-forward layers by what they match, as a system is called."""
        found = {"": size.inner} if SAME_SHAPE in self.options.matches else {}
        if self.options.with_peer and SAME_PARAMETERS in self.options.matches:
            found[", same parameters"] = ours.matching_inner(size, ours.num_parameters(peer.build(size)))
        return found

    def time(self, candidates: Mapping[str, Call]) -> tuple[dict[str, Samples], dict[str, str]]:
        """Samples of all, and why some have none."""
        failures: dict[str, str] = {}
        options = self.options
        found = interleave(candidates, self.clock, options.rounds, options.warmup, options.say, failures)
        return found, failures

    def measure(self, place: Place, candidates: Candidates, units: int = 1, tokens: int | None = None) -> list[Result]:
        """Time `candidates`, whose calls have `units` each; `tokens` are those of a unit."""
        found, failures = self.time({name: candidate.call for name, candidate in candidates.items()})
        results = []
        for name, candidate in candidates.items():
            samples = per_unit(found[name], units) if name in found else None
            work: dict[str, Any] = {"parameters": candidate.parameters, "flops": candidate.flops}
            note = failures.get(name, candidate.note)
            results.append(Result(place, name, samples, tokens=tokens, **work, note=note))
        return results

    # -- training

    def training(self, workload: Training, size: Size, dtype: str, suite: str) -> list[Result]:
        """A step of every system."""
        candidates: Candidates = {}
        for label, inner in self.inners(size).items():
            candidates |= self.training_systems(workload, size, dtype, label, inner)
        if self.options.with_peer:
            config = ours.make_config(size, workload.longest)
            for name, processing in peer.PROCESSING.items():
                module = peer.build(size, processing)
                step = peer.training_step(module, workload, config, dtype == "bf16")
                candidates[name] = Candidate(step, ours.num_parameters(module))
        candidates["floor"] = self.training_floor(workload, size, dtype)
        place = Place(suite, workload.name, size.name, dtype, "step")
        return self.measure(place, candidates, tokens=workload.tokens)

    def training_systems(self, workload: Training, size: Size, dtype: str, label: str, inner: int) -> Candidates:
        """Ours and the plain model, eager and compiled, with feed-forward layers of width `inner`."""
        config = ours.make_config(size, workload.longest, inner)
        flops = training_flops(size, workload.documents, inner)
        candidates = {}
        for compiled in (False, True) if self.options.compiled else (False,):
            suffix = label + (", compiled" if compiled else "")
            model = ours.for_training(ours.build(config), workload, compiled)
            step = ours.training_step(model, workload, dtype == "bf16")
            candidates[f"ours{suffix}"] = Candidate(step, ours.num_parameters(model), flops)
            if not label:  # the plain model shows the limit at the shape of ours
                plain = PlainTransfusion(config)
                plain = reference.compile_layers(plain) if compiled else plain
                step = reference.training_step(plain, workload, dtype == "bf16")
                candidates[f"plain{suffix}"] = Candidate(step, ours.num_parameters(plain), flops)
        return candidates

    def training_floor(self, workload: Training, size: Size, dtype: str) -> Candidate:
        """Only products and attention, each document by itself."""
        lengths = [num_tokens(document) for document in workload.documents]
        attention = [(lengths.count(length), length, length) for length in sorted(set(lengths))]
        step = FloorStep(size, sum(lengths), attention, DTYPES[dtype], "cpu", backward=True)
        return Candidate(step, flops=training_flops(size, workload.documents), note="causal attention")

    def streams(self, workload: Training, size: Size, dtype: str, suite: str) -> list[Result]:
        """Residual streams, eager and compiled."""
        candidates: Candidates = {}
        for name, overrides in STREAMS.items():
            config = ours.make_config(size, workload.longest, **overrides)
            for compiled in (False, True) if self.options.compiled else (False,):
                model = ours.for_training(ours.build(config), workload, compiled)
                step = ours.training_step(model, workload, dtype == "bf16")
                system = f"ours, {name}{', compiled' if compiled else ''}"
                candidates[system] = Candidate(step, ours.num_parameters(model))
        place = Place(suite, workload.name, size.name, dtype, "step")
        return self.measure(place, candidates, tokens=workload.tokens)

    def codec(self, workload: Training, size: Size, dtype: str, suite: str) -> list[Result]:
        """A step with either codec, and forward and backward of the U-Net alone, whose share of the step it is."""
        candidates: Candidates = {}
        for name in ("linear", "unet"):
            model = ours.for_training(ours.build(ours.make_config(size, workload.longest, patch_codec=name)))
            step = ours.training_step(model, workload, dtype == "bf16")
            candidates[f"ours, {name} codec"] = Candidate(step, ours.num_parameters(model))
            codec = CodecAlone(model, workload, dtype == "bf16")
            parameters = sum(map(ours.num_parameters, codec.halves))
            candidates[f"ours, {name} codec alone"] = Candidate(codec, parameters, note="without its optimizer step")
        place = Place(suite, workload.name, size.name, dtype, "step")
        return self.measure(place, candidates, tokens=workload.tokens)

    # -- sampling

    def samplers(self, size: Size, length: int, dtype: str) -> Iterator[tuple[str, Any, int]]:
        """(name, model, inner width) of ours and the plain model, in `dtype`."""
        for label, inner in self.inners(size).items():
            config = ours.make_config(size, length, inner)
            model = ours.build(config).eval().to(DTYPES[dtype])
            yield f"ours{label}", model, inner
            if not label:
                plain = PlainTransfusion(config).take_weights(model.state_dict())
                yield "plain", plain.eval().to(DTYPES[dtype]), inner

    def peer_call(self, call: Callable[..., Any], dtype: str) -> Callable[..., Any]:
        """`call` under autocast where the others have weights in bfloat16, which the peer cannot run."""

        def run(*args: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                return call(*args)

        return run

    def decoding(self, workload: Decoding, size: Size, dtype: str, suite: str) -> list[Result]:
        """The cost of a token for each row, and of whole calls."""
        writers: dict[str, tuple[Callable[[int], Any], int, int | None]] = {}
        length = workload.prompt + workload.more + 1
        for name, model, inner in self.samplers(size, length, dtype):
            ids = ours.prompts(workload.batch, workload.prompt)
            call: Callable[[int], Any] = functools.partial(ours.write, model, workload)
            if isinstance(model, PlainTransfusion):
                call = functools.partial(model.write, ids)
            writers[name] = (call, ours.num_parameters(model), inner)
        if self.options.with_peer:
            module = peer.build(size).eval()
            for name, write in self.peer_writers(workload).items():
                call = functools.partial(self.peer_call(write, dtype), module, workload)
                writers[name] = (call, ours.num_parameters(module), None)
        return self.measure_writers(writers, workload, size, dtype, suite)

    def peer_writers(self, workload: Decoding) -> dict[str, Callable[..., Any]]:
        """Its ways to write."""
        writers: dict[str, Callable[..., Any]] = {"peer, generate_text_only": peer.write_text_only}
        if workload.batch > 1:
            writers["peer, sample_many"] = peer.write_many
        else:
            writers["peer, sample_one cached"] = peer.write_one
            if workload.prompt <= NO_CACHE_UP_TO:
                writers["peer, its defaults"] = functools.partial(peer.write_one, cache_kv=False)
        return writers

    def measure_writers(
        self,
        writers: Mapping[str, tuple[Callable[[int], Any], int, int | None]],
        workload: Decoding,
        size: Size,
        dtype: str,
        suite: str,
    ) -> list[Result]:
        """Time calls of `fewer` and of `more` tokens; their difference is the cost of the tokens between."""
        pair, batch = (workload.fewer, workload.more), workload.batch
        calls = {
            f"{name}, {tokens}": functools.partial(call, tokens)
            for name, (call, *_) in writers.items()
            for tokens in pair
        }
        found, failures = self.time(calls)
        length = workload.prompt + sum(pair) // 2
        one = Place(suite, workload.name, size.name, dtype, "token")
        whole = replace(one, unit=f"call of {pair[1]} tokens, with its prompt")
        results = []
        for name, (_, parameters, inner) in writers.items():
            fewer, more = (found.get(f"{name}, {tokens}") for tokens in pair)
            each = marginal(more, fewer, pair[1] - pair[0]) if more and fewer else None
            work: dict[str, Any] = {"parameters": parameters, "note": failures.get(f"{name}, {pair[1]}", "")}
            results.append(Result(whole, name, more, tokens=pair[1] * batch, **work))
            if inner is not None:
                work["flops"] = decoding_flops(size, length, batch, inner)
                work["bytes"] = decoding_bytes(size, length, batch, DTYPES[dtype].itemsize, inner)
            results.append(Result(one, name, each, tokens=batch, **work))
        return results

    def denoising(self, workload: Denoising, size: Size, dtype: str, suite: str) -> list[Result]:
        """The cost of an evaluation for all images of the batch, prompt and scheduler included."""
        patches, prefixes = workload.patches, workload.prefixes
        candidates: Candidates = {}
        for name, model, inner in self.samplers(size, prefixes[0] + patches + 1, dtype):
            flops = denoising_flops(size, prefixes, patches, inner)
            candidates[name] = Candidate(drawing_call(model, workload), ours.num_parameters(model), flops)
            if self.options.compiled:
                (reference.compile_layers if name == "plain" else compile_ours)(compiled := again(model))
                candidates[f"{name}, compiled"] = Candidate(
                    drawing_call(compiled, workload), ours.num_parameters(model), flops
                )
        if self.options.with_peer:
            candidates |= self.peer_drawers(workload, size, dtype)
        attention = [(prefixes.count(prefix), patches, prefix + patches) for prefix in sorted(set(prefixes))]
        step = FloorStep(size, len(prefixes) * patches, attention, DTYPES[dtype], "cpu", backward=False)
        floor_flops = denoising_flops(size, prefixes, patches)
        candidates["floor"] = Candidate(functools.partial(repeatedly, step, workload.evaluations), None, floor_flops)
        place = Place(suite, workload.name, size.name, dtype, "evaluation")
        return self.measure(place, candidates, workload.evaluations)

    def peer_drawers(self, workload: Denoising, size: Size, dtype: str) -> Candidates:
        """Its ways to draw, with the evaluations that they make, counted."""
        module = peer.build(size).eval()
        ways = {"peer, sample_many": functools.partial(peer.draw, many=True)}
        if workload.batch == 1:
            ways["peer, sample_one cached"] = functools.partial(peer.draw, many=False)
            ways["peer, its defaults"] = functools.partial(peer.draw, many=False, cache_kv=False)
        candidates = {}
        for name, way in ways.items():
            call = functools.partial(self.peer_call(way, dtype), module, workload)
            note = f"{peer.count_evaluations(module, call)} passes of its transformer a call"
            candidates[name] = Candidate(call, ours.num_parameters(module), note=note)
        return candidates

    def interleaving(self, workload: Any, size: Size, dtype: str, suite: str) -> list[Result]:
        """An image and text, in one call."""
        length = workload.prompt + workload.grid[0] * workload.grid[1] + workload.tokens + 3
        candidates: Candidates = {}
        for name, model, _ in self.samplers(size, length, dtype):
            if name != "plain":
                call = functools.partial(ours.interleave, model, workload)
                candidates[name] = Candidate(call, ours.num_parameters(model))
        if self.options.with_peer:
            module = peer.build(size).eval()
            for name, cached in (("peer, cached", True), ("peer, its defaults", False)):
                call = functools.partial(self.peer_call(peer.interleave, dtype), module, workload, cached)
                candidates[name] = Candidate(call, ours.num_parameters(module))
        place = Place(suite, workload.name, size.name, dtype, "call")
        return self.measure(place, candidates)

    # -- in processes of their own

    def peaks(self) -> Iterator[list[Result]]:
        """Memory that training steps take."""
        for size in self.options.sizes:
            for dtype in self.options.dtypes:
                for key, workload in MEMORY_WORKLOADS.items():
                    if self.options.workloads not in workload.name:
                        continue
                    self.options.say(f"memory: {workload.name}, {size.name}, {dtype}")
                    place = Place("memory", workload.name, size.name, dtype, "MB")
                    jobs = self.memory_jobs(size, key, dtype == "bf16")
                    yield [self.memory_result(place, name, job) for name, job in jobs.items()]

    def memory_jobs(self, size: Size, workload: str, bf16: bool) -> dict[str, MemoryJob]:
        """By system."""
        jobs = {}
        for label, inner in self.inners(size).items():
            job = functools.partial(MemoryJob, size=size.name, workload=workload, inner=inner, bf16=bf16)
            jobs[f"ours{label}"] = job("ours")
            jobs[f"ours{label}, checkpointed"] = job("ours", checkpointed=True)
            if not label:
                jobs["plain"] = job("plain")
        if self.options.with_peer:
            jobs["peer"] = MemoryJob("peer", size.name, workload, bf16=bf16)
        return jobs

    def memory_result(self, place: Place, name: str, job: MemoryJob) -> Result:
        """Run one job."""
        try:
            found = measure_apart(job)
        except RuntimeError as error:
            self.options.say(f"  {name}: {error}")
            return Result(place, name, samples=None, note=str(error)[:160])
        self.options.say(f"  {name}: {found['megabytes']:.0f} MB")
        return Result(place, name, Samples([found["megabytes"]]), parameters=int(found["parameters"]))

    def starts(self) -> Iterator[list[Result]]:
        """Imports, and loading each size."""
        self.options.say("startup: imports")
        statements = startup.IMPORTS | (startup.PEER_IMPORT if self.options.with_peer else {})
        imports = startup.time_imports(self.options.rounds, statements)
        place = Place("startup", "import in a fresh process", "", "", "import")
        yield [Result(place, name, samples) for name, samples in imports.items()]
        for size in self.options.sizes:
            self.options.say(f"startup: a checkpoint of {size.name}")
            place = Place("startup", "a checkpoint", size.name, "", "load")
            yield startup.in_folder(functools.partial(self.loading, place, size))

    def loading(self, place: Place, size: Size, folder: Path) -> list[Result]:
        """Time the loaders of `size`."""
        calls = startup.loaders(size, folder, self.options.with_peer)
        return self.measure(place, {name: Candidate(call) for name, call in calls.items()})


class CodecAlone:
    """Forward and backward of a patch codec on the images of a batch."""

    def __init__(self, model: Any, workload: Training, bf16: bool) -> None:
        batch = ours.make_collator(model.config)(ours.make_rows(workload.documents, model.config))
        self.inputs = (batch["timesteps"], batch["image_grids"])
        self.patches, self.bf16 = batch["latent_patches"], bf16
        self.halves = (model.model.patch_encoder, model.patch_decoder)

    def __call__(self) -> None:
        """Run once."""
        encode, decode = self.halves
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            hidden, skips = encode(self.patches, *self.inputs)
            loss = decode(hidden, skips, *self.inputs).float().square().mean()
        loss.backward()
        for half in self.halves:
            half.zero_grad()


def repeatedly(call: Call, times: int) -> None:
    """Call it so often."""
    for _ in range(times):
        call()


def drawing_call(model: Any, workload: Denoising) -> Call:
    """A call that draws what `workload` says."""
    if not isinstance(model, PlainTransfusion):
        return functools.partial(ours.draw, model, workload)
    ids = ours.prompts(workload.batch, workload.prompt)
    begun = torch.cat([ids, torch.full_like(ids[:, :1], model.config.boi_token_id)], dim=1)
    noise = torch.randn(
        workload.batch, workload.patches, model.config.patch_dim, generator=torch.Generator().manual_seed(0)
    )
    return functools.partial(model.draw, begun, noise, workload.evaluations, workload.guidance)


def again(model: Any) -> Any:
    """A copy with the same weights."""
    dtype = next(model.parameters()).dtype
    copy = PlainTransfusion(model.config) if isinstance(model, PlainTransfusion) else ours.build(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype).eval()


def compile_ours(model: Any) -> Any:
    """Compile the layers of our model."""
    model.compile_layers()
    return model


__all__ = ["MATCHES", "STREAMS", "Bench", "Candidate", "CodecAlone", "Options"]
