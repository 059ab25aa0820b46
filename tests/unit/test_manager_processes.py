"""A manager belongs to one process: not to its children, and not to whoever unpickles it."""

from __future__ import annotations

import copy
import os
import select
import signal
import threading
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
from managers import KINDS, Make, filled

from pagemgr.errors import InvalidInput, WrongProcess
from pagemgr.manager import BlockManager
from pagemgr.recording import RecordingManager

pytestmark = KINDS
PATIENCE = 10.0
"""Seconds until a child counts as hanging."""


def in_a_child(work: Callable[[], object]) -> str:
    """What ``work`` raises in a forked child, as its name and numbers."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            answer = "nothing"
        except WrongProcess as error:
            answer = f"WrongProcess {error.owner} {error.current == os.getpid()}"
        except BaseException as error:
            answer = type(error).__name__
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        if select.select([answers], [], [], PATIENCE)[0]:
            answer = answers.read()
        else:
            os.kill(child, signal.SIGKILL)
            answer = "it hangs"
    os.waitpid(child, 0)
    return answer


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_refused(make: Make) -> None:
    manager = make(9, 2, num_host_blocks=9)
    a = filled(manager, [1, 2, 3])
    verbs: list[Callable[[], object]] = [
        lambda: manager.add([1, 2, 3]),
        lambda: manager.reserve([a], [1]),
        lambda: manager.fork(a),
        lambda: manager.free([a]),
        lambda: manager.swap_out([a]),
        lambda: manager.stats(),
    ]
    for verb in verbs:
        assert in_a_child(verb) == f"WrongProcess {os.getpid()} True"
    assert in_a_child(lambda: BlockManager(9, 2).add([1])) == "nothing"
    assert manager.fork(a)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_does_not_wait_for_a_lock_that_nobody_holds_there(make: Make) -> None:
    manager = make(9, 2)
    held, done = threading.Event(), threading.Event()

    class Slow:
        def query(self) -> bool:
            held.set()
            return done.wait(30)

    manager.free([filled(manager, [1])], after=Slow())
    thread = threading.Thread(target=manager.stats)
    thread.start()
    assert held.wait(30)
    answer = in_a_child(manager.stats)
    done.set()
    thread.join()
    assert answer == f"WrongProcess {os.getpid()} True"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_writes_nothing_into_the_log(make: Make, tmp_path: Path) -> None:
    log = tmp_path / "calls.log"
    manager = RecordingManager(log, 9, 2, **make.keywords)  # type: ignore[attr-defined]
    before = log.read_bytes()
    assert in_a_child(lambda: manager.add([1])) == f"WrongProcess {os.getpid()} True"
    assert log.read_bytes() == before


@pytest.mark.parametrize("copied", [ForkingPickler.dumps, copy.copy, copy.deepcopy], ids=lambda copied: copied.__name__)
def test_a_manager_is_not_copied(make: Make, copied: Callable[[object], object]) -> None:
    with pytest.raises(InvalidInput, match="a BlockManager cannot be copied or pickled: make one where it is needed"):
        copied(make(9, 2))
