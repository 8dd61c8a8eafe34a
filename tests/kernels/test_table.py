"""Tables of measured configs: what is near is found, what is far is not, and a broken table names its fault."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from kernels import table
from kernels.attn_decode import AttnDecodeConfig
from kernels.attn_prefill import AttnPrefillConfig
from kernels.kv_dequant import KvDequantConfig
from kernels.kv_layout import KvLayout
from kernels.kv_write_triton import RopeKvWriteConfig
from kernels.launch import ASSUMED, GpuFacts
from kernels.quant_rows import RowConfig, row_block
from kernels.table import family, read_table, tuned
from kernels.w4_config import W4Config
from kernels.w8_config import W8Config

H200 = ASSUMED[90]
MEASURED = {"us": 1.0, "by": "made up", "date": "2000-01-01", "torch": "0", "triton": "0", "driver": "0"}


@dataclass(frozen=True)
class Tile:
    block: int
    wide: bool = False
    order: str = "rows"


def entry(block: int, sms: int = 132, op: str = "mul", **dims: Any) -> dict[str, Any]:
    config = asdict(Tile(block))
    return {"op": op, "sm_count": sms, "dims": dims, "config": config, "measured": dict(MEASURED)}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(table, "TABLES", tmp_path)

    def write(*entries: Any, capability: int = 90) -> None:
        (tmp_path / "H200.json").write_text(json.dumps({"capability": capability, "entries": entries}))
        table._nearest.cache_clear()
        table._entries.cache_clear()

    yield write
    table._nearest.cache_clear()
    table._entries.cache_clear()


def block(gpu: GpuFacts = H200, op: str = "mul", **dims: Any) -> int | None:
    found = tuned(Tile, op, gpu, **dims)
    return found and found.block


def test_families() -> None:
    names = {
        "NVIDIA H200": "H200",
        "NVIDIA H200 NVL": "H200",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA GeForce RTX 4090": "4090",
        "NVIDIA L40S": "L40S",
        "Tesla T4": "T4",
        "none": "none",
    }
    assert {name: family(name) for name in names} == names


# (op, its look-up, arguments near those: another head dim, block, type, group or depth needs other room)
EXACT = [
    (AttnPrefillConfig.pick, (128, 4, 16), [(256, 4, 16), (96, 4, 16), (128, 4, 32), (128, 8, 16)]),
    (AttnDecodeConfig.pick, (KvLayout("bf16", 8, 128), 8, 2), [
        (KvLayout("bf16", 8, 128), 8, 4), (KvLayout("bf16", 8, 128), 16, 2), (KvLayout("bf16", 8, 256), 8, 2),
        (KvLayout("bf16", 8, 128, 64), 8, 2),
    ]),
    (KvDequantConfig.pick, (KvLayout("int8", 8, 64),), [(KvLayout("int8", 8, 128),), (KvLayout("int8", 8, 64, 64),)]),
    (RopeKvWriteConfig.pick, (32, KvLayout("int8", 8, 64), True), [(32, KvLayout("int8", 8, 128), True)]),
    (W4Config.pick, (64, 4096, 4096, "group", 64), [(64, 4096, 4096, "group", 128), (64, 4096, 2048, "group", 64)]),
    (W8Config.pick, (64, 4096, 4096), [(64, 4096, 4100), (64, 4096, 2048)]),
]  # fmt: skip


@pytest.mark.parametrize(("pick", "measured", "near"), EXACT, ids=lambda x: getattr(x, "__qualname__", ""))
def test_what_decides_on_room_is_never_only_near(
    pick: Any, measured: Any, near: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile that was measured at one shape may spill, or not start, at twice its head dim."""
    asked = []

    def look_up(cls: Any, op: str, gpu: GpuFacts, dims: Any, folder: Path) -> None:
        asked.append({name: value for name, value, _ in dims})

    monkeypatch.setattr(table, "_nearest", look_up)
    for arguments in (measured, *near):
        pick(H200, *arguments)
    first, *others = asked
    assert len(others) == len(near)
    for dims in others:
        assert max(table._apart(dims[name], first[name]) for name in first) == math.inf


