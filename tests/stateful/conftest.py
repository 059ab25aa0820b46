"""How long the state machines run.

The normal run takes seconds. To search longer, for minutes or (``soak``) for about an hour:

    python -m pytest tests/stateful --hypothesis-profile=long
    python -m pytest tests/stateful --hypothesis-profile=soak

A failure prints the calls that lead to it, and a ``@reproduce_failure`` line that repeats them.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("long", deadline=None, max_examples=3_000, stateful_step_count=80, print_blob=True)
settings.register_profile("soak", deadline=None, max_examples=30_000, stateful_step_count=120, print_blob=True)
