"""What can be known to go wrong before the first layer: whether recipe, scheme, format and model go together.

Every function raises a ValueError that names the value and what would do; what is only unexpected comes back as lines.
"""

from pathlib import Path

from quant.formats.fireq import GROUP as FIREQ_GROUP
from quant.formats.qserve import GROUP as QSERVE_GROUP
from quant.formats.qserve import TILE
from quant.ptq.folding import Target
from quant.ptq.grid import Rounding
from quant.ptq.model import LINEARS, Shape
from quant.ptq.recipe import Recipe
from quant.ptq.weight import rounding_of
from quant.scheme import FP8_ROWS, INT8_ROWS, Scheme

CONTAINERS = ("packed", "int8")


def check_out(out: Path) -> None:
    """Nothing is ever overwritten."""
    if out.is_symlink() and not out.exists():
        raise ValueError(
            f"out must not exist yet, and {out} is a link to nothing: delete it or choose another"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"out must not exist yet or be an empty folder, got {out}: delete it or choose another"
        )


def check_format(kind: str, scheme: Scheme, shape: Shape) -> None:
    """Whether files of this format can hold every matrix of the model in this scheme."""
    if kind == "fireq":
        if scheme != Scheme(4, FIREQ_GROUP, activations=FP8_ROWS):
            raise ValueError(
                f"format fireq holds symmetric int4 in groups of {FIREQ_GROUP} for fp8 rows (--scheme w4a8-fp8 "
                f"--group-size {FIREQ_GROUP}), got {scheme}: choose these, or --format compressed-tensors"
            )
        _check_inputs(kind, FIREQ_GROUP, shape)
    elif kind == "qserve":
        _check_qserve(scheme, shape)
    elif scheme.progressive:
        raise ValueError(
            "format compressed-tensors has no progressive weights: give --format qserve, or --weights symmetric or zeros"
        )


def _check_qserve(scheme: Scheme, shape: Shape) -> None:
    grain = scheme.group_size == (QSERVE_GROUP if scheme.progressive else None)
    if scheme.activations != INT8_ROWS or scheme.values != "int" or not grain:
        raise ValueError(
            f"format qserve holds int8 rows with int8 channels, int4 channels (--group-size channel) or progressive int4 "
            f"in groups of {QSERVE_GROUP}, got {scheme}: choose one, or --format compressed-tensors"
        )
    if scheme.progressive:
        _check_inputs("qserve", QSERVE_GROUP, shape)
    for name in LINEARS if scheme.bits == 4 else ():
        if any(n % TILE for n in shape.weight_shape(name)):
            raise ValueError(
                f"format qserve needs outputs and inputs in multiples of {TILE}, and {name} has "
                f"{' x '.join(map(str, shape.weight_shape(name)))}: choose --format compressed-tensors"
            )


def _check_inputs(kind: str, group: int, shape: Shape) -> None:
    for name in LINEARS:
        if (K := shape.weight_shape(name)[1]) % group:
            raise ValueError(
                f"format {kind} needs inputs in multiples of its groups of {group}, and {name} has {K}: "
                "choose --format compressed-tensors"
            )


def chosen_container(given: str | None, kind: str, scheme: Scheme) -> str:
    """The container of compressed-tensors: that which the most tools read, where none is given."""
    if given is not None and kind != "compressed-tensors":
        raise ValueError(f"--container is of compressed-tensors, and the format is {kind}: leave it out")
    if given is not None and scheme.values == "fp8":
        raise ValueError(
            f"--container is for integer codes, and those of {scheme.name} are floats: leave it out"
        )
    if given is not None and given not in CONTAINERS:
        raise ValueError(f"--container must be one of {', '.join(CONTAINERS)}, got {given!r}")
    return given or ("packed" if scheme.bits == 4 and scheme.symmetric else "int8")


def check_recipe(recipe: Recipe, kind: str, target: Target, shape: Shape) -> Rounding:
    """Whether every step has something to do; the rounding that the recipe makes of the target's."""
    rounding = rounding_of(recipe, target.rounding)
    scheme = rounding.scheme
    grid, clip, keys = (recipe.find(name) for name in ("grid", "clip", "scale_keys"))
    if grid is not None and grid["multiples"] and not scheme.progressive:
        raise ValueError(f"grid(multiples=true) is for progressive weights, got {scheme}")
    if clip is not None and clip["sides"] and scheme.symmetric and not scheme.progressive:
        raise ValueError(
            f"clip(sides=true) is for weights with zero points (--weights zeros) or progressive ones, got {scheme}"
        )
    if kind == "fireq" and not rounding.fireq:
        raise ValueError("format fireq stores e4m3 scales: write grid(e4m3=true), or leave grid out")
    if keys is not None and keys["top_k"] > shape.head_dim:
        raise ValueError(
            f"scale_keys(top_k) must be at most head_dim = {shape.head_dim}, got {keys['top_k']}"
        )
    if keys is not None and keys["top_k"] and kind != "fireq":
        raise ValueError(
            f"scales of keys after RoPE (scale_keys with top_k above 0) need the format fireq, got {kind}: "
            "write scale_keys(top_k=0)"
        )
    return rounding


def unexpected(scheme: Scheme, kind: str, container: str, shape: Shape) -> list[str]:
    """What a user may not have meant."""
    lines = []
    fitted = {name: scheme.fit(shape.weight_shape(name)[1]).group_size for name in LINEARS}
    if odd := {name: group for name, group in fitted.items() if group != scheme.group_size}:
        told = ", ".join(f"{name} {group or 'one scale a channel'}" for name, group in odd.items())
        lines.append(f"groups of {scheme.group_size} do not divide the inputs everywhere: {told}")
    if kind == "compressed-tensors" and container == "packed" and not scheme.symmetric:
        lines.append(
            "transformers 5.23 does not load packed zero points (it expects them unpacked), but with "
            "CompressedTensorsConfig(dequantize=True); --container int8 loads everywhere"
        )
    return lines
