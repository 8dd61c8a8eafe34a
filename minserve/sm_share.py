"""How the workers of one pool share the multiprocessors of its GPU: one interface over four modes.  No torch, no CUDA.

none: the driver cuts time between them.  mps: they run at once, each capped at a share.  mps-static: partitions of whole
chunks, disjoint.  green: each has a green context of its own in its own process, and time is cut all the same.
docs/sm-shares.md says what each is worth; `python -m minserve.probe` what a machine allows.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from minserve.config import GpuConfig
from minserve.keeper import ROOT
from minserve.memory import MiB, weight_bytes, workspace
from minserve.mps import Daemon, MpsError
from minserve.probe import Found, Gpu, Mps, choose
from minserve.resolve import ResolvedModel
from sched.sm_shares import divide, in_chunks

BOOT = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import minserve; sys.path.pop(0); "
    "from minserve.probe import main; sys.exit(main())"
)
PROBE_S = 120.0
# of what a worker is reckoned to hold of its own: the limit is for one that has run wild
SLACK = 1.25
NO_DAEMON = "none"  # a folder of ours without a daemon: whoever looks there runs beside MPS


@dataclass(frozen=True, slots=True)
class SmSharing:
    """`shares`: per cent of the SMs, and `groups`: (first, count) of a green context, by model; empty where not divided."""

    mode: str
    why: str
    shares: dict[str, int] = field(default_factory=dict)
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    partitions: dict[str, str] = field(default_factory=dict)
    ordinal: int = 0
    daemon: Daemon | None = None

    def environ(self, name: str, limit: int | None = None) -> dict[str, str]:
        """Beside the agent's own, for the worker of a model; `limit`: bytes that it may allocate or import."""
        found = dict(self.base)
        if self.mode == "mps":
            found["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(self.shares.get(name, 100))
        if self.mode == "mps-static":
            found["CUDA_MPS_SM_PARTITION"] = self.partitions[name]
        if self.mode.startswith("mps") and limit is not None:
            found["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = f"{self.ordinal}={-(-limit // MiB)}M"
        return found

    @property
    def keeper_environ(self) -> dict[str, str]:
        """For processes that only look or allocate."""
        return self.base | (
            {"CUDA_MPS_SM_PARTITION": p} if (p := next(iter(self.partitions.values()), "")) else {}
        )

    def describe(self) -> str:
        parts = {name: f"{share} %" for name, share in self.shares.items()}
        shown = ", ".join(f"{name} {part}" for name, part in parts.items())
        return f"sharing {self.mode} ({self.why}){': ' + shown if shown else ''}"

    def close(self) -> None:
        """Gives the partitions back.  A daemon that has gone meanwhile has none any more."""
        for partition in self.partitions.values():
            with contextlib.suppress(MpsError):
                assert self.daemon is not None, "partitions have a daemon"
                self.daemon.remove_partition(partition)


def ask_probe(ordinal: int) -> Found:
    """In a child: this process must not open CUDA.  RuntimeError where there is no such GPU."""
    command = [sys.executable, "-P", "-c", BOOT, "--device", str(ordinal)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"GPU {ordinal} did not answer its probe within {PROBE_S:.0f} s") from None
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"cuda:{ordinal} cannot be used: {done.stderr.strip()[-500:]}")
    said = json.loads(lines[-1])
    said["gpu"]["green_sms"] = tuple(said["gpu"]["green_sms"])
    return Found(Gpu(**said["gpu"]), Mps(**said["mps"]), said["modes"])


def own_bytes(model: ResolvedModel) -> int:
    """What a worker may hold of a GPU beside its share of the pool."""
    return int(SLACK * (weight_bytes(model) + workspace(model).total))


def open_sharing(
    gpu: GpuConfig,
    device: str,
    models: Sequence[ResolvedModel],
    *,
    ask: Callable[[int], Found] = ask_probe,
    environ: Mapping[str, str] | None = None,
) -> SmSharing:
    """ValueError where the mode that is configured cannot be had here, RuntimeError where the GPU or MPS fails."""
    if not device.startswith("cuda"):
        if gpu.sharing not in ("auto", "none"):
            raise ValueError(f"sharing must be auto or none on {device}, got {gpu.sharing!r}: it is a GPU's")
        return SmSharing("none", "no GPU")
    ordinal = int(device.removeprefix("cuda:"))
    found = ask(ordinal)
    mode, why = choose(gpu.sharing, found.modes, device)
    given = {m.entry.name: m.entry.sm_share for m in models}
    weights = {m.entry.name: float(weight_bytes(m)) for m in models}
    daemon = Daemon(environ)
    beside = {"CUDA_MPS_PIPE_DIRECTORY": str(daemon.root / NO_DAEMON)}
    if mode == "none":
        return SmSharing(mode, why, base=beside, ordinal=ordinal)
    shares = divide(given, weights, disjoint=mode != "mps")
    if mode == "mps":
        return SmSharing(mode, why, shares, base=daemon.client_environ, ordinal=ordinal, daemon=daemon)
    if mode == "green":
        return SmSharing(mode, why, shares, green_groups(shares, found.gpu), beside, ordinal=ordinal)
    partitions = make_partitions(daemon, found.gpu.mps_uuid, shares)
    return SmSharing(mode, why, shares, {}, daemon.client_environ, partitions, ordinal, daemon)


def green_groups(shares: Mapping[str, int], gpu: Gpu) -> dict[str, tuple[int, int]]:
    """Neighbouring groups of the split that every worker makes for itself, and that is the same in all."""
    groups, first = {}, 0
    for name, count in in_chunks(shares, len(gpu.green_sms)).items():
        groups[name] = (first, count)
        first += count
    return groups


def make_partitions(daemon: Daemon, uuid: str, shares: Mapping[str, int]) -> dict[str, str]:
    """A partition for each model.  Those of servers that were killed, without a client, are given back first."""
    known = daemon.partitions()
    gpu = next((g for g in known if g == uuid or uuid.startswith(g)), None)
    if gpu is None:
        raise MpsError(
            f"the MPS daemon in {daemon.pipe} has no partitions of {uuid}, only of {', '.join(known)}"
        )
    for own in known[gpu].idle:
        daemon.remove_partition(f"{gpu}/{own}")
    found: dict[str, str] = {}
    try:
        for name, count in in_chunks(shares, daemon.partitions()[gpu].free_chunks).items():
            found[name] = daemon.add_partition(uuid, count)
    except BaseException:
        for partition in found.values():
            daemon.remove_partition(partition)
        raise
    return found
