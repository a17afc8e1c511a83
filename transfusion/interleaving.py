"""The decoding loop that writes token by token and switches to drawing at begin-of-image (paper, section 3).

Shapes: B rows, L tokens, K begin-of-image tokens, n patches of one image, P patches of all, D patch_dim, V vocabulary.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    TextIteratorStreamer,
)
from transformers.utils import ModelOutput

from .configuration import TransfusionConfig
from .context import Context, Document, Grid, pad_left, read_documents
from .denoising import Drawing, draw_images, draw_noise


# Why a row ended; where several apply at once, the first of these.
FINISH_REASONS = ("eos", "stop", "time", "length")


@dataclass
class TransfusionImageOutput(ModelOutput):
    """Drawn images: `latent_patches` (P, D) and `image_grids` (N, 2), in the order of the prompts."""

    latent_patches: Tensor | None = None
    image_grids: Tensor | None = None


@dataclass
class TransfusionGenerateOutput(ModelOutput):
    """An interleaved generation.

    Attributes:
        sequences: (B, L) prompts and new tokens, padded on the right; each patch holds the image placeholder.
        images: Per row, the patches (n, D) of each image it drew, in order.
        image_grids: Per row, the (rows, columns) of each.
        prompt_length: Length of the prompts in `sequences`.
        finish_reasons: Per row why it ended: "eos", an end-of-sequence token; "stop", a stop string or a stopping
            criterion of the caller; "time", `max_time`; "length", `max_new_tokens` or `max_length`. Where several
            come true with one token, the first of these.
        scores: With `output_scores`, one (B, V) for each token that was chosen: what the logits processors made of
            the logits; zeros where a row has fewer tokens. Patches and end-of-image tokens are not chosen, so they
            have none.
        logits: With `output_logits`, likewise, before the logits processors.
    """

    sequences: Tensor | None = None
    images: list[list[Tensor]] | None = None
    image_grids: list[list[Grid]] | None = None
    prompt_length: int | None = None
    finish_reasons: list[str] | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


class TransfusionStreamer(TextIteratorStreamer):
    """Iterates over an interleaved generation that runs in another thread: strings and pictures, in order.

    Args:
        processor: The model's processor; of it, `tokenizer` and `decode_images` are used.
        skip_prompt: Leave out the text of the prompt.
        timeout: Seconds to wait for the next piece; None waits for ever.
        skip_special_tokens: Leave control tokens out of the text.
        decode_kwargs: Further options of the tokenizer's `decode`.

    Example:
        >>> streamer = TransfusionStreamer(processor, skip_prompt=True)
        >>> Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
        >>> for piece in streamer:  # str or PIL.Image.Image
        ...     display(piece)
    """

    def __init__(
        self,
        processor: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        skip_special_tokens: bool = True,
        **decode_kwargs: Any,
    ) -> None:
        self.token_cache: list[int]
        self.print_len: int
        super().__init__(
            processor.tokenizer, skip_prompt, timeout, skip_special_tokens=skip_special_tokens, **decode_kwargs
        )
        self.processor = processor

    def put_image(self, latent_patches: Tensor, grid: Grid) -> None:
        """Queue a picture, after all the text before it. `latent_patches` is (n, D), `grid` its (rows, columns)."""
        if self.token_cache:
            text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
            self.on_finalized_text(text[self.print_len :])
            self.token_cache, self.print_len = [], 0
        self.text_queue.put(self.processor.decode_images(latent_patches, [grid])[0], timeout=self.timeout)


def list_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_rows: int
) -> list[torch.Generator | None]:
    """One generator per row: a single one serves all in turn; a list of another length is a ValueError."""
    if generator is None or isinstance(generator, torch.Generator):
        return [generator] * num_rows
    if not isinstance(generator, list | tuple) or not all(
        isinstance(one, torch.Generator | None) for one in generator
    ):
        raise ValueError(
            f"generator={generator!r}; give a generator, torch.Generator().manual_seed(0), or a list with one for "
            "each image."
        )
    if len(generator) != num_rows:
        raise ValueError(f"generator is a list of {len(generator)} for {num_rows} images. Give one, or one for each.")
    return list(generator)


def list_grids(image_grids: Any, num_rows: int, config: TransfusionConfig) -> list[Grid | None]:
    """The grid that is named for each row: `image_grids` is one (rows, columns), one for each row, or None."""
    if image_grids is None:
        return [None] * num_rows
    wrong = ValueError(f"image_grids={image_grids} is not (rows, columns), nor {num_rows} of these; give integers.")
    try:
        table = torch.as_tensor(image_grids)
    except (TypeError, ValueError):
        raise wrong from None
    table = table.expand(num_rows, 2) if table.shape == (2,) else table
    if table.shape != (num_rows, 2) or table.is_floating_point() or bool((table < 1).any()):
        raise wrong
    for rows, columns in table.tolist():
        if rows * columns + 2 > config.max_position_embeddings:
            raise ValueError(
                f"A grid of ({rows}, {columns}) takes {rows * columns + 2} positions; max_position_embeddings="
                f"{config.max_position_embeddings} allows no more than that. Take a smaller one."
            )
    return [(rows, columns) for rows, columns in table.tolist()]


def check_batch(input_ids: Tensor) -> None:
    """Refuse prompts that are no (B, L) batch, or an empty one."""
    if input_ids.ndim != 2 or input_ids.shape[0] == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; give a batch (rows, length) of at least one row."
        )


def last_token(document: Document) -> int | None:
    """The last token of `document`, or None where it has none."""
    return int(document.input_ids[-1]) if len(document.input_ids) else None


def begun_grid(token: int | None, named: Grid | None, config: TransfusionConfig) -> Grid:
    """The grid of an image that `token` begins: that of a size token, or else `named`, or the config's default."""
    begun = None if token is None else config.grid_of_boi(token)
    assert config.default_image_grid is not None  # the config fills it in
    rows, columns = begun or named or config.default_image_grid
    return rows, columns


