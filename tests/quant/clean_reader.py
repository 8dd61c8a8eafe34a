"""Transformers and compressed-tensors in an interpreter of their own: what they make of checkpoints, or write themselves.

The suite's own interpreter wraps torch.empty (poison), and what transformers loads there it may not load elsewhere.
Importing both takes seconds, so one process works on many checkpoints.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


class Read(NamedTuple):
    """Logits by job, and the errors of those that have none."""

    logits: dict[str, Tensor]
    errors: dict[str, str]


def read_clean(jobs: Mapping[str, Mapping[str, Any]], ids: list[int], folder: Path) -> Read:
    """Each job: `path` of a checkpoint and perhaps `dequantize`, or `plain`, `out` and `config` of one to write and
    calibrate on `ids`; `folder` is for the exchange."""
    asked, answer = folder / "asked.json", folder / "answer.safetensors"
    asked.write_text(
        json.dumps({"ids": ids, "jobs": {n: {k: _plain(v) for k, v in j.items()} for n, j in jobs.items()}})
    )
    command = [sys.executable, "-m", "tests.quant.clean_reader", str(asked), str(answer)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return Read(load_file(answer), json.loads(answer.with_suffix(".json").read_text()))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def main(asked: Path, answer: Path) -> None:
    from tests.quant.ct_writer import package_logits, write_model

    given = json.loads(asked.read_text())
    logits: dict[str, Tensor] = {}
    errors: dict[str, str] = {}
    for name, job in given["jobs"].items():
        try:
            if "path" in job:
                logits[name] = package_logits(Path(job["path"]), given["ids"], job.get("dequantize", False))
            else:
                logits[name] = write_model(Path(job["plain"]), Path(job["out"]), job["config"], given["ids"])
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    save_file({name: x.contiguous() for name, x in logits.items()}, answer)
    answer.with_suffix(".json").write_text(json.dumps(errors))


if __name__ == "__main__":
    assert torch.empty.__module__ != "tests.conftest", "poisoned"
    main(Path(sys.argv[1]), Path(sys.argv[2]))
