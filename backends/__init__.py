"""Kernels over the paged pool: the contract, its backends, and how they are found."""

from .interface import AttentionParams, Backend, Capabilities, Feature, KVLayer
from .registry import BackendStatus, availability, create, names

__all__ = [
    "AttentionParams",
    "Backend",
    "BackendStatus",
    "Capabilities",
    "Feature",
    "KVLayer",
    "availability",
    "create",
    "names",
]
