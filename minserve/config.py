"""The one configuration: what serve, place, simulate and replay read from a YAML file, as frozen dataclasses.

`load_config(path)` reads a file, `Config.single(path)` makes the same from a model's folder; both raise ValueError
naming the key, the value and the choices.  Every key is explained in examples/full.yaml.  Precedence: command line,
then a model's own keys, then `defaults`, then the defaults below.  From the environment come secrets only.
"""

import dataclasses
import glob
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minserve.groups import GroupConfig, read_groups
from minserve.overrides import GROUP_SIZE, OVERRIDES, by_layer
from minserve.policy_keys import OPTIONS, POLICY, Options, check_policy
from minserve.schema import (
    NAME,
    At,
    boolean,
    check_keys,
    choice,
    claim,
    file_path,
    integer,
    key,
    kinds,
    listing,
    maybe,
    number,
    read_section,
    read_yaml,
    refuse,
    section,
    size,
    text,
)
from sched.quota import POLICIES as QUOTAS
from sched.step_time import DEVICES

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
# of a replica: the model's and its GPU's; a file names models only
REPLICA = text(
    r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}(@[A-Za-z0-9._:/-]{1,128})?",
    "a name of letters, digits and . _ : / -, at most 128 of them",
)
FLOATS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
DTYPE = choice("auto", "fp32", "bf16", "fp16", **FLOATS)
KV_DTYPE = choice("auto", "fp32", "bf16", "fp16", "fp8", "int8", "int4", "int4z", **FLOATS)
KV_OVERRIDES = by_layer("KV formats", lambda value: KV_DTYPE.read(At("", Path()), value))
MAPPINGS = ("quantization_overrides", "kv_dtype_overrides")
QUANTIZATION = choice(
    "auto", "none", "w8a8-int8", "w8a8-fp8", "w4a8-int8", "w4a8-fp8", w8a8="w8a8-int8", w4a8="w4a8-int8"
)
LM_HEAD = choice("auto", "int8", "fp8")
SHARING = choice("auto", "none", "mps", "mps-static", "green")
DEVICE = text(r"auto|cpu|cuda:[0-9]{1,2}", "one of auto, cpu, cuda:0, cuda:1, ...")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The front end.  Bytes and seconds; `max_queued_requests` counts running and waiting ones of all models."""

    host: str = key(text(r"[A-Za-z0-9._:%\[\]-]{1,255}", "a host name or address"), "127.0.0.1")
    port: int = key(integer(0, 65535), 8000)
    api_keys_file: str | None = key(maybe(file_path()), None)
    admin_keys_file: str | None = key(maybe(file_path()), None)
    max_body_bytes: int = key(size(KiB, GiB), 2 * MiB)
    max_queued_requests: int = key(integer(1, 1_000_000), 4096)
    shutdown_timeout_s: float = key(number(0, 3600), 30.0)
    log_level: str = key(choice("debug", "info", "warning", "error", warn="warning"), "info")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuConfig:
    """One KV slab pool and the device it lies on.  None stands for "auto"."""

    name: str = key(maybe(NAME), None)  # gpu0, gpu1, ... in the order of the file when not given
    device: str = key(DEVICE, "auto")
    kind: str | None = key(maybe(choice(*DEVICES), "auto"), None)
    memory_bytes: int | None = key(maybe(size(64 * KiB, TiB), "auto"), None)
    pool_bytes: int | None = key(maybe(size(64 * KiB, TiB), "auto"), None)
    memory_fraction: float = key(number(0.05, 0.99), 0.9)
    slab_bytes: int | None = key(maybe(size(4 * KiB, GiB, multiple=4 * KiB), "auto"), None)
    quota: str = key(choice(*QUOTAS), "marginal")
    sharing: str = key(SHARING, "auto")
    prefill_token: bool | None = key(maybe(boolean(), "auto"), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """One machine: one agent, and a pool for each of `gpus`."""

    name: str = key(NAME)
    gpus: tuple[GpuConfig, ...] = key(listing(section(GpuConfig), 16, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """A request attains its SLO when its first token comes within `ttft_ms` and the next ones every `tpot_ms`."""

    ttft_ms: float = key(number(1, 3_600_000), 10_000.0)
    tpot_ms: float = key(number(0.1, 3_600_000), 1_000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean tokens of a request and their standard deviations over the means, for planning."""

    prompt_tokens: float = key(number(1, 1e7), 512.0)
    output_tokens: float = key(number(1, 1e7), 128.0)
    prompt_variation: float = key(number(0, 10), 0.53)
    output_variation: float = key(number(0, 10), 1.29)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One served model.  `max_model_len` None: the checkpoint's window.  `placement` empty: the first GPU."""

    name: str = key(REPLICA)
    path: str = key(file_path())
    aliases: tuple[str, ...] = key(listing(NAME, 16), ())
    tokenizer: str | None = key(maybe(file_path()), None)
    chat_template: str | None = key(maybe(file_path()), None)
    dtype: str = key(DTYPE, "auto")
    quantization: str = key(QUANTIZATION, "auto")
    quantization_group_size: int | str | None = key(maybe(GROUP_SIZE, "auto"), None)
    quantization_overrides: tuple[tuple[str, str], ...] = key(OVERRIDES, ())
    lm_head: str = key(LM_HEAD, "auto")
    kv_dtype: str = key(KV_DTYPE, "auto")
    kv_dtype_overrides: tuple[tuple[str, str], ...] = key(KV_OVERRIDES, ())
    kv_block_tokens: int | None = key(maybe(integer(16, 256), "auto"), None)
    int8_qk: bool = key(boolean(), False)
    fp8_prefill: bool = key(boolean(), False)
    fp8_queries: bool = key(boolean(), False)
    max_model_len: int | None = key(maybe(integer(1, 1 << 24), "auto"), None)
    max_num_seqs: int = key(integer(1, 65536), 256)
    max_num_batched_tokens: int = key(integer(1, 1 << 20), 2048)
    max_queued_requests: int = key(integer(1, 1_000_000), 2048)
    max_queued_tokens: int = key(integer(1, 1 << 40), 4_000_000)
    reserve_tokens: int = key(integer(0, 1 << 24), 8192)
    policy: str = key(POLICY, "slack")
    policy_options: Options = key(OPTIONS, ())
    deterministic: bool = key(boolean(), False)
    enable_prefix_caching: bool = key(boolean(), True)
    cuda_graphs: bool = key(boolean(), True)
    seed: int | None = key(maybe(integer(0, (1 << 63) - 1)), None)
    load_at_start: bool = key(boolean(), True)
    profile: str | None = key(maybe(file_path()), None)
    placement: tuple[str, ...] = key(listing(NAME, 64), ())
    slo: Slo = key(section(Slo), factory=Slo)
    rate: float | None = key(maybe(number(0, 1e6)), None)
    lengths: Lengths = key(section(Lengths), factory=Lengths)
    group: str | None = key(maybe(NAME), None)
    tier: int = key(integer(0, 99), 0)
    sm_share: int | None = key(maybe(integer(1, 100), "auto"), None)
    replicas: int | None = key(maybe(integer(1, 64), "auto"), None)
    tp: int | None = key(maybe(integer(1, 8), "auto"), None)

    @classmethod
    def read(cls, value: Mapping[str, Any], base: Path | None = None) -> "ModelEntry":
        """From keys as the file has them, or from `dataclasses.asdict` of one."""
        return check_model(read_section(cls, dict(value), At("", base or Path.cwd())), At("", Path()))

    @property
    def model(self) -> str:
        """Whose replica it is: its own name but for NAME@GPU."""
        return self.name.partition("@")[0]


