"""The agent of a machine: its slab pools, and a host for each model's worker.  No CUDA, no torch.

A module in the front end's process.  It plans a pool for the models that share it, creates the table and the bytes
(memfds; a GPU's bytes are its keeper's), and hands the descriptors to the workers.  A model whose files are wrong
fails alone.
"""

import asyncio
import dataclasses
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from minserve.config import Config, GpuConfig, ModelEntry, pick_device
from minserve.host import BOOT, Host
from minserve.keeper import Keeper
from minserve.lock_watch import LockWatch
from minserve.memory import weight_bytes, workspace
from minserve.pool_segments import DeviceRoom, PoolSegments
from minserve.prefill_token import turn_off
from minserve.quota_writer import QuotaWriter
from minserve.residency import Residency
from minserve.resolve import ResolvedModel, host_pool_bytes, plan_pool, resolve_model, settle_blocks
from minserve.shared_memory import create_memfd
from minserve.slab_counts import PoolCounts
from minserve.slab_table import SlabTable
from minserve.sm_share import SmSharing, open_sharing, own_bytes
from minserve.wire import Start
from sched.slabs import PoolPlan

log = logging.getLogger("minserve")

# a stopped worker may sit on the table's lock: nobody waits for it longer than this at a time
LOCK_TIMEOUT_S = 2.0
LOOK_AT_LOCK_S = 0.2


@dataclass(frozen=True, slots=True)
class Pool:
    """One GPU's slab pool, or the host's.  `fds` and `handle` are what a worker needs to map its bytes."""

    name: str
    device: str
    plan: PoolPlan
    table: SlabTable
    fds: tuple[int, ...]
    handle: str = ""
    keeper: Keeper | None = None
    sharing: SmSharing | None = None

    def describe(self) -> list[str]:
        plan = self.plan
        size = f"{plan.pool_bytes / 2**20:,.0f} MiB on {self.device}"
        lines = [f"pool {self.name}: {size}, {plan.num_slabs:,} slabs of {plan.slab_bytes / 1024:,.0f} KiB"]
        lines += [f"  {self.sharing.describe()}"] if self.sharing is not None else []
        for name, shape in plan.models.items():
            lines.append(
                f"  {name}: {shape.layers} slabs a set, {shape.set_tokens:,} tokens a set in blocks of "
                f"{shape.block_tokens}, "
                f"{shape.reserve_sets} of {plan.max_sets(name)} sets reserved, tail {shape.tail_waste:.1%}"
            )
        return lines

    def close(self) -> None:
        """After the workers have ended."""
        if self.keeper is not None:
            self.keeper.close()
        else:
            os.close(self.fds[0])
        self.table.close()
        if self.sharing is not None:
            self.sharing.close()


def pool_bytes(
    gpu: GpuConfig, device: str, models: list[ResolvedModel], environ: Mapping[str, str] | None = None
) -> int:
    """As configured, else what there is; RuntimeError where a GPU cannot be asked."""
    on_gpu = device.startswith("cuda")
    return gpu.pool_bytes or (gpu_pool_bytes(device, gpu, models, environ) if on_gpu else host_pool_bytes())


def open_pool(
    gpu: GpuConfig, device: str, models: list[ResolvedModel], size: int, sharing: SmSharing | None = None
) -> Pool:
    """ValueError where the models do not fit into `size` bytes; RuntimeError where a GPU does not give its memory."""
    on_gpu = device.startswith("cuda")
    plan = plan_pool(models, gpu, size)
    out = {m.entry.name for m in models if not m.entry.load_at_start}
    table, name = SlabTable.create(plan, out=out, timeout_s=LOCK_TIMEOUT_S), gpu.name or "pool"
    # workers of a CPU have threads of their own: two prompts at once are no slower, and one at a time leaves cores idle
    if not (on_gpu if gpu.prefill_token is None else gpu.prefill_token):
        turn_off(table)
    if not on_gpu:
        return Pool(name, device, plan, table, (create_memfd("minserve-slab-pool", plan.pool_bytes),))
    environ = {**os.environ, **({} if sharing is None else sharing.keeper_environ)}
    keeper = Keeper(int(device.removeprefix("cuda:")), plan.pool_bytes, environ=environ)
    return Pool(name, device, plan, table, keeper.fds, keeper.handle.to_json(), keeper, sharing)


