"""`python -m minserve.probe`: what a GPU and its driver allow models to share, and how each mode was judged.  No torch.

For each mode of `sharing` it prints yes, or why not; the agent asks the same before it opens a pool.  `--exports`
also hands memory from one process to two others, by file descriptor and by the legacy handle, beside MPS and, where a
daemon runs, under it.  The last line is one JSON object.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_char, c_int, c_size_t, c_ubyte, c_uint64
from dataclasses import asdict, dataclass, field
from typing import Any

from minserve.cuda_memory import (
    KINDS,
    POSIX_FD_SUPPORTED,
    VMM_SUPPORTED,
    CudaError,
    Driver,
    PoolHandle,
    context,
    find_device,
    import_memory,
    open_driver,
)
from minserve.green import Resource, split
from minserve.keeper import BOOT as KEEPER_BOOT
from minserve.keeper import ROOT, Keeper
from minserve.mps import Daemon, MpsError

MODES = ("none", "mps", "mps-static", "green")
# CUdevice_attribute
SM_COUNT, COMPUTE_MODE, MAJOR, MINOR, MPS_ENABLED = 16, 20, 75, 76, 133
COMPUTE_MODES = {0: "default", 2: "prohibited", 3: "exclusive-process"}
STATIC_DRIVER, STATIC_CAPABILITY = 13010, 80  # CUDA 13.1
GREEN_DRIVER = 12040
TEST_BYTES = 2 << 20
BOOT = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import minserve; sys.path.pop(0); "
    "from minserve.probe import touch; touch()"
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """`driver` as CUDA counts: 13010 is 13.1.  `green_sms`: of each group of the split, none where there is no split."""

    device: int
    name: str
    uuid: str
    driver: int
    capability: int
    sms: int
    compute_mode: str
    vmm: bool
    posix_fd: bool
    in_mps: bool
    green_sms: tuple[int, ...] = ()
    green_why: str = ""

    @property
    def mps_uuid(self) -> str:
        """As NVIDIA's tools spell it."""
        u = self.uuid
        return f"GPU-{u[:8]}-{u[8:12]}-{u[12:16]}-{u[16:20]}-{u[20:]}"


@dataclass(frozen=True, slots=True)
class Mps:
    """`pid` None: no daemon, or one that does not answer; `why` says."""

    pid: int | None
    static: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    gpu: Gpu
    mps: Mps
    modes: dict[str, str] = field(default_factory=dict)  # "" where it can be had, else why not


def look_at_gpu(driver: Driver, ordinal: int) -> Gpu:
    """Opens no context where it need not.  CudaError where there is no such device."""
    device, uuid = find_device(driver, ordinal)
    name, version = (c_char * 256)(), c_int()
    driver("cuDeviceGetName", name, c_int(len(name)), device)
    driver("cuDriverGetVersion", byref(version))
    groups: tuple[int, ...] = ()
    why = ""
    if version.value < GREEN_DRIVER or not driver.knows("cuGreenCtxCreate"):
        why = f"the driver is of CUDA {version.value // 1000}.{version.value % 1000 // 10}, 12.4 or later is needed"
    else:
        try:
            groups = tuple(int(g.sms) for g in groups_of(driver, device))
        except CudaError as error:
            why = str(error)
    mode = driver.attribute(device, COMPUTE_MODE)
    try:
        in_mps = bool(driver.attribute(device, MPS_ENABLED))
    except CudaError:
        in_mps = False  # a driver too old to say
    return Gpu(
        device=ordinal,
        name=name.value.decode(errors="replace"),
        uuid=uuid,
        driver=version.value,
        capability=10 * driver.attribute(device, MAJOR) + driver.attribute(device, MINOR),
        sms=driver.attribute(device, SM_COUNT),
        compute_mode=COMPUTE_MODES.get(mode, str(mode)),
        vmm=bool(driver.attribute(device, VMM_SUPPORTED)),
        posix_fd=bool(driver.attribute(device, POSIX_FD_SUPPORTED)),
        in_mps=in_mps,
        green_sms=groups,
        green_why=why,
    )


