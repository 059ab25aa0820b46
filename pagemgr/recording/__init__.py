"""A log of all calls of a manager, and the same calls made again: somebody's incident becomes a test.

    {"pagemgr_log": 1, "manager": {"num_blocks": 9, "block_size": 2, …}}
    {"call": 1, "verb": "add_many", "given": {"prompts": [[5, 6, 7]]}, "gave": [[0, 0, 0]], "digest": "00000000"}
    {"call": 2, "verb": "reserve", "given": {"sequences": [[0, 0]], "tokens": [3]}, "gave": "0f59…", "digest": "71ac…"}
    {"call": 3, "verb": "commit", "given": {"plan": 2, "tokens": [[5, 6, 7]]}, "gave": null, "digest": "71ac…"}
    {"call": 4, "verb": "free", "given": {"sequences": [[0, 0]], "after": 4}, "gave": null, "digest": "71ac…"}
    {"call": 5, "verb": "stats", "given": {}, "fences": {"4": true}, "gave": null, "digest": "71ac…"}

A line is one call and what came of it. A sequence goes by row and generation, a plan or a move by the call that gave
it, a fence by the call that it was given to, a pin by its number, its owner and whether it stands. A manager decides by
its calls and by what fences answer, and a fence is asked once a call: so the same calls with the same answers give the
same blocks, on any machine, compiled or not.

A log holds token ids and namespaces as they are, but no secret. Only its owner may read it, and it overwrites nothing.
"""

from .reader import Difference, LogReplay, is_log, replay_log
from .recorder import RecordingManager

__all__ = ["Difference", "LogReplay", "RecordingManager", "is_log", "replay_log"]