def check_model(model: ModelEntry, at: At) -> ModelEntry:
    """What one key alone cannot show."""
    if model.max_num_batched_tokens < model.max_num_seqs:
        limit = f"at least max_num_seqs={model.max_num_seqs}: each running sequence needs a row in a step"
        raise refuse(at.sub("max_num_batched_tokens"), limit, model.max_num_batched_tokens)
    check_policy(model.policy, model.policy_options, at)
    schemes = (model.quantization, *(scheme for _, scheme in model.quantization_overrides))
    if model.quantization_group_size is not None and not any(s.startswith("w4") for s in schemes):
        limit = "auto where no layer is quantized to w4a8-int8 or w4a8-fp8"
        raise refuse(at.sub("quantization_group_size"), limit, model.quantization_group_size)
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole file after `defaults`; names are unique, every GPU has its name, every placement names a GPU.

    `groups`: those of the file, then those that models name without one of theirs there.
    """

    server: ServerConfig = ServerConfig()
    nodes: tuple[NodeConfig, ...]
    models: tuple[ModelEntry, ...]
    groups: tuple[GroupConfig, ...] = ()

    @property
    def gpus(self) -> tuple[GpuConfig, ...]:
        """All pools of the file, in its order."""
        return tuple(gpu for node in self.nodes for gpu in node.gpus)

    def gpu_of(self, model: ModelEntry) -> GpuConfig:
        """The pool of the model's first replica."""
        wanted = model.placement[0] if model.placement else self.gpus[0].name
        return next(gpu for gpu in self.gpus if gpu.name == wanted)

    @classmethod
    def single(
        cls,
        model_path: str | Path,
        *,
        server: Mapping[str, Any] | None = None,
        gpu: Mapping[str, Any] | None = None,
        **model: Any,
    ) -> "Config":
        """One model in the folder `model_path`, on one pool; `model`, `server` and `gpu` hold keys of the file."""
        base = At("", Path.cwd())
        folder = Path(model_path).expanduser().resolve()
        entry = ModelEntry.read({"name": model.pop("name", None) or folder.name, "path": str(folder)} | model)
        pool = read_section(GpuConfig, dict(gpu or {}), base)
        node = NodeConfig(name="local", gpus=(dataclasses.replace(pool, name=pool.name or "gpu0"),))
        return cls(
            server=read_section(ServerConfig, dict(server or {}), base), nodes=(node,), models=(entry,)
        )

    def with_server(self, **given: Any) -> "Config":
        """The same with keys of `server` replaced by those of the command line; None means not given."""
        keys = {name: value for name, value in given.items() if value is not None}
        server = read_section(ServerConfig, dataclasses.asdict(self.server) | keys, At("server", Path.cwd()))
        return dataclasses.replace(self, server=server)

    def with_models(self, **given: Any) -> "Config":
        """The same with these keys for every model, in place of its own."""
        models = (ModelEntry.read(dataclasses.asdict(m) | given) for m in self.models)
        return dataclasses.replace(self, models=tuple(models))

    def replicated(self) -> "Config":
        """The same with an entry for each replica: NAME@GPU, on that GPU alone, where a model has several."""
        models: list[ModelEntry] = []
        for m in self.models:
            several = len(m.placement) > 1
            models += (
                dataclasses.replace(m, name=f"{m.name}@{gpu}" if several else m.name, placement=(gpu,))
                for gpu in m.placement or (self.gpu_of(m).name or "",)
            )
        return dataclasses.replace(self, models=tuple(models))

    def check_here(self) -> None:
        """This machine can serve it: every path exists, and there is one node."""
        if len(self.nodes) > 1:
            raise ValueError(
                f"nodes must be one node to be served, got {len(self.nodes)}: place and simulate take more"
            )
        for i, m in enumerate(self.models):
            if m.tp not in (None, 1):
                raise refuse(
                    At(f"models[{i}].tp", Path()), "1 to be served: place and simulate take more", m.tp
                )
        for at, value, folder in self._paths():
            if value is not None and not (Path(value).is_dir() if folder else Path(value).exists()):
                raise ValueError(
                    f"{at} must be {'a local folder' if folder else 'a file'} that exists, got {value!r}"
                )

    def _paths(self) -> list[tuple[str, str | None, bool]]:
        found: list[tuple[str, str | None, bool]] = [
            ("server.api_keys_file", self.server.api_keys_file, False),
            ("server.admin_keys_file", self.server.admin_keys_file, False),
        ]
        for i, m in enumerate(self.models):
            found += [(f"models[{i}].path", m.path, True), (f"models[{i}].tokenizer", m.tokenizer, False)]
            found.append((f"models[{i}].chat_template", m.chat_template, False))
            found.append((f"models[{i}].profile", m.profile, False))
        return found

    def changed(self) -> dict[str, Any]:
        """Dotted key to value, for every key that is not at its default.  Holds no secret."""
        found = dict(_changed(self.server, "server."))
        for i, gpu in enumerate(self.gpus):
            found |= _changed(gpu, f"gpus[{i}].")
        for i, model in enumerate(self.models):
            found |= _changed(model, f"models[{i}].")
        for i, group in enumerate(self.groups):
            found |= _changed(group, f"groups[{i}].")
        return found