def groups_of(driver: Driver, device: c_int) -> "ctypes.Array[Resource]":
    try:
        return split(driver, device)
    except CudaError:
        with context(driver, device):  # where the question needs one
            return split(driver, device)


def look_at_mps(daemon: Daemon) -> Mps:
    try:
        status = daemon.status()
    except MpsError as error:
        return Mps(None, False, str(error))
    if status is not None:
        return Mps(status.pid, status.static)
    if daemon.binary is None:
        return Mps(None, False, "nvidia-cuda-mps-control is not on PATH")
    return Mps(None, False, f"no daemon in {daemon.pipe}: python -m minserve.mps start")


def judge(gpu: Gpu, mps: Mps) -> dict[str, str]:
    """For each mode "" or why it cannot be had."""
    found = dict.fromkeys(MODES, "")
    if gpu.compute_mode != "default":
        found["none"] = f"the compute mode is {gpu.compute_mode}: without MPS one process has the GPU alone"
        found["green"] = found["none"]
    found["green"] = found["green"] or gpu.green_why
    found["mps"] = mps.why or (
        "the daemon has static partitions: stop it, then start it without --static" if mps.static else ""
    )
    if gpu.driver < STATIC_DRIVER:
        found["mps-static"] = f"the driver is of CUDA {gpu.driver / 1000:.1f}, 13.1 or later is needed"
    elif gpu.capability < STATIC_CAPABILITY:
        found["mps-static"] = f"it needs sm_80 or later, the GPU is sm_{gpu.capability}"
    else:
        found["mps-static"] = mps.why or (
            "" if mps.static else "the daemon has no static partitions: stop it, then start it with --static"
        )
    if gpu.compute_mode == "prohibited":
        found = dict.fromkeys(MODES, "the compute mode is prohibited: nobody may use the GPU")
    return found


def probe(ordinal: int, environ: Mapping[str, str] | None = None, driver: Driver | None = None) -> Found:
    gpu = look_at_gpu(driver or open_driver(), ordinal)
    mps = look_at_mps(Daemon(environ))
    return Found(gpu, mps, judge(gpu, mps))


def choose(wanted: str, modes: Mapping[str, str], device: str) -> tuple[str, str]:
    """(mode, why).  `auto`: MPS where a daemon answers, else none.  ValueError where what is wanted cannot be had."""
    able = [mode for mode, why in modes.items() if not why]
    if wanted != "auto":
        if wanted not in able:
            raise ValueError(
                f"sharing must be one of auto, {', '.join(able)} on {device}, got {wanted!r}: {modes[wanted]}"
            )
        return wanted, "as configured"
    for mode in ("mps", "mps-static"):
        if mode in able:
            return mode, "auto: an MPS daemon answers"
    if "none" in able:
        return "none", f"auto: {modes['mps']}"
    raise ValueError(f"sharing cannot be auto on {device}: {modes['none']}; mps: {modes['mps']}")


# ---- handing memory from process to process


def exports(
    gpu: int, environ: Mapping[str, str], boots: tuple[str, str] = (KEEPER_BOOT, BOOT)
) -> dict[str, str]:
    """Of each kind of handle "" or what failed, between processes of this environment."""
    found = {}
    for kind in KINDS:
        try:
            keeper = Keeper(gpu, TEST_BYTES, kind=kind, environ=environ, boot=boots[0])
        except RuntimeError as error:
            found[kind] = str(error)
            continue
        try:
            # what the first writes the second must read
            said = [_touch(gpu, keeper, verb, environ, boots[1]) for verb in ("write", "read")]
            found[kind] = next((s for s in said if s), "")
        finally:
            keeper.close()
    return found


