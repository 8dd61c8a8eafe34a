"""On a GPU: memory that goes and comes back under a captured graph, a green context's stream, and what a probe finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minserve import cuda_memory
from minserve.cuda_memory import Driver, import_memory, open_driver
from minserve.green import create_green
from minserve.keeper import Keeper
from minserve.pool import device_tensor
from minserve.probe import exports, look_at_gpu

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20
pytestmark = pytest.mark.gpu


@pytest.fixture
def driver() -> Driver:
    torch.zeros(1, device="cuda:0")
    return open_driver()


def test_a_segment_goes_and_comes_back_and_a_graph_over_the_others_stays_valid(driver: Driver) -> None:
    gpu = look_at_gpu(driver, 0)
    if not (gpu.vmm and gpu.posix_fd):
        return
    size = cuda_memory.SEGMENT_BYTES
    keeper = Keeper(0, 2 * size + 64 * MB)
    memory = import_memory(driver, 0, keeper.handle, keeper.fds)
    assert memory.segments is not None
    pool = device_tensor(memory)
    pool[:MB] = 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pool[2 * size : 2 * size + MB].copy_(pool[:MB])
    free = torch.cuda.mem_get_info()[0]
    torch.cuda.synchronize()
    memory.segments.unmap(1)
    os.close(keeper.fds[1])
    assert torch.cuda.mem_get_info()[0] - free > size // 2, "its memory is free"
    pool[:MB] = 7
    graph.replay()
    assert int(pool[2 * size + MB - 1]) == 7
    fd = keeper.segment(size)
    memory.segments.map(1, fd)
    keeper.fds = (keeper.fds[0], fd, keeper.fds[2])
    pool[size : size + MB] = 9
    assert int(pool[size + MB - 1]) == 9
    assert int(pool[2 * size]) == 7
    del pool
    memory.release()
    keeper.close()


def test_a_green_context_runs_what_torch_launches(driver: Driver) -> None:
    gpu = look_at_gpu(driver, 0)
    if gpu.green_why:
        return
    half = len(gpu.green_sms) // 2
    a = torch.randn(512, 512, device="cuda")
    want = a @ a
    for first in (0, half):
        green = create_green(driver, 0, first, half)
        assert 0 < green.sms < gpu.sms
        stream = torch.cuda.ExternalStream(green.stream, device="cuda:0")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = a @ a
            graph = torch.cuda.CUDAGraph()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                again = a @ a
            graph.replay()
        stream.synchronize()
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(again, want)
        del graph
        torch.cuda.synchronize()
        green.release()


def test_memory_goes_from_process_to_process_in_one_way_at_least() -> None:
    found = exports(0, os.environ)
    assert "" in found.values(), found


def test_the_probe_prints_what_the_agent_reads() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minserve.probe"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said["modes"]) == {"none", "mps", "mps-static", "green"}
    assert said["gpu"]["sms"] == torch.cuda.get_device_properties(0).multi_processor_count
