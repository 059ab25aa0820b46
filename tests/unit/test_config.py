"""The config tree: what it refuses and in which words, sizes, and which source wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagemgr.config import Config, MetricsConfig, ModelConfig, PoolConfig, load
from pagemgr.errors import ConfigError, InvalidInput
from pagemgr.layout import BlockLayout, DType, KVDType
from pagemgr.values import INT32_MAX, parse_bytes

MODEL = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}
BLOCK = 2 * 2 * 2 * 8 * 4 * 16  # bytes of a block of MODEL: layers, roles, heads, dim, float32, tokens


def config(**sections: Any) -> Config:
    """A config that works, but for what ``sections`` change."""
    return Config(**({"model": MODEL, "pool": {"num_blocks": 8}} | sections))


def refusal(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**sections)
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "pagemgr.toml"
    path.write_text("[model]\nnum_layers = 2\nnum_kv_heads = 2\nhead_dim = 8\n[pool]\nnum_blocks = 8\n")
    return path


def test_defaults() -> None:
    made = config()
    assert made.model.num_q_heads == 2
    assert made.model.dtype is DType.float32
    assert made.model.kv_dtype is KVDType.auto
    assert (made.device, made.backend, made.eviction.policy, made.prefix.enabled) == ("auto", "auto", "lru", True)
    assert (made.metrics.host, made.metrics.port) == ("127.0.0.1", None)
    assert made.layout == BlockLayout(2, 2, 8, 16, DType.float32)
    assert made.layout.block_bytes == BLOCK
    assert made.resolve_host_blocks() == 0


def test_python_users_build_it_from_sections() -> None:
    made = Config(model=ModelConfig(num_layers=1, num_kv_heads=4, head_dim=64), pool=PoolConfig(size="1GiB"))
    assert made == Config.model_validate(made.model_dump())
    with pytest.raises(ConfigError, match=r"num_blocks = 1: must be greater than or equal to 2"):
        PoolConfig(num_blocks=1)
    with pytest.raises(ConfigError, match=r"prt: unknown key, did you mean port\?"):
        MetricsConfig(prt=3)  # type: ignore[call-arg]


def test_it_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config().pool.num_blocks = 9


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"pool": {}}, "pool: its size is missing: set one of num_blocks, size, memory_share"),
        ({"pool": {"num_blocks": 8, "size": "1MB"}}, "pool: num_blocks = 8 and size = '1MB' exclude each other"),
        ({"pool": {"num_blocks": 1}}, "pool.num_blocks = 1: must be greater than or equal to 2"),
        ({"pool": {"num_blocks": 2**31}}, "pool.num_blocks = 2147483648: must be less than or equal to 2147483647"),
        ({"pool": {"num_blocks": True}}, "pool.num_blocks = True: must be a number"),
        ({"pool": {"num_blocks": 8, "block_size": 0}}, "pool.block_size = 0: must be greater than or equal to 1"),
        ({"pool": {"memory_share": True}}, "pool.memory_share = True: must be a number"),
        ({"pool": {"memory_share": 0}}, "pool.memory_share = 0: must be greater than 0"),
        ({"pool": {"memory_share": 1.5}}, "pool.memory_share = 1.5: must be less than or equal to 1"),
        ({"pool": {"memory_share": "nan"}}, "pool.memory_share = 'nan': must be a finite number"),
        ({"pool": {"size": "4 gigs"}}, "pool.size = '4 gigs': must be bytes as a whole number or as text like"),
        ({"pool": {"size": f"{BLOCK}B"}}, f"'{BLOCK}B' is {BLOCK} bytes, too little for 2 blocks"),
        ({"pool": {"size": f"{BLOCK}B"}}, f"a block is {BLOCK} bytes, so give at least {2 * BLOCK} bytes"),
        ({"pool": {"size": BLOCK * 2**31}}, "is 2147483648 blocks of 4096 bytes, more than int32 block ids can name"),
        ({"pool": {"num_blocks": 8, "max_seq_len": 113}}, "pool.max_seq_len = 113 tokens is more than the pool holds"),
        ({"pool": {"num_blocks": 8, "max_seq_len": 113}}, "Lower it to 112, or give the pool 9 blocks"),
        (
            {"pool": {"num_blocks": 8, "host_blocks": 4, "host_size": "1MB"}},
            "exclude each other: set one of host_blocks",
        ),
        ({"pool": {"num_blocks": 8, "host_blocks": 1}}, "host_blocks = 1 holds nothing"),
        ({"pool": {"num_blocks": 8, "host_size": 100}}, "pool.host_size = 100 is 100 bytes, too little for 2 blocks"),
        ({"model": MODEL | {"num_q_heads": 3}}, "num_q_heads = 3 is no multiple of num_kv_heads = 2"),
        (
            {"model": MODEL | {"kv_dtype": "fp8"}},
            "model.kv_dtype = 'fp8': must be 'auto', 'float8_e4m3fn', 'float8_e5m2' or 'int8'",
        ),
        (
            {"model": MODEL | {"head_dim": 7, "kv_dtype": "int8"}},
            "head_dim = 7 is odd, which kv_dtype = 'int8' cannot be",
        ),
        ({"model": MODEL | {"dtype": "fp8"}}, "model.dtype = 'fp8': must be 'float32', 'float16' or 'bfloat16'"),
        ({"model": {"num_layers": 2, "head_dim": 8}}, "model.num_kv_heads: is required"),
        ({"device": "gpu"}, "device = 'gpu': must be auto, cpu, cuda or cuda:N"),
        ({"eviction": {"policy": "fifo"}}, "eviction.policy = 'fifo': must be one of lru, lfu, s3fifo, hit_density"),
        ({"metrics": {"port": 65536}}, "metrics.port = 65536: must be less than or equal to 65535"),
        ({"metrics": {"host": ""}}, "metrics.host = '': must have at least 1 character"),
        ({"metrics": {"prot": 1}}, "metrics.prot: unknown key, did you mean metrics.port?"),
        ({"modle": {}}, "modle: unknown key, did you mean model?"),
        ({"num_block": 3}, "num_block: unknown key, did you mean pool.num_blocks?"),
    ],
)
def test_what_cannot_work_is_refused_with_the_numbers(sections: dict[str, Any], message: str) -> None:
    assert message in refusal(**sections)


def test_all_problems_are_named_at_once() -> None:
    lines = refusal(model=MODEL | {"head_dim": 0}, pool={"num_blocks": "many"}, device="gpu").splitlines()
    assert [line.split(" = ")[0] for line in lines] == ["model.head_dim", "pool.num_blocks", "device"]


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("7B", 7),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("1.5GB", 1_500_000_000),
        (" 512 mib ", 512 << 20),
        ("4GiB", 4 << 30),
        ("9007199254740993B", 2**53 + 1),  # beyond what a float holds
        ("2TiB", 2 << 40),
    ],
)
def test_bytes(size: int | str, count: int) -> None:
    assert parse_bytes(size) == count


@pytest.mark.parametrize("size", ["", "4G", "GiB", "-1MB", "1e3MB", "1..5GB", "٤GiB", -1, True, None, 1.5])
def test_bad_bytes(size: Any) -> None:
    with pytest.raises(InvalidInput, match="must be bytes"):
        parse_bytes(size)


def test_sizes_become_blocks() -> None:
    assert config().resolve_num_blocks() == 8
    assert config(pool={"size": 5 * BLOCK + 1}).resolve_num_blocks() == 5
    assert config(pool={"num_blocks": 8, "host_size": 3 * BLOCK}).resolve_host_blocks() == 3
    assert config(pool={"num_blocks": 8, "host_blocks": 4}).resolve_host_blocks() == 4
    assert config(pool={"num_blocks": 8, "host_size": 0}).resolve_host_blocks() == 0


def test_a_share_of_memory_becomes_blocks_when_the_memory_is_known() -> None:
    shared = config(pool={"memory_share": 0.5, "max_seq_len": 65})
    assert shared.resolve_num_blocks(free_device_bytes=20 * BLOCK) == 10
    with pytest.raises(ConfigError, match=f"0.5 of {3 * BLOCK} free bytes is {3 * BLOCK // 2} bytes, too little"):
        shared.resolve_num_blocks(free_device_bytes=3 * BLOCK)
    with pytest.raises(InvalidInput, match="needs free_device_bytes"):
        shared.resolve_num_blocks()
    with pytest.raises(ConfigError, match=r"max_seq_len = 65 tokens .* are 64 tokens"):
        shared.resolve_max_seq_len(5)
    assert shared.resolve_max_seq_len(6) == 65


def test_the_longest_sequence_is_the_pool_up_to_a_cap() -> None:
    assert config().resolve_max_seq_len(8) == 7 * 16
    assert config().resolve_max_seq_len(1_000_000) == 131_072
    assert config(pool={"num_blocks": INT32_MAX, "max_seq_len": 200_000}).resolve_max_seq_len(20_000) == 200_000


def test_later_sources_win_and_every_origin_is_known(toml: Path) -> None:
    environ = {"PAGEMGR_POOL__BLOCK_SIZE": "32", "PAGEMGR_DEVICE": "cpu", "PATH": "/bin"}
    loaded = load(toml, {"device": "cuda:1", "metrics.port": 0}, environ)
    assert loaded.config.pool == PoolConfig(num_blocks=8, block_size=32)
    assert (loaded.config.device, loaded.config.metrics.port) == ("cuda:1", 0)
    assert loaded.config == Config.load(toml, {"device": "cuda:1", "metrics.port": 0}, environ)
    origins = loaded.origins
    assert origins["pool.num_blocks"] == str(toml)
    assert origins["pool.block_size"] == "PAGEMGR_POOL__BLOCK_SIZE"
    assert origins["metrics.port"] == "--metrics.port"
    assert origins["device"] == "--device"
    assert origins["prefix.enabled"] == "default"


@pytest.mark.parametrize(
    ("environ", "overrides", "expected"),
    [
        ({"PAGEMGR_POOL__SIZE": "1MiB"}, {}, {"size": "1MiB"}),
        ({}, {"pool.memory_share": 0.5}, {"memory_share": 0.5}),
        ({"PAGEMGR_POOL__SIZE": "1MiB"}, {"pool.num_blocks": 9}, {"num_blocks": 9}),
        ({"PAGEMGR_POOL__HOST_SIZE": "1MiB"}, {"pool.host_blocks": 4}, {"num_blocks": 8, "host_blocks": 4}),
    ],
)
def test_a_stronger_source_may_choose_another_kind_of_size(
    toml: Path, environ: dict[str, str], overrides: dict[str, object], expected: dict[str, Any]
) -> None:
    loaded = load(toml, overrides, environ)
    assert loaded.config.pool == PoolConfig(**expected)
    if "num_blocks" not in expected:
        assert loaded.origins["pool.num_blocks"] == "default"


def test_one_source_may_not_choose_two_kinds_of_size(toml: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_blocks = 9 and size = '1MiB' exclude each other"):
        load(toml, {}, {"PAGEMGR_POOL__SIZE": "1MiB", "PAGEMGR_POOL__NUM_BLOCKS": "9"})


def test_the_environment_is_the_process_s_unless_given(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEMGR_POOL__NUM_BLOCKS", "64")
    assert Config.load(toml).pool.num_blocks == 64
    assert Config.load(toml, environ={}).pool.num_blocks == 8


def test_unknown_keys_name_their_origin(toml: Path) -> None:
    toml.write_text(toml.read_text() + "sise = 3\n")
    with pytest.raises(ConfigError) as caught:
        load(toml, {"modle.head_dim": 1}, {"PAGEMGR_POOL": "4", "PAGEMGR_POOL__NUM_BLOKS": "4"})
    assert str(caught.value).splitlines() == [
        f"pool.sise ({toml}): unknown key, did you mean pool.size?",
        "pool (PAGEMGR_POOL): is a section, set its keys: pool.block_size, pool.num_blocks, pool.size, "
        "pool.memory_share, pool.max_sequences, pool.max_seq_len, pool.host_blocks, pool.host_size, "
        "pool.host_cache, pool.watermark, pool.rollback",
        "pool.num_bloks (PAGEMGR_POOL__NUM_BLOKS): unknown key, did you mean pool.num_blocks?",
        "modle.head_dim (--modle.head-dim): unknown key, did you mean model.head_dim?",
    ]


def test_bad_values_name_their_origin(toml: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(toml, {"metrics.port": "high"}, {"PAGEMGR_POOL__NUM_BLOCKS": "1"})
    pool, port = str(caught.value).splitlines()
    assert pool == "pool.num_blocks = '1' (PAGEMGR_POOL__NUM_BLOCKS): must be greater than or equal to 2"
    assert port.startswith("metrics.port = 'high' (--metrics.port): must be a valid integer")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[pool]\nnum_blocks = = 3\n", r"pagemgr\.toml: not valid TOML: .*line 2"),
        (b"[pool]\nsize = '\xff'\n", r"pagemgr\.toml: not valid TOML: .*utf-8"),
        (None, r"pagemgr\.toml: No such file"),
    ],
)
def test_files_that_cannot_be_read(toml: Path, content: bytes | None, message: str) -> None:
    if content is None:
        toml.unlink()
    else:
        toml.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(toml, {}, {})