def _changed(value: Any, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        own = getattr(value, f.name)
        if dataclasses.is_dataclass(own):
            found |= _changed(own, f"{prefix}{f.name}.")
        elif own != f.default:
            found[prefix + f.name] = own
    return found


# keys that only a model itself may have
OWN_KEYS = ("name", "path", "aliases")
TOP_KEYS = ["server", "nodes", "defaults", "models", "groups"]


def load_config(path: str | Path) -> Config:
    """The configuration in a YAML file.  ValueError, starting with the file's name, where it is not one."""
    path = Path(path)
    try:
        return parse_config(read_yaml(path), path.resolve().parent)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_config(value: Any, base: Path) -> Config:
    """The configuration in plain values, with paths relative to the folder `base`."""
    top = At("", base)
    given = check_keys(value, TOP_KEYS, top)
    server = read_section(ServerConfig, given.get("server"), top.sub("server"))
    nodes = _read_nodes(given.get("nodes"), top.sub("nodes"))
    models = _read_models(given.get("models"), given.get("defaults"), top)
    taken = _check_names(models, [gpu.name or "" for node in nodes for gpu in node.gpus])
    groups = read_groups(given.get("groups"), [m.group for m in models], taken, top.sub("groups"))
    return Config(server=server, nodes=nodes, models=models, groups=groups)


def _read_nodes(value: Any, at: At) -> tuple[NodeConfig, ...]:
    if value is None:
        value = [{"name": "local", "gpus": [{}]}]
    nodes = listing(section(NodeConfig), 256, 1).read(at, value)
    seen: dict[str, str] = {}
    named = []
    for i, node in enumerate(nodes):
        claim(seen, node.name, at.item(i).sub("name"))
        gpus = []
        for j, gpu in enumerate(node.gpus):
            name = gpu.name or f"gpu{sum(len(n.gpus) for n in nodes[:i]) + j}"
            claim(seen, name, at.item(i).sub("gpus").item(j).sub("name"))
            gpus.append(dataclasses.replace(gpu, name=name))
        named.append(dataclasses.replace(node, gpus=tuple(gpus)))
    return tuple(named)


def _read_models(value: Any, defaults: Any, top: At) -> tuple[ModelEntry, ...]:
    known = kinds(ModelEntry)
    shared = check_keys(defaults, [k for k in known if k not in OWN_KEYS], top.sub("defaults"))
    for name, default in shared.items():
        known[name].read(top.sub("defaults").sub(name), default)
    at = top.sub("models")
    if not isinstance(value, list) or not 1 <= len(value) <= 64:
        raise refuse(at, "a list of 1 to 64 models", value)
    models = []
    for i, own in enumerate(value):
        own = check_keys(own, list(known), at.item(i))
        merged = read_section(ModelEntry, _merge(shared, own), at.item(i))
        models.append(check_model(merged, at.item(i)))
    return tuple(models)


def _merge(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A model's own keys over the defaults; `slo`, `lengths` and overrides key by key, its own first."""
    merged = shared | own
    for name in shared.keys() & own.keys():
        if isinstance(shared[name], dict) and isinstance(own[name], dict):
            merged[name] = own[name] | {k: v for k, v in shared[name].items() if k not in own[name]}
    return merged


def _check_names(models: tuple[ModelEntry, ...], gpus: list[str]) -> dict[str, str]:
    """Every name to the key that has it."""
    seen: dict[str, str] = {}
    for i, model in enumerate(models):
        at = At("models", Path()).item(i)
        NAME.read(at.sub("name"), model.name)
        claim(seen, model.name, at.sub("name"))
        for j, alias in enumerate(model.aliases):
            claim(seen, alias, at.sub("aliases").item(j))
        for j, gpu in enumerate(model.placement):
            choice(*gpus).read(at.sub("placement").item(j), gpu)
        if len(set(model.placement)) < len(model.placement):
            raise refuse(at.sub("placement"), "different GPUs", model.placement)
    return seen


def pick_device(device: str) -> str:
    """`auto` becomes cuda:0 where torch can use it, else cpu.  Asks in a child: this process must not open CUDA."""
    if device != "auto":
        return "cuda:0" if device == "cuda" else device
    if not glob.glob("/dev/nvidia[0-9]*") and not os.path.exists("/dev/dxg"):
        return "cpu"
    ask = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, timeout=120, check=False)
    return "cuda:0" if found.returncode == 0 else "cpu"
