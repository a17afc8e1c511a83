import math

import pytest
import torch

from tests.tiny import tiny_model
from tests.tiny_processor import tiny_tokenizer
from transfusion.evaluation.text import TrigramBaseline, text_perplexity
from transfusion.image_processing import TransfusionImageProcessor
from transfusion.processing import TransfusionProcessor


ROWS = [[1, 2, 3, 1, 2, 4], [1, 2, 3, 3], [5, 1, 2]]


@pytest.mark.parametrize("history", [(), (1,), (1, 2), (3, 1), (9, 9), (9, 2)])
def test_trigram_probabilities_sum_to_one(history: tuple[int, ...]) -> None:
    baseline = TrigramBaseline(ROWS, vocab_size=10)
    assert math.fsum(baseline.probability(history, token) for token in range(10)) == pytest.approx(1, abs=1e-12)


def test_trigram_probability_by_hand() -> None:
    """After (1, 2): 3 twice, 4 once, so N = 2 of 3; after (2,) the same; unigrams: 13 tokens of 5 kinds, 3 thrice."""
    unigram = (3 - 0.75) / 13 + 0.75 * 5 / 13 / 10
    bigram = (2 - 0.75) / 3 + 0.75 * 2 / 3 * unigram
    trigram = (2 - 0.75) / 3 + 0.75 * 2 / 3 * bigram
    assert TrigramBaseline(ROWS, vocab_size=10).probability((1, 2), 3) == pytest.approx(trigram)


def test_perplexity_by_hand() -> None:
    """The first token of a row is given; each after it counts alike."""
    baseline = TrigramBaseline(ROWS, vocab_size=10)
    probabilities = [baseline.probability((7,), 3), baseline.probability((7, 3), 1), baseline.probability((3,), 3)]
    assert baseline.perplexity([[7, 3, 1], [3, 3]]) == pytest.approx(math.prod(probabilities) ** (-1 / 3))


def test_perplexity_of_a_uniform_baseline_is_the_vocabulary() -> None:
    assert TrigramBaseline([], vocab_size=10).perplexity(ROWS) == pytest.approx(10)


@torch.no_grad()
def test_text_perplexity_equals_the_token_by_token_sum() -> None:
    tokenizer = tiny_tokenizer()
    processor = TransfusionProcessor(TransfusionImageProcessor(size=None), tokenizer)
    model = tiny_model(
        vocab_size=len(tokenizer),
        boi_token_id=processor.boi_token_id,
        eoi_token_id=processor.eoi_token_id,
        image_token_id=processor.image_token_id,
    )
    texts = ["a red heart", "no", "<image> is a word here"]
    total, count = 0.0, 0
    for text in texts:
        ids = processor(text=[{"type": "text", "text": text}], return_labels=True, return_tensors="pt")["input_ids"]
        logs = model(ids).logits.log_softmax(-1)
        for position in range(1, ids.shape[1]):
            total, count = total - float(logs[0, position - 1, ids[0, position]]), count + 1
    assert text_perplexity(model, processor, texts, batch_size=2) == pytest.approx(math.exp(total / count), rel=1e-5)
    with pytest.raises(ValueError, match="texts is empty"):
        text_perplexity(model, processor, [])
