"""Which cached block goes first: policies that order the cached blocks of a tier, by the name that config uses.

lru           least recently released first
lfu           fewest uses first
s3fifo        first what was used once, as long as that is more than a tenth; then the rest
hit_density   first what is expected to bring the fewest hits for the time that it will take up
"""

from .interface import Blocks, EvictionPolicy, PolicyFactory, Prefixes
from .recency import LRU
from .registry import make_policy, names

__all__ = ["LRU", "Blocks", "EvictionPolicy", "PolicyFactory", "Prefixes", "make_policy", "names"]
