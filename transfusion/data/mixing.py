"""Seeds, orders and mixtures that are functions of seed, epoch and index alone."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np


def stable_seed(*parts: int) -> int:
    """A seed of 63 bits from integers, the same in every process, on every machine."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(size: int, *parts: int) -> np.ndarray:
    """A permutation (size,) of 0 ... size - 1 that `stable_seed(*parts)` decides."""
    return np.random.Generator(np.random.PCG64(stable_seed(*parts))).permutation(size)


class Mixture:
    """Rows of several sources, in shares of an epoch that the weights state.

    An epoch has the same number of rows of each source: its share of `length`, rounded such that the sum is `length`.
    They lie spread over the epoch. Each source goes through all its rows in a random order, over the ends of epochs,
    before any of them comes again, then in another order.

    Args:
        sizes: Rows of each source.
        weights: Shares of each, on any scale; None: by their number of rows.
        length: Rows of an epoch; None: as many as there are rows in all.
        seed: Of the orders.

    Raises:
        ValueError: No sources, an empty one, weights that are no shares, or an epoch without rows of some source.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None = None, length: int | None = None, seed: int = 0
    ) -> None:
        shares = list(sizes if weights is None else weights)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"The sources have {list(sizes)} rows; give at least one source, and no empty one.")
        if len(shares) != len(sizes) or not all(0 < share < float("inf") for share in shares):
            raise ValueError(f"The weights are {shares} for {len(sizes)} sources; give a number above 0 for each.")
        self.sizes = list(sizes)
        self.seed = seed
        self.counts = _apportion(shares, sum(sizes) if length is None else length)
        if min(self.counts) < 1:
            raise ValueError(
                f"An epoch of {sum(self.counts)} rows has {self.counts} of the sources with weights {shares}; make "
                "the epoch longer (epoch_rows), or leave out the source that has none."
            )
        # Row j of a source's n in an epoch stands at (j + 1/2) / n of it.
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        sources = np.repeat(np.arange(len(sizes)), self.counts)
        order = np.argsort(places, kind="stable")
        self._source_of = sources[order]
        self._number_of = np.concatenate([np.arange(count) for count in self.counts])[order]
        self._order = functools.lru_cache(maxsize=2 * len(sizes))(self._draw_order)

    def __len__(self) -> int:
        return sum(self.counts)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = functools.lru_cache(maxsize=2 * len(self.sizes))(self._draw_order)

    def locate(self, epoch: int, index: int) -> tuple[int, int]:
        """The source, and the row of it, that stand at `index` of the epoch."""
        source = int(self._source_of[index])
        drawn = epoch * self.counts[source] + int(self._number_of[index])
        passes, place = divmod(drawn, self.sizes[source])
        return source, int(self._order(source, passes)[place])

    def _draw_order(self, source: int, passes: int) -> np.ndarray:
        return permutation(self.sizes[source], self.seed, source, passes)


def _apportion(shares: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to `shares` with the sum `total`: rounded down, and the largest remainders up."""
    exact = [share / sum(shares) * total for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


__all__ = ["Mixture", "permutation", "stable_seed"]