def grid_after(document: Document, named: Grid | None, config: TransfusionConfig) -> Grid:
    """The grid of the image that begins after `document`: that of the size token in which it ends, or else `named`.

    Without either it is the config's default. A size token of another grid than `named` is a ValueError.
    """
    token = last_token(document)
    grid = begun_grid(token, named, config)
    if named is not None and grid != named:
        raise ValueError(
            f"A prompt ends in the size token {token}, which begins an image of {grid}, and the image to draw is "
            f"one of {named}. Name no other grid, or end the prompt in {config.boi_token_for(named)}."
        )
    return grid


def append_boi(document: Document, grid: Grid, config: TransfusionConfig) -> None:
    """End `document` in the begin-of-image token of `grid`, where it does not end in one already."""
    if last_token(document) not in config.boi_token_ids:
        begin = document.input_ids.new_tensor([config.boi_token_for(grid)])
        document.input_ids = torch.cat([document.input_ids, begin])


def has_room(length: int, grid: Grid, config: TransfusionConfig) -> bool:
    """Whether an image of `grid` and its end-of-image token fit after `length` positions."""
    rows, columns = grid
    return length + rows * columns + 1 <= config.max_position_embeddings


def check_room(document: Document, grid: Grid, config: TransfusionConfig) -> None:
    """Refuse an image of `grid` for which `document`, which ends in begin-of-image, leaves no positions."""
    if not has_room(len(document.input_ids), grid, config):
        raise ValueError(
            f"A prompt of {len(document.input_ids)} positions, begin-of-image included, and an image of {grid} with "
            f"its end take {len(document.input_ids) + grid[0] * grid[1] + 1}; max_position_embeddings="
            f"{config.max_position_embeddings} allows no more than that. Shorten the prompt, or draw a smaller grid."
        )


