"""A call of ``attention`` as its launches see it: what differs between the layers of a step, and what does not."""

from __future__ import annotations

from collections.abc import Hashable
from operator import itemgetter
from typing import NamedTuple

import torch

from pagemgr.backends.interface import AttentionParams, KVLayer

from .launch import scale_strides


class Tensors(NamedTuple):
    """What differs, in the order in which kernels take it. The first ``launch.ALIGNED`` are aligned, as a rule."""

    query: torch.Tensor
    out: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    lse: torch.Tensor | None
    key_scale: torch.Tensor | None
    value_scale: torch.Tensor | None
    block_table: torch.Tensor
    scratch: torch.Tensor | None


def taking(*names: str) -> itemgetter[tuple[object, ...]]:
    """What picks these of ``Tensors``."""
    return itemgetter(*map(Tensors._fields.index, names))


def form_of(
    query: torch.Tensor, kv: KVLayer, params: AttentionParams, with_lse: bool, *depends: Hashable
) -> tuple[Hashable, tuple[int, ...]]:
    """The key of a form of an attention kernel, which depends on more; and the strides that it is given."""
    strides = (*query.stride()[:2], *kv.key.stride()[:3], *scale_strides(kv))
    features = tuple(x is None for x in (params.alibi_slopes, params.sinks, params.softcap, params.window))
    shape = (query.shape[1:], kv.key.shape[1:])
    return (query.device, query.dtype, kv.key.dtype, shape, strides, features, with_lse, *depends), strides


def numbers_of(params: AttentionParams, dim: int) -> tuple[float, float | None, int | None]:
    """Scale, softcap and window as kernels take them."""
    scale = dim**-0.5 if params.scale is None else float(params.scale)
    return scale, None if params.softcap is None else float(params.softcap), params.window