def test_rows_in_a_block_of_another_size_are_not_near(write: Any) -> None:
    def row_entry(D: int) -> dict[str, Any]:
        dims = {"D": D, "block": f"B{row_block(D)}"}
        config = {"rows": 1, "num_warps": 32}
        return {"op": "rmsnorm", "sm_count": 132, "dims": dims, "config": config, "measured": dict(MEASURED)}

    write(row_entry(4096))
    assert RowConfig.pick(H200, "rmsnorm", D=3000) == RowConfig(1, 32)
    assert RowConfig.pick(H200, "rmsnorm", D=5120) != RowConfig(1, 32)


def test_no_table_is_a_valid_state(write: Any) -> None:
    assert block(T=1) is None
    write()
    assert block(T=1) is None


def test_the_nearest_shape_wins(write: Any) -> None:
    write(entry(1, T=16, N=4096), entry(2, T=64, N=4096), entry(3, T=64, N=1024))
    assert block(T=16, N=4096) == 1
    assert block(T=31, N=4096) == 1
    assert block(T=33, N=4096) == 2
    assert block(T=64, N=1500) == 3
    assert block(T=64, N=2500) == 2
    assert block(T=8, N=8192) == 1
    assert block(T=7, N=4096) is None
    assert block(T=16, N=8193) is None
    assert block(T=0, N=4096) is None


def test_words_and_flags_are_equal_or_nothing(write: Any) -> None:
    write(entry(1, T=16, dtype="bf16", bias=True), entry(2, T=16, dtype="fp8", bias=True))
    assert block(T=16, dtype="fp8", bias=True) == 2
    assert block(T=16, dtype="fp16", bias=True) is None
    assert block(T=16, dtype="fp8", bias=False) is None
    # 1 == True, yet a flag is no number
    assert block(T=16, dtype="fp8", bias=1) is None


def test_a_share_of_the_chip_has_entries_of_its_own(write: Any) -> None:
    write(entry(1, sms=132, T=16), entry(2, sms=66, T=16))
    assert [block(H200._replace(num_sms=n), T=16) for n in (132, 100, 90, 33, 32, 264, 265)] == [
        1, 1, 2, 2, None, 1, None,
    ]  # fmt: skip


def test_another_gpu_has_none(write: Any) -> None:
    write(entry(1, T=16))
    assert block(H200._replace(name="NVIDIA H200 NVL"), T=16) == 1
    assert block(H200._replace(name="NVIDIA H100"), T=16) is None
    assert block(H200._replace(capability=100), T=16) is None
    assert block(op="add", T=16) is None


def test_equally_near_entries_go_by_their_order(write: Any) -> None:
    write(entry(5, T=32), entry(6, T=8))
    assert block(T=16) == 5
    write(entry(6, T=8), entry(5, T=32))
    assert block(T=16) == 6


def broken(**changes: Any) -> dict[str, Any]:
    return entry(1, T=16) | changes


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"H200.json entry 0 must have the keys"),
        (broken(extra=1), r"H200.json entry 0 must have the keys"),
        (broken(sm_count="132"), r"entry 0: sm_count must be of type int, got '132'"),
        (broken(dims={"T": 1.5}), r"entry 0: dims.T must be an integer, a word, true or false, got 1.5"),
        (broken(measured={"us": 1}), r"entry 0: measured lacks \['by', 'date', 'driver', 'torch', 'triton'\]"),
        (broken(dims={"T": 16, "N": 1}), r"entry 0: mul has the dims \['T'\], got \['N', 'T'\]"),
        (broken(config={"block": 1, "wide": False}), r"a Tile has the fields .*, got \['block', 'wide'\]"),
        (broken(config={"block": 1, "wide": False, "order": "", "z": 1}), r"fields .*'wide', 'z'\]"),
        (broken(config={"block": 1, "wide": 0, "order": ""}), r"Tile.wide must be of type bool, got 0"),
        (broken(config={"block": True, "wide": True, "order": ""}), r"Tile.block must be of type int"),
    ],
)  # fmt: skip
def test_a_broken_entry_is_named(write: Any, value: Any, message: str) -> None:
    write(value)
    with pytest.raises(ValueError, match=message):
        block(T=16)


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": []}'])
def test_a_broken_file_is_named(write: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "H200.json").write_text(text)
    with pytest.raises(ValueError, match=r"H200.json must hold"):
        block(T=16)


def test_shipped_tables_are_whole() -> None:
    for path in sorted((Path(table.__file__).parent / "tables").glob("*.json")):
        _, entries = read_table(path)
        assert path.stem == family(path.stem)
        assert all(e.measured["us"] > 0 for e in entries)
