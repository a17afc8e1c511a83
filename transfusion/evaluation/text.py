"""Perplexity of held-out text, and that of a smoothed trigram model beside it."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch


@torch.no_grad()
def text_perplexity(model: Any, processor: Any, texts: Sequence[str], batch_size: int = 32) -> float:
    """exp of the mean negative log-likelihood of the tokens of `texts`, end of sequence included, the first excluded.

    Raises:
        ValueError: No texts.
    """
    if not texts:
        raise ValueError("texts is empty; give at least one.")
    total, count = 0.0, 0
    for start in range(0, len(texts), batch_size):
        rows = [[{"type": "text", "text": text}] for text in texts[start : start + batch_size]]
        batch = processor(text=rows, return_labels=True, return_tensors="pt").to(model.device)
        num_targets = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch, skip_logits=True).text_loss) * num_targets
        count += num_targets
    return math.exp(total / count)


class TrigramBaseline:
    """An interpolated trigram model with absolute discounting (Ney, Essen & Kneser 1994), down to uniform.

    p(w | h) = max(c(h w) - d, 0) / c(h) + d * N(h) / c(h) * p(w | h'), where N(h) counts the kinds of words after h,
    and h' is h without its first word. An unseen history hands over to h' whole.

    Args:
        rows: Token ids of documents.
        vocab_size: Size of the vocabulary, over which the last distribution is uniform.
        discount: d.
    """

    def __init__(self, rows: Iterable[Sequence[int]], vocab_size: int, discount: float = 0.75) -> None:
        self.vocab_size = vocab_size
        self.discount = discount
        self.following: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for row in rows:
            for position, token in enumerate(row):
                for order in range(min(position, 2) + 1):
                    self.following[tuple(row[position - order : position])][token] += 1
        self.totals = {history: sum(counts.values()) for history, counts in self.following.items()}

    def probability(self, history: tuple[int, ...], token: int) -> float:
        """p(token | history) for a history of at most two tokens."""
        shorter = self.probability(history[1:], token) if history else 1 / self.vocab_size
        if history not in self.totals:
            return shorter
        counts, total = self.following[history], self.totals[history]
        return max(counts[token] - self.discount, 0) / total + self.discount * len(counts) / total * shorter

    def perplexity(self, rows: Iterable[Sequence[int]]) -> float:
        """Perplexity of `rows`, the first token of each excluded: nothing stands before it to guess it from."""
        logs = [
            math.log(self.probability(tuple(row[max(0, position - 2) : position]), row[position]))
            for row in rows
            for position in range(1, len(row))
        ]
        return math.exp(-sum(logs) / len(logs))


__all__ = ["TrigramBaseline", "text_perplexity"]
