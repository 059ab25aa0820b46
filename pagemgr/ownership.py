"""What belongs to one process: neither to its children after ``fork()``, nor to whoever unpickles or copies it."""

from __future__ import annotations

import os
from typing import Any, NoReturn, Self

from .errors import InvalidInput, WrongProcess


class OneProcess:
    """A child of the process would have a copy of the bookkeeping and none of the device's memory."""

    _owner: int

    def __new__(cls, *args: Any, **more: Any) -> Self:
        """Remember who makes it; ``__init__`` is the subclass's own."""
        made = super().__new__(cls)
        made._owner = os.getpid()
        return made

    def require_process(self) -> None:
        """Raise ``WrongProcess`` in any process but the one that made this."""
        if (current := os.getpid()) != self._owner:
            raise WrongProcess(self._owner, current)

    def __reduce__(self) -> NoReturn:
        raise InvalidInput(f"a {type(self).__name__} cannot be copied or pickled: make one where it is needed")
