"""Which of an op's runs a tensor is given to; one place, so that a test can put a whole engine on the other one."""

import torch


def runs_triton(device: torch.device) -> bool:
    """Triton on a GPU, torch's own kernels on a CPU.  Call it as `backend.runs_triton`: tests replace it."""
    return device.type == "cuda"