class _NamedGrids(LogitsProcessor):
    """Begins images of the named grids alone: whatever size the model would begin, the probability goes to these.

    So it draws as often as it wants to; if other sizes were only forbidden, it might write text in their place.
    """

    def __init__(self, grids: list[Grid], config: TransfusionConfig, device: Any) -> None:
        self.begins = torch.tensor(config.boi_token_ids, device=device)
        self.named = torch.tensor([[config.boi_token_for(grid)] for grid in grids], device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Sum the probabilities behind `scores` (B, V) of all begin-of-image tokens, row by row."""
        together = scores[:, self.begins].logsumexp(dim=1, keepdim=True)
        return scores.index_fill(1, self.begins, -math.inf).scatter(1, self.named, together)


@dataclass
class Row:
    """A row while it is written.

    Attributes:
        document: The prompt and what was written and drawn after it.
        prompt: The prompt alone.
        timeline: (L,) the padded prompt and its tokens, without patches and end-of-image: what logits processors and
            stopping criteria see.
        grid: The grid that the caller named for its images.
        generator: What its noise is drawn from.
        images_left: How many images it may still begin; infinite without `max_images`.
        finish_reason: One of `FINISH_REASONS`, once it has ended.
        waits: Whether it has begun an image that is not drawn yet.
        scores, logits: (V,) for each token that was chosen, where the caller wants them.
    """

    document: Document
    prompt: Document
    timeline: Tensor
    grid: Grid | None
    generator: torch.Generator | None
    images_left: float
    finish_reason: str | None = None
    waits: bool = False
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def writes(self) -> bool:
        """Whether its next token is to be chosen."""
        return self.finish_reason is None and not self.waits

    def timeline_of(self, length: int, padding_value: int) -> Tensor:
        """Its timeline, cut or padded to `length`."""
        return torch.nn.functional.pad(
            self.timeline[:length], (0, length - len(self.timeline[:length])), value=padding_value
        )

    def may_begin(self, config: TransfusionConfig) -> list[bool]:
        """For each begin-of-image token, whether the row may write it: within `max_images`, and with room to draw."""
        if self.images_left < 1:
            return [False] * len(config.boi_token_ids)
        grids = [self.grid or begun_grid(token, None, config) for token in config.boi_token_ids]
        return [has_room(len(self.document.input_ids) + 1, grid, config) for grid in grids]

    def append(self, input_ids: Tensor) -> None:
        """Append tokens (q,)."""
        ids = self.document.input_ids
        self.document.input_ids = torch.cat([ids, input_ids.to(ids.device)])

    def append_image(self, image: Tensor, grid: Grid, config: TransfusionConfig) -> Tensor:
        """Append the patches (n, D) of a finished image; return its tokens and end (n + 1,)."""
        written = self.document.input_ids.new_tensor([config.image_token_id] * len(image) + [config.eoi_token_id])
        self.append(written)
        self.document.images = [*self.document.images, image]
        self.document.grids = [*self.document.grids, grid]
        self.images_left -= 1
        return written


class Stream:
    """What a streamer hears of the only row: its text as ids, and its images where the streamer has `put_image`.

    The tokens that begin, fill and end an image are no text, so it never gets these.
    """

    def __init__(self, streamer: BaseStreamer | None, rows: list[Row], config: TransfusionConfig) -> None:
        if streamer is not None and len(rows) > 1:
            raise ValueError(f"A streamer takes one row and there are {len(rows)}; generate them one by one.")
        self.streamer = streamer
        control = (*config.boi_token_ids, config.eoi_token_id, config.image_token_id)
        self.control = torch.tensor(control, device=rows[0].document.input_ids.device)
        if streamer is not None:  # the prompt comes in one piece, which a streamer may skip
            prompt = rows[0].document.input_ids
            streamer.put(prompt[~torch.isin(prompt, self.control)][None].cpu())

    def put(self, token: Tensor) -> None:
        """Pass on a token (1,)."""
        if self.streamer is not None and not torch.isin(token, self.control):
            self.streamer.put(token.cpu())

    def put_image(self, row: Row) -> None:
        """Pass on the last image of `row`."""
        if self.streamer is not None and hasattr(self.streamer, "put_image"):
            self.streamer.put_image(row.document.images[-1].cpu(), row.document.grids[-1])

    def end(self) -> None:
        """Tell the streamer that nothing more comes."""
        if self.streamer is not None:
            self.streamer.end()


class InterleavedDecoder:
    """The decoding loop that switches to drawing (paper, section 3); `generate` calls it after its preparations.

    Rows that write take one token per turn. A row that chooses begin-of-image waits until no row writes; then all that
    wait are drawn in one batch, each after its own document, whose keys and values are there already. So no row that
    writes ever waits for an image, and images are drawn together. The clean patches and the end-of-image token join
    the shared context in one run; rows that take no part in a run have hidden padding there.

    Args:
        drawing: How to draw.
        image_grids: The grid of all images, one for each row, or None.
        generator: One, one for each row, or None.
        gate: The logits processor that closes begin-of-image tokens; the decoder tells it which are open in each turn.
        streamer: Hears the only row.
        max_images: How many images a row may draw, or None.
    """

    def __init__(
        self,
        drawing: Drawing,
        image_grids: Any,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        gate: Any,
        streamer: BaseStreamer | None = None,
        max_images: int | None = None,
    ) -> None:
        self.drawing = drawing
        self.image_grids = image_grids
        self.generator = generator
        self.gate = gate
        self.streamer = streamer
        self.max_images = math.inf if max_images is None else max_images

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> TransfusionGenerateOutput:
        """Continue `input_ids` (B, L) until all rows stop; a prompt that ends in begin-of-image draws at once."""
        images = model_kwargs.get("latent_patches"), model_kwargs.get("image_grids")
        rows = self.read_rows(model, input_ids, model_kwargs.get("attention_mask"), *images)
        stream = Stream(self.streamer, rows, model.config)
        processors = LogitsProcessorList(logits_processor)
        if self.image_grids is not None and model.config.size_token_ids:
            named = [row.grid for row in rows if row.grid is not None]
            processors.append(_NamedGrids(named, model.config, input_ids.device))
        writer = Writer(rows, processors, stopping_criteria, generation_config, model.config.boi_token_ids)
        context = Context.read(model, [row.document for row in rows])
        while any(row.writes or row.waits for row in rows):
            wrote = [row.writes for row in rows]
            if any(wrote):
                assert context.logits is not None  # of the last run
                self.gate.open = torch.tensor([row.may_begin(model.config) for row in rows], device=input_ids.device)
                tokens = writer.write(context.logits.to(input_ids.device))
                stream.put(tokens[:1])
                if any(row.writes or row.waits for row in rows):
                    is_token = torch.tensor(wrote, device=model.device)[:, None]
                    context.extend(tokens[:, None], is_token, [], [])
            else:
                self.draw(model, context, rows, stream)
        stream.end()
        return collect_output(input_ids, rows, writer.padding_value)

    def read_rows(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        latent_patches: Tensor | None,
        image_grids: Tensor | None,
    ) -> list[Row]:
        """Cut the batch into rows, and refuse what cannot be drawn."""
        config = model.config
        documents = read_documents(input_ids, attention_mask, latent_patches, image_grids, config)
        if empty := [row for row, document in enumerate(documents) if len(document.input_ids) == 0]:
            raise ValueError(f"The prompts of rows {empty} are empty; give at least one token that is not masked.")
        grids = list_grids(self.image_grids, len(documents), config)
        generators = list_generators(self.generator, len(documents))
        rows = [
            Row(document, copy.copy(document), timeline, grid, generator, self.max_images)
            for document, timeline, grid, generator in zip(documents, input_ids, grids, generators, strict=True)
        ]
        for row in rows:
            row.waits = last_token(row.document) in config.boi_token_ids
            if row.waits:
                check_room(row.document, grid_after(row.document, row.grid, config), config)
                if self.max_images < 1:
                    raise ValueError(
                        "max_images=0 and a prompt that ends in a begin-of-image token, which begins an image; give 1 "
                        "or more, or end the prompt in another token."
                    )
        return rows

    def draw(self, model: Any, context: Context, rows: list[Row], stream: Stream) -> None:
        """Draw for all rows that wait, and commit image and end-of-image token, after which some may go on."""
        config = model.config
        places = [place for place, row in enumerate(rows) if row.waits]
        chosen = [rows[place] for place in places]
        grids = [grid_after(row.document, row.grid, config) for row in chosen]
        generators = [row.generator for row in chosen]
        noise = draw_noise(grids, generators, config.patch_dim, model.device)
        documents = [row.document for row in chosen]
        images = draw_images(model, documents, noise, grids, self.drawing, generators, context=context.take(places))
        written = [row.document.input_ids[:0] for row in rows]
        for place, image, grid in zip(places, images, grids, strict=True):
            written[place] = rows[place].append_image(image, grid, config)
            rows[place].waits = False
            stream.put_image(rows[place])
        if any(row.writes for row in rows):
            input_ids = pad_left(written, config.eoi_token_id).to(model.device)
            is_token = pad_left([torch.ones_like(tokens) for tokens in written], 0).bool().to(model.device)
            context.extend(input_ids, is_token, images, grids)


class Writer:
    """Chooses the next token of all rows that write.

    Rows that have drawn are behind the others in tokens. As logits processors and stopping criteria tell by the length
    of a batch how far it is, they see the rows of one length at a time, each in its place in a whole batch.
    """

    def __init__(
        self,
        rows: list[Row],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        boi_token_ids: Sequence[int],
    ) -> None:
        self.rows = rows
        self.processors = processors
        self.criteria = criteria
        self.config = generation_config
        self.boi_token_ids = boi_token_ids
        pad_token = generation_config._pad_token_tensor
        self.padding_value = 0 if pad_token is None else int(pad_token)  # what fills rows that have ended

    def write(self, logits: Tensor) -> Tensor:
        """Choose tokens by `logits` (B, V), append them to the rows that write, and see which of these end.

        Returns:
            (B,) tokens; padding for rows that do not write.
        """
        tokens = torch.full_like(logits[:, 0], self.padding_value, dtype=torch.long)
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(self.rows):
            if row.writes:
                groups.setdefault(len(row.timeline), []).append(place)
        for length, places in groups.items():
            timeline = torch.stack([row.timeline_of(length, self.padding_value) for row in self.rows])
            processed = self.processors(timeline, logits.clone())
            chosen = choose_tokens(processed, self.config.do_sample)
            for place in places:
                self._append(self.rows[place], chosen[place], processed[place], logits[place])
            tokens[places] = chosen[places]
            self._stop(places, torch.cat([timeline, chosen[:, None]], dim=1))
        return tokens

    def _append(self, row: Row, token: Tensor, scores: Tensor, logits: Tensor) -> None:
        row.append(token[None])
        row.timeline = torch.cat([row.timeline, token[None]])
        row.waits = int(token) in self.boi_token_ids
        row.scores += [scores] if self.config.output_scores else []
        row.logits += [logits] if self.config.output_logits else []

    def _stop(self, places: list[int], timeline: Tensor) -> None:
        """End the rows at `places` that a criterion stops after `timeline` (B, L), and note why."""
        scores = stack_by_token([row.scores for row in self.rows])
        stopped_by = [(finish_reason_of(criterion), criterion(timeline, scores)) for criterion in self.criteria]
        for reason, stopped in sorted(stopped_by, key=lambda pair: FINISH_REASONS.index(pair[0])):
            stops = torch.as_tensor(stopped).expand(len(self.rows)).tolist()
            for row in (self.rows[place] for place in places if stops[place]):
                row.finish_reason = row.finish_reason or reason


def stack_by_token(rows: list[list[Tensor]]) -> tuple[Tensor, ...] | None:
    """One (B, V) for each token, of (V,) for each token of each row; zeros where a row has fewer. None if empty."""
    longest = max(map(len, rows))
    if longest == 0:
        return None
    blank = torch.zeros_like(max(rows, key=len)[0])
    return tuple(torch.stack([row[at] if at < len(row) else blank for row in rows]) for at in range(longest))


def choose_tokens(scores: Tensor, do_sample: bool) -> Tensor:
    """(B,) tokens from processed scores (B, V): sampled, or the best."""
    return torch.multinomial(scores.softmax(dim=-1), 1).squeeze(1) if do_sample else scores.argmax(dim=-1)


def finish_reason_of(criterion: Any) -> str:
    """Which of `FINISH_REASONS` a stopping criterion stands for."""
    kinds = {EosTokenCriteria: "eos", MaxTimeCriteria: "time", MaxLengthCriteria: "length"}
    return next((reason for kind, reason in kinds.items() if isinstance(criterion, kind)), "stop")


def collect_output(input_ids: Tensor, rows: list[Row], padding_value: int) -> TransfusionGenerateOutput:
    """Put what `rows` hold beyond their prompts behind `input_ids` (B, L)."""
    new = [row.document.input_ids[len(row.prompt.input_ids) :] for row in rows]
    new_ids = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=padding_value)
    return TransfusionGenerateOutput(
        sequences=torch.cat([input_ids, new_ids], dim=1),
        images=[row.document.images[len(row.prompt.images) :] for row in rows],
        image_grids=[row.document.grids[len(row.prompt.grids) :] for row in rows],
        prompt_length=input_ids.shape[1],
        finish_reasons=[row.finish_reason for row in rows if row.finish_reason is not None],
        scores=stack_by_token([row.scores for row in rows]),
        logits=stack_by_token([row.logits for row in rows]),
    )


__all__ = [
    "FINISH_REASONS",
    "InterleavedDecoder",
    "TransfusionGenerateOutput",
    "TransfusionImageOutput",
    "TransfusionStreamer",
    "append_boi",
    "check_batch",
    "check_room",
    "grid_after",
    "list_generators",
    "list_grids",
]