def gpu_memory(device: str, environ: Mapping[str, str] | None = None) -> tuple[int, int]:
    """(bytes free, bytes in all), asked in a child: this process must not open CUDA.  RuntimeError without an answer."""
    ask = f"import torch; print(*torch.cuda.mem_get_info({device!r}))"
    env = {**os.environ, **(environ or {})}
    try:
        found = subprocess.run(
            [sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, check=False, env=env
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{device} does not say how much memory it has: {error}") from None
    if found.returncode != 0:
        raise RuntimeError(f"{device} cannot be used: {found.stderr.strip().splitlines()[-1:]}")
    free, total = map(int, found.stdout.split())
    return free, total


def device_room(
    pool: Pool, gpu: GpuConfig, models: list[ResolvedModel], hosts: list[Host]
) -> DeviceRoom | None:
    """None where the pool's memory cannot be given back in parts."""
    if pool.keeper is None or pool.keeper.needed():
        return None
    environ = {} if pool.sharing is None else pool.sharing.keeper_environ
    segments = PoolSegments(pool.table, pool.keeper, hosts)
    needs = {m.entry.name: weight_bytes(m) + workspace(m).total for m in models}
    keep = 1 - gpu.memory_fraction
    return DeviceRoom(
        segments, lambda: gpu_memory(pool.device, environ), needs, lambda total: int(total * keep)
    )


def gpu_pool_bytes(
    device: str, gpu: GpuConfig, models: list[ResolvedModel], environ: Mapping[str, str] | None = None
) -> int:
    """What is left of the GPU's fraction after the weights, as large as their files, and what each worker works in."""
    free, total = gpu_memory(device, environ)
    taken = sum(weight_bytes(m) + workspace(m).total for m in models)
    left = free - int(total * (1 - gpu.memory_fraction)) - taken
    if left <= 0:
        raise ValueError(
            f"{device} has {free / 2**30:.1f} GiB free, weights and processes of {len(models)} models take about "
            f"{taken / 2**30:.1f} GiB: nothing is left for the pool; serve fewer models or raise memory_fraction"
        )
    return left


class Agent:
    """`hosts` in the order of the configuration."""

    def __init__(self, config: Config, broken: dict[str, str], boot: str = BOOT) -> None:
        """`broken`: models that are known to fail, and why.  ValueError where a pool cannot hold its models."""
        self.pools: list[Pool] = []
        self.hosts: dict[str, Host] = {}
        self.residencies: dict[str, Residency] = {}  # of the hosts that have a place in a pool
        self._quotas: list[QuotaWriter] = []
        self._watches: list[LockWatch] = []
        self._keeping: list[asyncio.Task[None]] = []
        self._rids = itertools.count(1)
        self._debug = config.server.log_level == "debug"
        broken = dict(broken)
        for gpu in config.gpus:
            entries = [m for m in config.models if config.gpu_of(m) == gpu and m.name not in broken]
            if entries:
                self._open(gpu, entries, boot, broken)
        for name, reason in broken.items():
            self.hosts[name] = Host.failed(name, reason)
        self.hosts = {m.name: self.hosts[m.name] for m in config.models}

    def _open(self, gpu: GpuConfig, entries: list[ModelEntry], boot: str, broken: dict[str, str]) -> None:
        device = pick_device(gpu.device)
        resolved = []
        for entry in entries:
            try:
                resolved.append(resolve_model(entry, device))
            except (ValueError, OSError) as error:
                broken[entry.name] = str(error)
        if not resolved:
            return
        sharing = open_sharing(gpu, device, resolved)
        size = pool_bytes(gpu, device, resolved, sharing.keeper_environ)
        resolved = settle_blocks(resolved, gpu, size)
        pool = open_pool(gpu, device, resolved, size, sharing)
        self.pools.append(pool)
        rates = {m.entry.name: m.entry.rate for m in resolved if m.entry.rate is not None}
        self._quotas.append(QuotaWriter(pool.table, gpu.quota, rates))
        self._watches.append(LockWatch(pool.table.fd))
        hosts: list[Host] = []
        room = device_room(pool, gpu, resolved, hosts)
        for m in resolved:
            name, owner = m.entry.name, pool.table.owner_of(m.entry.name)
            keys = dataclasses.asdict(m.entry)
            start = Start(
                keys, device, owner, pool.table.fd, pool.fds, pool.handle, self._debug,
                sharing.mode, sharing.groups.get(name, (0, 0)),
            )  # fmt: skip
            # what is imported may be charged to the importer: the pool is within the limit
            environ = sharing.environ(name, own_bytes(m) + pool.plan.pool_bytes)
            self.hosts[name] = Host(name, start, boot, reclaimer(pool.table, owner), environ=environ)
            hosts.append(self.hosts[name])
            self.residencies[name] = Residency(self.hosts[name], pool.table, device=room)
            if not m.entry.load_at_start:
                self.hosts[name].park("not loaded yet")

    def start(self) -> None:
        """Spawns the workers; `Host.first_load` tells when each is ready or has failed."""
        for residency in self.residencies.values():
            if residency.host.state != "unloaded":
                residency.start()
        self._keeping = [asyncio.create_task(quotas.run(), name="quotas") for quotas in self._quotas]
        self._keeping += [asyncio.create_task(self._look_at(w), name="lock watch") for w in self._watches]

    async def settled(self) -> None:
        """Waits until every model is ready for the first time, has failed, or is not to be loaded yet."""
        for host in self.hosts.values():
            await host.first_load.wait()

    def next_rid(self) -> int:
        return next(self._rids)

    async def _look_at(self, watch: LockWatch) -> None:
        """Kills a worker that was stopped inside the table's lock; what it held comes back, and it is restarted."""
        while True:
            await asyncio.sleep(LOOK_AT_LOCK_S)
            pid = await asyncio.to_thread(watch.stopped_holder)
            for host in self.hosts.values():
                if pid is not None and host.pid == pid:
                    log.error(
                        "[%s] worker %d was stopped inside the slab table's lock: killing it", host.name, pid
                    )
                    host.kill()

    async def counts(self) -> dict[str, PoolCounts | None]:
        """What the tables say now; None where a stopped worker sits on the lock."""
        found: dict[str, PoolCounts | None] = {}
        for pool in self.pools:
            try:
                found[pool.name] = await asyncio.to_thread(pool.table.counts)
            except TimeoutError:
                found[pool.name] = None
        return found

    async def stop(self) -> None:
        """Ends all workers; afterwards none of ours is left."""
        await asyncio.gather(*(residency.stop() for residency in self.residencies.values()))
        for keeping in self._keeping:
            keeping.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        for watch in self._watches:
            watch.close()
        for pool in self.pools:
            pool.close()


def reclaimer(table: SlabTable, owner: int) -> Callable[[], Awaitable[int]]:
    """Takes back what a dead worker held, however long it takes to get the lock."""

    async def reclaim() -> int:
        while True:
            try:
                return await asyncio.to_thread(table.reclaim, owner)
            except TimeoutError:
                log.warning("waiting for the slab table: a stopped worker holds its lock")

    return reclaim