def _touch(gpu: int, keeper: Keeper, verb: str, environ: Mapping[str, str], boot: str) -> str:
    arguments = [verb, str(gpu), keeper.handle.to_json(), *map(str, keeper.fds)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", boot, *arguments],
        env=dict(environ),
        pass_fds=keeper.fds,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return "" if done.returncode == 0 else f"{verb}: {' '.join(done.stderr.split())[-300:]}"


def touch(opened: Callable[[], Driver] = open_driver) -> None:
    """The process of `exports`: maps what it is given, and writes or reads its last bytes."""
    verb, gpu, handle, *fds = sys.argv[1:]
    driver = opened()
    memory = import_memory(driver, int(gpu), PoolHandle.from_json(handle), tuple(map(int, fds)))
    device, _ = find_device(driver, int(gpu))
    last, got = c_uint64(memory.pointer + memory.num_bytes - 16), (c_ubyte * 16)()
    with context(driver, device):
        if verb == "write":
            driver("cuMemsetD8_v2", last, c_ubyte(0xA5), c_size_t(16))
        driver("cuMemcpyDtoH_v2", ctypes.cast(got, ctypes.c_void_p), last, c_size_t(16))
    memory.release()
    if bytes(got) != b"\xa5" * 16:
        sys.exit(f"read {bytes(got).hex()} in place of a5 from memory that another process has written")


def exports_each_way(found: Found, ordinal: int) -> dict[str, dict[str, str]]:
    """`exports` beside MPS, and under it where a daemon runs."""
    daemon, environ = Daemon(), dict(os.environ)
    beside = environ | {"CUDA_MPS_PIPE_DIRECTORY": str(daemon.root / "none")}
    done = {"beside MPS": exports(ordinal, beside)}
    if found.mps.pid is None:
        return done
    under, partition = environ | daemon.client_environ, None
    if found.mps.static:
        partition = daemon.add_partition(found.gpu.mps_uuid, 1)
        under["CUDA_MPS_SM_PARTITION"] = partition
    try:
        done["under MPS"] = exports(ordinal, under)
    finally:
        if partition is not None:
            daemon.remove_partition(partition)
    return done


# ---- the command


def describe(found: Found) -> list[str]:
    g, m = found.gpu, found.mps
    lines = [
        f"GPU {g.device}: {g.name}, sm_{g.capability}, {g.sms} SMs visible, compute mode {g.compute_mode}",
        f"  driver of CUDA {g.driver // 1000}.{g.driver % 1000 // 10}, this process is {'' if g.in_mps else 'not '}under MPS",
        f"  memory by file descriptor: {'yes' if g.vmm and g.posix_fd else 'no, by legacy handle'}",
        f"  MPS daemon: {m.why if m.pid is None else f'{m.pid}, static partitions' if m.static else m.pid}",
        f"  green contexts: {g.green_why or f'{len(g.green_sms)} groups of {g.green_sms[0]} SMs'}",
    ]
    return lines + [
        f"  sharing {mode}: {f'no, {why}' if why else 'yes'}" for mode, why in found.modes.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 2 where there is no GPU to look at."""
    parser = argparse.ArgumentParser(prog="python -m minserve.probe", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", type=int, default=0, metavar="N")
    parser.add_argument("--exports", action="store_true", help="hand memory from process to process, too")
    args = parser.parse_args(argv)
    try:
        found = probe(args.device)
    except CudaError as error:
        sys.stderr.write(f"minserve: {error}\n")
        sys.stdout.write(json.dumps({"error": str(error), "modes": ["none"]}) + "\n")
        return 2
    report: dict[str, Any] = asdict(found)
    sys.stdout.write("\n".join(describe(found)) + "\n")
    if args.exports:
        report["exports"] = exports_each_way(found, args.device)
        for way, kinds in report["exports"].items():
            sys.stdout.writelines(f"  exported {way}, {k}: {why or 'works'}\n" for k, why in kinds.items())
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
