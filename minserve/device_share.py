"""A worker takes its share of a GPU's multiprocessors, before it loads anything: what minserve.sm_share has decided.

Under MPS the share came with the environment, and what is left is to see that it holds: a process that missed the
daemon would run beside it, with all of the GPU.  A green context is made here.
"""

import logging
import os

import torch

from kernels.launch import SM_LIMITS, gpu_facts
from minserve.cuda_memory import open_driver
from minserve.green import GreenContext, create_green
from minserve.mps import Daemon
from minserve.wire import Start

log = logging.getLogger("minserve")


def take_share(start: Start) -> GreenContext | None:
    """RuntimeError where this process has not the share that it should have.  The context stays as long as the process."""
    if not start.device.startswith("cuda"):
        return None
    device = torch.device(start.device)
    ordinal = device.index or 0
    torch.cuda.set_device(ordinal)
    torch.zeros(1, device=device)  # opens the context: only then is it anybody's client
    green = None
    if start.sharing.startswith("mps"):
        Daemon(os.environ).assert_attached([os.getpid()])
    if start.green[1]:
        green = create_green(open_driver(), ordinal, *start.green)
        SM_LIMITS[ordinal] = green.sms
        torch.cuda.set_stream(torch.cuda.ExternalStream(green.stream, device=device))
    log.info("sharing %s: %d SMs visible", start.sharing, gpu_facts(device).num_sms)
    return green
