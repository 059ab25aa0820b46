"""How likely branches come back, by kind and age: counted, and turned into expected hits per block and time.

A kind is made of turns, size, pace, and whether the branch was passed (``hit_density`` says what these are). Ages fall
into half octaves. The chance that a branch comes back while it is of an age, if it did not before, is

    base[pace, passed][age] × factor[turns, size, passed]

where the base is what came back over what could have, and the factor is what came back over what the base alone would
have let expect. What was seen little is drawn towards what is more general: a pace towards all paces, an age towards
the age before it; at first all ages are alike, which makes old worse than new, as in LRU. Counts are halved from time
to time, so that what is learned follows the traffic.

Expected hits per time, of a branch of an age: over all horizons, the best ratio of the chance to come back within it to
the time that passes until it does or the horizon is reached (the Gittins index of the branch).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .branches import Floats, Ints

NUM_TURNS, NUM_SIZES, NUM_PACES, NUM_AGES = 3, 12, 28, 64
_SHAPE = (NUM_TURNS, NUM_SIZES, NUM_PACES, 2, NUM_AGES)

FIRST_CHANCE = 0.1
"""Of coming back within half an octave, before anything is known."""
DOUBT = 40
"""Branches of mean size whose evidence weighs as much as what is more general."""
DOUBT_FACTOR = 2
"""The same for a factor, which is 1 in general."""
HORIZON = 8192
"""Branches of mean size that are counted before counts are halved."""

Whole = npt.NDArray[np.integer]


class Returns:
    """Counts of blocks by kind and age: what came back then, and what did not until then."""

    def __init__(self) -> None:
        self._came = np.zeros(_SHAPE)
        self._stayed = np.zeros(_SHAPE)
        self._chance = np.full(_SHAPE, FIRST_CHANCE)
        self._widths = np.diff([0.0, *2.0 ** (np.arange(NUM_AGES) / 2)])
        self._density: dict[int, Floats] = {}

    def kind(self, turns: int, grown: int, pace: float) -> int:
        """Number of a kind. ``pace`` is a logarithm, 0 if there is none."""
        turn, size = min(turns, NUM_TURNS - 1), min(grown.bit_length(), NUM_SIZES - 1)
        return ((turn * NUM_SIZES + size) * NUM_PACES + (min(1 + int(pace), NUM_PACES - 1) if pace else 0)) * 2

    def passed(self, kinds: Whole) -> Whole:
        """The kinds of what is left behind of these."""
        return kinds | 1

    def come_back(self, kinds: Whole, ages: Ints, blocks: Whole) -> None:
        """So many blocks came back at these ages."""
        np.add.at(self._came.reshape(-1), kinds * NUM_AGES + _bucket(ages), blocks)

    def stay(self, kinds: Whole, ages: Ints, blocks: Whole) -> None:
        """So many blocks were observed up to these ages and did not come back."""
        np.add.at(self._stayed.reshape(-1), kinds * NUM_AGES + _bucket(ages), blocks)

    def learn(self, kinds: Whole, ages: Ints, blocks: Whole, mean_size: float) -> None:
        """Draw conclusions; the arguments are what is being waited for, as in ``stay``, and a branch's mean blocks."""
        came, stayed = self._came, self._stayed.copy()
        np.add.at(stayed.reshape(-1), kinds * NUM_AGES + _bucket(ages), blocks)
        reached = (came + stayed)[..., ::-1].cumsum(axis=-1)[..., ::-1]
        exposed = reached - stayed / 2
        doubt = DOUBT * mean_size
        general, chance = np.empty(NUM_AGES), FIRST_CHANCE
        by_age = (counts.sum(axis=(0, 1, 2, 3)).tolist() for counts in (came, exposed))
        for age, (hits, seen) in enumerate(zip(*by_age, strict=True)):
            general[age] = chance = (hits + doubt * chance) / (seen + doubt)
        base = (came.sum(axis=(0, 1)) + doubt * general) / (exposed.sum(axis=(0, 1)) + doubt)
        expected = (exposed * base).sum(axis=(2, 4)) + DOUBT_FACTOR * mean_size
        factor = (came.sum(axis=(2, 4)) + DOUBT_FACTOR * mean_size) / expected
        self._chance = np.minimum(base * factor[:, :, None, :, None], 0.9)
        self._density = {}
        if came.sum() + self._stayed.sum() > HORIZON * mean_size:
            self._came /= 2
            self._stayed /= 2

    def density(self, kinds: Whole, ages: Ints) -> Floats:
        """Expected hits per block and time."""
        distinct, where = np.unique(kinds, return_inverse=True)
        unknown = [kind for kind in distinct.tolist() if kind not in self._density]
        if unknown:
            self._density.update(zip(unknown, self._indices(unknown), strict=True))
        table = np.stack([self._density[kind] for kind in distinct.tolist()])
        result: Floats = table[where, _bucket(ages)]
        return result

    def _indices(self, kinds: list[int]) -> Floats:
        """``[kinds, ages]``: over all horizons, the best ratio of chance to time, from the middle of each age on."""
        chance = self._chance.reshape(-1, NUM_AGES)[kinds]
        left = np.cumprod(1 - chance, axis=1)
        start = np.concatenate([np.ones((len(kinds), 1)), left[:, :-1]], axis=1)
        spent = start * self._widths * (1 - chance / 2)
        ahead = spent[:, ::-1].cumsum(axis=1)[:, ::-1]  # time from each age to the end
        after = np.concatenate([ahead[:, 1:], np.zeros((len(kinds), 1))], axis=1)
        hits = start[:, :, None] - left[:, None, :]
        time = (ahead - spent / 2)[:, :, None] - after[:, None, :]
        ratio = np.where(np.tri(NUM_AGES, dtype=np.bool_).T, hits / np.maximum(time, 1e-30), 0)
        best: Floats = np.maximum(ratio.max(axis=2), 1e-30)
        return best


def _bucket(ages: Ints) -> Ints:
    """Half octave of each age."""
    bucket: Ints = np.clip(np.floor(2 * np.log2(np.maximum(ages, 1))).astype(np.int64) + 1, 0, NUM_AGES - 1)
    return bucket
