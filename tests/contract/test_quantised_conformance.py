"""That the conformance suite catches what may be broken in a quantised pool."""

from __future__ import annotations

import math

import pytest
import torch
from dense_backend import DenseBackend, is_caught

from pagemgr.backends import KVLayer
from pagemgr.backends.interface import LARGEST


class Rescales(DenseBackend):
    """Broken in how it reads scales; ``scales`` says how."""

    def held(self, kv):
        if kv.key_scale is None:
            return super().held(kv)
        return super().held(KVLayer(kv.key, kv.value, *self.scales(kv.key_scale, kv.value_scale)))

    def scales(self, key, value):
        return torch.ones_like(key), torch.ones_like(value)


class IgnoresKeyScales(Rescales):
    def scales(self, key, value):
        return torch.full_like(key, 0.01), value


class IgnoresValueScales(Rescales):
    def scales(self, key, value):
        return key, torch.full_like(value, 0.01)


class SwapsScales(Rescales):
    def scales(self, key, value):
        return value, key


class TakesScalesOfTheFirstHead(Rescales):
    def scales(self, key, value):
        return key[:, :1].expand_as(key), value[:, :1].expand_as(value)


class TakesScalesOfTheFirstToken(Rescales):
    def scales(self, key, value):
        return key[..., :1].expand_as(key), value[..., :1].expand_as(value)


class LetsScalesOfOthersThrough(DenseBackend):
    """Masks values, but weighs by the scales of slots that nobody wrote."""

    def held(self, kv):
        keys, values = super().held(kv)
        return keys, values if kv.value_scale is None else values.nan_to_num()

    def clean(self, values, seen):
        return values


class ForgetsToWriteScales(DenseBackend):
    def write_kv(self, key, value, kv, slot_mapping):
        before = [scale if scale is None else scale.clone() for scale in (kv.key_scale, kv.value_scale)]
        super().write_kv(key, value, kv, slot_mapping)
        for scale, old in zip((kv.key_scale, kv.value_scale), before, strict=True):
            if scale is not None:
                scale.copy_(old)


class OneScaleForAllHeads(DenseBackend):
    def quantise(self, rows, dtype):
        scales = rows.abs().amax((-1, -2), keepdim=True) / LARGEST[dtype]
        ratio = rows / torch.where(scales == 0, math.inf, scales)
        return self.round(ratio, dtype), scales[..., 0].expand(rows.shape[:2])


class InvertsScales(DenseBackend):
    def quantise(self, rows, dtype):
        stored, scales = super().quantise(rows, dtype)
        return stored, 1 / scales


class Truncates(DenseBackend):
    def round(self, ratio, dtype):
        return ratio.to(dtype)


class DividesByScalesOfZero(DenseBackend):
    def quantise(self, rows, dtype):
        scales = rows.abs().amax(-1) / LARGEST[dtype]
        return self.round(rows / scales[..., None], dtype), scales


BROKEN = [
    broken
    for broken in [*DenseBackend.__subclasses__(), *Rescales.__subclasses__()]
    if broken.__module__ == __name__ and broken is not Rescales
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_broken_scales_are_caught(broken: type[DenseBackend]) -> None:
    assert is_caught(broken())
