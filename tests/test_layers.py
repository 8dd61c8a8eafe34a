"""Imports point one way: between the packages, and inside each package down the list below."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.source import FOLDERS, PACKAGES, ROOT, files, imported, module

# a file imports only files before it; a new file gets its place here
ORDER = {
    "kernels": """
        backend launch spec table
        quant_rows rmsnorm silu_mul sample_triton sample linear
        w8_cpu w8_config split_sums gemm_w8a8_small gemm_w8a8_large gemm_w8a8
        w4_decode w4_pack w4_cpu w4_config w4_to_w8 gemm_w4a8_tile gemm_w4a8
        quant_blocks gemm_fp8_block_tile gemm_fp8_block
        kv_layout kv_read kv_rows kv_work kv_step work_buffers kv_case kv_write_tile kv_write_triton rope_kv_write kv_dequant kv_to_fp8 copy_blocks
        attn_cpu attn_unpack attn_queries attn_block attn_decode attn_merge attn_ref prefill_tile prefill_fp8 attn_prefill attention
        catalog
    """,
    "quant": """
        kinds scheme pack rtn
        formats formats.scales formats.ct_args formats.name_patterns formats.ct_config formats.ct_save formats.compressed_tensors formats.fp8 formats.kv_scheme formats.kv_cache
        formats.fireq formats.qserve formats.gptq formats.awq formats.catalog convert
        ptq ptq.shape ptq.model ptq.stats ptq.pairs ptq.smooth ptq.awq ptq.rotate ptq.attention_scales ptq.fireq_scales ptq.reorder
        ptq.progressive ptq.grid ptq.clip ptq.gptq ptq.fake ptq.steps ptq.recipe ptq.folding ptq.weight ptq.layerwise
        ptq.judge ptq.report ptq.tensor_file ptq.spent ptq.state ptq.calibration ptq.checks ptq.write ptq.run ptq.command
        __main__
    """,
    "sched": """
        metrics arrivals workload synthetic router observed step slabs other_pools sm_shares quota prefix sequence recount held_sets blocks latency
        limits flights claims compaction policy waiting running forecast slack policies batching pressure prefill_turn simulated_replica simulator simulated_prompts simulated_routes slowdown step_time
        placement placement_estimate placement_search placement_simulate placement_exhaustive placement_kvpr placement_baselines
        placement_muxserve placement_fineserve placement_arms placement_moves placement_why
    """,
    "minserve": """
        sampling schema groups policy_keys overrides config model_flags keys workload_tables workload_saved
        model_config rope checkpoint tensor_names kv_use resolve memory rows linear prepare load_report weights kv_scales
        slab_words slab_counts slab_quota slab_rule shared_memory lock_watch slab_table group_sets slab_segments cuda_memory mps pool keeper green probe sm_share
        models sampler inputs graphs moves runner warmup step_watch engine cache_identity loading step_profile step_start kv_moves kv_share prefill_token offload
        text outputs llm
        wire link host pool_segments residency quota_writer agent protocol answers loop device_share worker served jobs frontend listener responses admin_routes pool_metrics request_metrics metrics server serve place_memory simulate_requests simulate place_problem place_output place top admin workload replay_heard replay_alone replay_http replay_engine replay
    """,
}
MAY_IMPORT = {
    "kernels": set(),
    "sched": set(),
    "quant": {"kernels"},
    "minserve": {"kernels", "quant", "sched"},
}
# numpy in kernels: docs/adr/0004-numpy-in-kernels.md
THIRD_PARTY = {
    "kernels": {"torch", "triton", "numpy"},
    "sched": {"numpy"},
    "quant": {"torch", "numpy", "safetensors", "tokenizers", "tqdm"},
}
# sched decides; it reads no clock, touches no device, starts nothing
NOT_IN_SCHED = {
    "time",
    "datetime",
    "asyncio",
    "threading",
    "multiprocessing",
    "subprocess",
    "socket",
    "os",
    "io",
}
# imported by processes that must never hold a tensor or a CUDA context
TORCH_FREE = (
    "sampling",
    "schema",
    "config",
    "slab_words",
    "slab_table",
    "wire",
    "protocol",
    "answers",
    "server",
    "residency",
    "admin_routes",
    "serve",
    "top",
    "admin",
    "workload",
    "replay",
)

# what the server alone needs: a machine that only measures, or runs LLM, does without
SERVER_ONLY = {"msgspec", "orjson", "starlette", "uvicorn", "httptools", "uvloop"}


def ours(package: str) -> list[str]:
    names = [module(path).removeprefix(package).removeprefix(".") for path in files(package)]
    return [n for n in names if n]


def rank(package: str) -> dict[str, int]:
    return {f"{package}.{name}": i for i, name in enumerate(ORDER[package].split())}


def declared() -> set[str]:
    """Import names of the distributions that pyproject.toml declares."""
    known = {"pyyaml": "yaml"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=;\s]", d)[0].lower() for d in project["dependencies"]]
    return {known.get(n, n) for n in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_packages(package: str) -> None:
    forbidden = set(FOLDERS) - MAY_IMPORT[package] - {package}
    wrong = [
        f"{path}:{line} imports {name}"
        for path in files(package)
        for line, name in imported(path)
        if name.split(".")[0] in forbidden
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_third_party_imports_are_declared(package: str) -> None:
    allowed = THIRD_PARTY.get(package, declared()) | set(FOLDERS) | sys.stdlib_module_names
    if package == "sched":
        allowed = allowed - NOT_IN_SCHED
    wrong = [
        f"{path}:{line} imports {name}"
        for path in files(package)
        for line, name in imported(path)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_has_its_place(package: str) -> None:
    order = ORDER[package].split()
    assert len(order) == len(set(order)), f"{package}: a name stands twice in ORDER"
    missing = set(ours(package)) - set(order)
    assert not missing, f"{package}: give {sorted(missing)} a place in ORDER, after all that they import"
    gone = set(order) - set(ours(package))
    assert not gone, f"{package}: ORDER names {sorted(gone)}, which are not there"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_inside_a_package_point_up_the_list(package: str) -> None:
    place = rank(package)
    wrong = [
        f"{path}:{line} imports {name}, which stands below it"
        for path in files(package)
        for line, name in imported(path)
        if module(path) != package and place.get(name, -1) >= place.get(module(path), len(place))
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_are_empty_at_the_top() -> None:
    """Import from the file that defines.  Only minserve/__init__.py has something to say."""
    wrong = [p for p in files(*PACKAGES) if p.name == "__init__.py" and (ROOT / p).read_text().strip()]
    assert wrong == [Path("minserve/__init__.py")]


def reaches(name: str, seen: set[str]) -> set[str]:
    """Every module that importing `name` imports, as far as our own files tell."""
    path = Path(*name.split(".")).with_suffix(".py")
    if name in seen or not (ROOT / path).exists():
        return seen | {name}
    seen = seen | {name}
    for _, other in imported(path, at_import=True):
        seen = reaches(other, seen)
    return seen


@pytest.mark.parametrize("name", TORCH_FREE)
def test_front_end_never_imports_torch(name: str) -> None:
    found = reaches(f"minserve.{name}", set())
    assert f"minserve.{name}" in found
    assert not {n for n in found if n.split(".")[0] in ("torch", "triton", "transformers")}


def test_the_server_alone_needs_its_packages() -> None:
    found = reaches("minserve.llm", set())
    assert {"minserve.text", "minserve.engine"} <= found
    assert not {n for n in found if n.split(".")[0] in SERVER_ONLY}


def test_the_checks_see_what_they_should() -> None:
    """The reader of imports itself: lazy ones count, submodules count, typing ones do not run."""
    here = Path("minserve/__init__.py")
    assert "minserve.llm" in {n for _, n in imported(here)}
    assert "minserve.llm" not in {n for _, n in imported(here, at_import=True)}
    assert "tests.source" in {n for _, n in imported(Path("tests/test_layers.py"))}
    assert "sched.step" in rank("sched")
