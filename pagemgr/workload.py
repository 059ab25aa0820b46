"""A chat-like workload, made from a seed: who says what, how much is answered, and how long people think in between.

Conversations start with one of a few system prompts, take several turns, and some turns ask for several replies at
once, of which one is kept. Lengths are skewed as in real traffic: most are short, a few come close to the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import InvalidInput

SYSTEM_PROMPTS = (180, 120, 90, 60)
"""Tokens of each system prompt, the most popular first."""

MEAN_MESSAGE, MEAN_REPLY = 40, 60
"""Tokens."""

LONGEST = 3
"""The longest message or reply, in means."""

MOST_TURNS = 6

FORKS = (1, 1, 1, 1, 1, 1, 3, 4)
"""How many replies a turn asks for; each is as likely."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's message and what the answer is to look like. Times are in steps of the engine, lengths in tokens."""

    pause: int
    """Between the reply before and this message; for the first turn, from the start."""
    message: tuple[int, ...]
    reply_tokens: int
    num_replies: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one user does."""

    system: tuple[int, ...]
    turns: tuple[Turn, ...]


def chat(seed: int, num_conversations: int, vocabulary: int, max_tokens: int, arrivals: int) -> list[Conversation]:
    """``num_conversations`` of at most ``max_tokens`` each, which begin within ``arrivals`` steps.

    The same arguments give the same workload. Raises ``InvalidInput`` if a first turn might not fit in ``max_tokens``.
    """
    least = max(SYSTEM_PROMPTS) + LONGEST * (MEAN_MESSAGE + MEAN_REPLY)
    if max_tokens < least:
        raise InvalidInput(f"max_tokens must be at least {least}, so that every first turn fits, got {max_tokens}")
    rng = np.random.default_rng(seed)
    systems = [_tokens(rng, length, vocabulary) for length in SYSTEM_PROMPTS]
    popularity = 1 / np.arange(1, len(systems) + 1)
    chosen = rng.choice(len(systems), num_conversations, p=popularity / popularity.sum())
    starts = np.sort(rng.integers(0, arrivals, num_conversations))
    return [
        Conversation(systems[system], _turns(rng, start, vocabulary, max_tokens - len(systems[system])))
        for system, start in zip(chosen.tolist(), starts.tolist(), strict=True)
    ]


def _turns(rng: np.random.Generator, start: int, vocabulary: int, room: int) -> tuple[Turn, ...]:
    """Turns until the user has had enough, or ``room`` tokens are not enough for one more."""
    turns: list[Turn] = []
    for number in range(int(rng.integers(1, MOST_TURNS + 1))):
        message, reply = (_skewed(rng, mean) for mean in (MEAN_MESSAGE, MEAN_REPLY))
        room -= message + reply
        if room < 0:
            break
        pause = int(rng.integers(20, 120)) if number else start
        turns.append(Turn(pause, _tokens(rng, message, vocabulary), reply, int(rng.choice(FORKS))))
    return tuple(turns)


def _skewed(rng: np.random.Generator, mean: int) -> int:
    sigma = 0.8
    return int(np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma), 4, LONGEST * mean))


def _tokens(rng: np.random.Generator, length: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(rng.integers(0, vocabulary, length).tolist())
