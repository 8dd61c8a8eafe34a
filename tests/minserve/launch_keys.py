"""`python -m tests.minserve.launch_keys FOLDER ...`: what would be compiled by warm-up, and what by random steps after it.

No GPU and no compiler: the engine runs on CPU tensors, a driver only names a target and Triton's own hook refuses each
compile, so that it asks again at every launch.  Prints a JSON object a model.  A process of its own: Triton either
interprets or compiles, never both.
"""

import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from kernels import backend
from kernels.launch import KernelStarter
from minserve.config import Config
from minserve.loading import load_model
from minserve.memory import batch_sizes
from minserve.resolve import resolve_model
from minserve.runner import Runner
from minserve.sampling import SamplingParams
from minserve.warmup import SAMPLINGS, OneBlock, Shape, Sizes, run_shape, warm_up
from tests.minserve.rerun import capture

PLANS = 200


class NamedTarget:
    capability = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def random_shapes(sizes: Sizes, count: int, seed: int) -> Iterator[Shape]:
    """Steps as a Batcher could make them: any number of decodes, some chunks in what room they leave."""
    r = random.Random(seed)
    for _ in range(count):
        decodes = r.choice((0, 1, r.randint(1, sizes.max_running)))
        room = sizes.max_step_tokens - decodes
        chunks = []
        while (
            room
            and decodes + len(chunks) < sizes.max_running
            and (r.random() < 0.6 or not decodes + len(chunks))
        ):
            n = min(room, r.choice((1, 2, 5, 16, r.randint(1, 100), r.randint(1, room))))
            room -= n
            chunks.append((r.choice((0, r.randint(0, sizes.max_model_len - n))), n))
        contexts = tuple(r.randint(1, sizes.max_model_len) for _ in range(decodes))
        params = r.choice((SAMPLINGS, SAMPLINGS[:1], (r.choice(SAMPLINGS),)))
        if r.random() < 0.1:
            params = (SamplingParams(prompt_logprobs=2),)
        yield Shape(contexts, tuple(chunks), params)


class Keys:
    """Collects what `launch` and what Triton take for the same kernel; Triton is asked once for each key of `launch`."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self._asked: set[tuple[str, str]] = set()
        own = KernelStarter._by_triton

        def watched(starter: KernelStarter, key: tuple[Any, ...], *rest: Any) -> None:
            name = "launch", f"{starter.kernel.__name__} {key}"
            self.found.add(name)
            if name not in self._asked:
                self._asked.add(name)
                own(starter, key, *rest)

        KernelStarter._by_triton = watched
        knobs.runtime.jit_cache_hook = self.refuse

    def refuse(self, *, key: str, fn: Any, **rest: Any) -> bool:
        self.found.add(("triton", f"{fn.name} {key}"))
        return True

    def take(self) -> set[tuple[str, str]]:
        found, self.found = self.found, set()
        return found


def main() -> None:
    backend.runs_triton = lambda device: True
    driver.set_active(NamedTarget())
    # what no kernel filled must be legal token ids
    torch.empty = torch.zeros
    torch.empty_like = torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros
    keys = Keys()
    for argument in sys.argv[1:]:
        options = json.loads(argument)
        sizes = Sizes(*options.pop("sizes"))
        config = Config.single(options.pop("folder"), max_model_len=sizes.max_model_len, **options)
        resolved = resolve_model(config.models[0], "cpu")
        model = load_model(resolved, "cpu")
        layout, device = resolved.layout, torch.device("cpu")
        deterministic = resolved.entry.deterministic
        warm_up(model.llama, layout, sizes, device, deterministic=deterministic)
        warmed = keys.take()
        late: dict[str, str] = {}
        serving = Runner(
            model.llama,
            layout,
            OneBlock(layout.block_bytes, resolved.config.num_layers, device),
            max_rows=2 * sizes.max_running,
            max_model_len=resolved.max_model_len,
            deterministic=deterministic,
            overlap=False,
        )
        if not deterministic:
            serving.capture(batch_sizes(sizes.max_running), capture)
        late |= {" ".join(key): "captured" for key in keys.take() - warmed}
        for i, shape in enumerate(random_shapes(sizes, PLANS, seed=1)):
            run_shape(serving, shape)
            for key in sorted(keys.take() - warmed):
                late.setdefault(" ".join(key), f"plan {i}: {shape.decodes} {shape.chunks}")
        print(json.dumps({"warmed": len(warmed), "late": late}), flush=True)


if __name__ == "__main__":
    main()
