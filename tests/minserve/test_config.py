"""Every malformed configuration is one ValueError that names the key and the value; every good one reads back."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from examples.policy import Impatient
from minserve import policy_keys
from minserve.config import (
    Config,
    GpuConfig,
    Lengths,
    ModelEntry,
    NodeConfig,
    ServerConfig,
    Slo,
    load_config,
    pick_device,
)
from minserve.groups import GroupConfig
from minserve.keys import admin_keys, api_keys
from minserve.model_flags import add_model_flags, model_flags
from minserve.schema import At, kinds, read_yaml
from minserve.serve import read_arguments, read_config
from sched.policies import POLICIES
from tests.minserve.malformed_configs import MALFORMED, model, server

ROOT = Path(__file__).resolve().parents[2]
FULL = ROOT / "examples" / "full.yaml"


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    ("text", "parts"), MALFORMED, ids=[str(p[0]) + f"-{i}" for i, (_, p) in enumerate(MALFORMED)]
)
def test_malformed_file_is_one_clear_error(tmp_path: Path, text: str | bytes, parts: tuple[str, ...]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"^/") as error:
        load_config(file)
    said = str(error.value)
    assert type(error.value) is ValueError, repr(error.value)
    assert said.startswith(f"{file}: "), said
    said = said.removeprefix(f"{file}: ")
    assert all(part in said for part in parts), (parts, said)
    assert len(said) <= 700, said
    assert "\n" not in said, said


def test_the_table_is_as_long_as_promised() -> None:
    assert len(MALFORMED) >= 100
    assert len({text for text, _ in MALFORMED}) == len(MALFORMED)


def test_unreadable_files(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            load_config(path)


def test_full_yaml_loads_and_names_every_key() -> None:
    raw = read_yaml(FULL)
    one = raw["models"][0]
    places = [
        (ServerConfig, raw["server"]),
        (NodeConfig, raw["nodes"][0]),
        (GpuConfig, raw["nodes"][0]["gpus"][0]),
        (ModelEntry, one),
        (Slo, one["slo"]),
        (Lengths, one["lengths"]),
        (GroupConfig, raw["groups"][0]),
    ]
    for cls, section in places:
        assert set(section) == set(kinds(cls)), cls.__name__
    config = load_config(FULL)
    assert [m.name for m in config.models] == ["llama", "llama-w8", "llama-w4"]
    assert config.models[0].path == str(ROOT / "examples" / "models" / "llama")


def test_full_yaml_states_the_defaults() -> None:
    """Where full.yaml is off the default, the comment on that line (or the next) says what the default is."""
    config = load_config(FULL)
    required = {"models[0].name", "models[0].path", "groups[0].name"}
    off = {k for k in config.changed() if not k.startswith(("models[1]", "models[2]"))} - required
    lines = FULL.read_text().splitlines()
    for dotted in off:
        name = dotted.rpartition(".")[2]
        at = next(i for i, line in enumerate(lines) if line.strip().removeprefix("- ").startswith(f"{name}:"))
        if not (dotted.startswith("gpus") and name == "name"):
            assert "efault" in lines[at] + lines[at + 1], (dotted, lines[at])


def test_every_key_is_explained_in_full_yaml() -> None:
    for line in FULL.read_text().splitlines()[: FULL.read_text().splitlines().index("  - name: llama-w8")]:
        word = line.strip().removeprefix("- ")
        if word and not word.startswith("#") and not word.endswith(":") and not line.startswith("  kv_dtype"):
            assert "#" in word, line


def test_tiers_yaml_is_one_model_in_three_precisions() -> None:
    config = load_config(FULL.with_name("tiers.yaml"))
    assert [(m.group, m.tier, m.quantization) for m in config.models] == [
        ("demo", 0, "auto"), ("demo", 1, "w8a8-int8"), ("demo", 2, "w4a8-int8"),
    ]  # fmt: skip
    assert [g.name for g in config.groups] == ["demo"]
    config.check_here()


def test_defaults_merge_and_own_keys_win(tmp_path: Path) -> None:
    text = """
    defaults: {max_model_len: 8K, kv_dtype: int8, slo: {ttft_ms: 500, tpot_ms: 50}, placement: [gpu0]}
    models:
      - {name: a, path: m, slo: {tpot_ms: 30}, quantization: w8a8}
      - {name: b, path: ../k, kv_dtype: float16, max_model_len: auto, quantization: w4a8}
    """
    a, b = load_config(write(tmp_path, text)).models
    assert (a.max_model_len, a.kv_dtype, a.quantization) == (8192, "int8", "w8a8-int8")
    assert a.slo == Slo(ttft_ms=500, tpot_ms=30)
    assert (b.max_model_len, b.kv_dtype, b.quantization) == (None, "fp16", "w4a8-int8")
    assert b.slo == Slo(ttft_ms=500, tpot_ms=50)
    assert (a.path, b.path) == (str(tmp_path / "m"), str(tmp_path.parent / "k"))


def test_overrides_of_a_model_come_before_the_default_ones(tmp_path: Path) -> None:
    text = """
    defaults: {quantization_overrides: {"*.down_proj": w8a8, "model.layers.0.*": none}}
    models:
      - {name: a, path: m, quantization_overrides: {"*mlp*": w4a8-g64, "model.layers.0.*": w8a8-fp8}}
      - {name: b, path: m, quantization: w4a8, quantization_group_size: -1}
    """
    a, b = load_config(write(tmp_path, text)).models
    assert a.quantization_overrides == (
        ("*mlp*", "w4a8-g64"),
        ("model.layers.0.*", "w8a8-fp8"),
        ("*.down_proj", "w8a8"),
    )
    assert b.quantization_overrides == (("*.down_proj", "w8a8"), ("model.layers.0.*", "none"))
    assert b.quantization_group_size == "channel"
    assert ModelEntry.read(json.loads(json.dumps(dataclasses.asdict(a)))) == a


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 MiB", 2 << 20),
        ("2MB", 2_000_000),
        ("0.5 GiB", 1 << 29),
        ("'64 kib'", 64 << 10),
        ("4096", 4096),
        ("4096B", 4096),
    ],
)
def test_sizes_for_people(tmp_path: Path, text: str, value: int) -> None:
    assert load_config(write(tmp_path, server(f"max_body_bytes: {text}"))).server.max_body_bytes == value


@pytest.mark.parametrize(
    ("text", "value"), [("8k", 8000), ("8K", 8192), ("1.5k", 1500), ("8192", 8192), ("1M", 1 << 20)]
)
def test_counts_for_people(tmp_path: Path, text: str, value: int) -> None:
    assert load_config(write(tmp_path, model(f"max_model_len: {text}"))).models[0].max_model_len == value


def test_yaml_is_read_as_1_2(tmp_path: Path) -> None:
    """`no` and dates are text, 010 is ten, 1e3 a number, a byte-order mark is nothing: no surprises of YAML 1.1."""
    text = "\ufeffserver: {port: 010, shutdown_timeout_s: 1e3}\nmodels: [{name: no, path: 2026-01-01}]"
    config = load_config(write(tmp_path, text))
    assert (config.server.port, config.server.shutdown_timeout_s) == (10, 1000.0)
    assert (config.models[0].name, Path(config.models[0].path).name) == ("no", "2026-01-01")


def test_gpus_get_names_and_models_find_them(tmp_path: Path) -> None:
    text = """
    nodes: [{name: x, gpus: [{device: cpu}, {name: big, device: cuda:1}]}, {name: y, gpus: [{}]}]
    models: [{name: a, path: m}, {name: b, path: m, placement: [big]}, {name: c, path: m, placement: [gpu2]}]
    """
    config = load_config(write(tmp_path, text))
    assert [g.name for g in config.gpus] == ["gpu0", "big", "gpu2"]
    assert [config.gpu_of(m).name for m in config.models] == ["gpu0", "big", "gpu2"]


def test_entries_travel_as_json() -> None:
    for entry in load_config(FULL).models:
        assert ModelEntry.read(json.loads(json.dumps(dataclasses.asdict(entry)))) == entry


def test_single_model_reads_keys_as_the_file_does(tmp_path: Path) -> None:
    config = Config.single(
        tmp_path / "llama", gpu={"pool_bytes": "64 MiB"}, kv_dtype="int8", max_model_len="8K"
    )
    (entry,) = config.models
    assert (entry.name, entry.path, entry.max_model_len) == ("llama", str(tmp_path / "llama"), 8192)
    assert config.gpu_of(entry).pool_bytes == 64 << 20
    for keys, parts in [
        ({"kv_dtype": "fp12"}, "kv_dtype.*int4.*fp12"),
        ({"kv_type": 1}, "kv_type.*'kv_dtype'"),
    ]:
        with pytest.raises(ValueError, match=parts):
            Config.single(tmp_path, **keys)


def test_flags_are_the_keys_of_a_model(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    args = parser.parse_args(
        [
            "--kv-dtype",
            "int8",
            "--max-model-len",
            "8K",
            "--deterministic",
            "true",
            "--max-num-seqs",
            "7",
            "--rate",
            "1.5",
        ]
    )
    config = Config.single(tmp_path, **model_flags(args))
    (entry,) = config.models
    assert (entry.kv_dtype, entry.max_model_len, entry.deterministic, entry.max_num_seqs, entry.rate) == (
        "int8",
        8192,
        True,
        7,
        1.5,
    )
    assert model_flags(parser.parse_args([])) == {}
    assert "--max-model-len" in parser.format_help()


@pytest.mark.parametrize("options", ["{shed: hopeless, late_share: 8}", "'late_share=8, shed=hopeless'"])
def test_a_policy_and_its_options(tmp_path: Path, options: str) -> None:
    config = load_config(write(tmp_path, model(f"policy: slack, policy_options: {options}")))
    (entry,) = config.models
    assert entry.policy_options == (("late_share", 8), ("shed", "hopeless"))
    assert ModelEntry.read(json.loads(json.dumps(dataclasses.asdict(entry)))) == entry
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    flags = model_flags(parser.parse_args(["--policy", "fixed", "--policy-options", "batch=3"]))
    assert config.with_models(**flags).models[0].policy_options == (("batch", 3),)
    flags = model_flags(parser.parse_args(["--policy", "fcfs"]))
    (entry,) = config.with_models(**flags).models
    assert (entry.policy, entry.policy_options) == ("fcfs", ())


def test_options_of_a_policy_may_be_of_any_plain_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "impatient", Impatient)
    for written, found in (("{follow: false}", False), ("follow=false", False), ("{follow: true}", True)):
        (entry,) = load_config(write(tmp_path, model(f"policy: slack, policy_options: {written}"))).models
        assert entry.policy_options == (("follow", found),)
    check = policy_keys.check_policy
    at = At("models[0]", tmp_path)
    for value in (0.03, 1):
        check("impatient", (("most_s", value),), at)
    for policy, option, says in (
        ("impatient", ("most_s", True), "a number, by default 0.025, got true"),
        ("slack", ("late_share", True), "a whole number, by default 8, got true"),
        ("slack", ("late_share", 8.5), "a whole number, by default 8, got 8.5"),
        ("slack", ("follow", 0), "true or false, by default True, got 0"),
        ("impatient", ("most_s", -1.0), "most_s must be above 0 seconds, got -1.0"),
    ):
        with pytest.raises(ValueError, match=says):
            check(policy, (option,), at)


def test_a_policy_on_the_command_line_is_every_models(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    text = "models: [{name: a, path: m, policy: fixed, policy_options: {batch: 2}}, {name: b, path: m}]"
    file = str(write(tmp_path, text))
    assert [m.policy for m in read_config(read_arguments([file])).models] == ["fixed", "slack"]
    flags = ["--policy", "saab"]
    assert [m.policy for m in read_config(read_arguments([file, *flags])).models] == ["saab", "saab"]
    with pytest.raises(ValueError, match=r"policy must be one of slack, .*'edf'|\"edf\""):
        read_config(read_arguments([file, "--policy", "edf"]))
    with pytest.raises(ValueError, match="--kv-dtype goes with --model"):
        read_config(read_arguments([file, "--kv-dtype", "int8"]))


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, server("port: 1, host: localhost, api_keys_file: k")))
    changed = config.with_server(port=2, host=None).server
    assert (changed.port, changed.host, changed.api_keys_file) == (2, "localhost", str(tmp_path / "k"))
    with pytest.raises(ValueError, match=r"server\.port.*70000"):
        config.with_server(port=70000)


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    config = load_config(write(tmp_path, model("chat_template: t.jinja")))
    with pytest.raises(ValueError, match=r"models\[0\]\.chat_template.*t\.jinja"):
        config.check_here()
    (tmp_path / "t.jinja").touch()
    config.check_here()
    (tmp_path / "m").rmdir()
    with pytest.raises(ValueError, match=r"models\[0\]\.path must be a local folder.*/m"):
        config.check_here()


def test_what_serve_cannot_do_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    two = "nodes: [{name: x, gpus: [{}]}, {name: y, gpus: [{}]}]\nmodels: [{name: a, path: m}]"
    with pytest.raises(ValueError, match=r"nodes must be one node.*got 2"):
        load_config(write(tmp_path, two)).check_here()


def test_each_replica_has_an_entry_of_its_own(tmp_path: Path) -> None:
    text = """
    nodes: [{name: x, gpus: [{}, {}]}]
    models: [{name: a, path: m, aliases: [z], placement: [gpu0, gpu1]}, {name: b, path: m}]
    """
    config = load_config(write(tmp_path, text)).replicated()
    assert [(m.name, m.model, m.placement) for m in config.models] == [
        ("a@gpu0", "a", ("gpu0",)), ("a@gpu1", "a", ("gpu1",)), ("b", "b", ("gpu0",)),
    ]  # fmt: skip
    for entry in config.models:
        assert ModelEntry.read(json.loads(json.dumps(dataclasses.asdict(entry)))) == entry
    assert config.replicated() == config


def test_groups_have_defaults_and_an_order(tmp_path: Path) -> None:
    text = """
    models: [{name: a, path: m, group: g}, {name: b, path: m, group: h, tier: 3}, {name: c, path: m, group: g}]
    groups: [{name: h, policy: cheapest, margin: 0.5}]
    """
    config = load_config(write(tmp_path, text))
    assert config.groups == (
        GroupConfig(name="h", policy="cheapest", margin=0.5),
        GroupConfig(name="g", policy="slo", margin=0.7, hysteresis=0.2),
    )
    assert config.changed()["groups[0].policy"] == "cheapest"


def test_api_keys_come_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINSERVE_API_KEY", raising=False)
    assert api_keys(ServerConfig()) == ()
    file = tmp_path / "keys"
    file.write_text("# ours\n one \n\ntwo\none\n")
    monkeypatch.setenv("MINSERVE_API_KEY", "zero")
    assert api_keys(ServerConfig(api_keys_file=str(file))) == ("zero", "one", "two")
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="api_keys_file"):
        api_keys(ServerConfig(api_keys_file=str(file)))
    monkeypatch.setenv("MINSERVE_API_KEY", "secret value")
    with pytest.raises(ValueError, match="API key") as error:
        api_keys(ServerConfig())
    assert "secret" not in str(error.value)


def test_an_admin_key_is_no_api_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINSERVE_API_KEY", raising=False)
    monkeypatch.delenv("MINSERVE_ADMIN_KEY", raising=False)
    assert admin_keys(ServerConfig()) == ()
    file = tmp_path / "admins"
    file.write_text("root\n")
    monkeypatch.setenv("MINSERVE_ADMIN_KEY", "boss")
    config = ServerConfig(admin_keys_file=str(file))
    assert (admin_keys(config), api_keys(config)) == (("boss", "root"), ())
    monkeypatch.setenv("MINSERVE_API_KEY", "root")
    with pytest.raises(ValueError, match="an admin key must be none of the API keys"):
        admin_keys(config)


def test_changed_shows_what_is_off_default(tmp_path: Path) -> None:
    changed = load_config(write(tmp_path, server("port: 1"))).changed()
    assert changed["server.port"] == 1
    assert "server.host" not in changed
    assert changed["models[0].name"] == "a"


def test_device_is_picked() -> None:
    assert pick_device("cuda:3") == "cuda:3"
    assert pick_device("auto") in ("cpu", "cuda:0")
