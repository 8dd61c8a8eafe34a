"""The QuantizationArgs of compressed-tensors: how one kind of tensor is quantized, for weights, activations and KV.

Defaults and inferred strategies are those of its writers, new and old: without a strategy a group size of -1 means
channel, above 0 group, none tensor, or token where dynamic.
"""

from dataclasses import dataclass
from typing import Any

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
MAX_GROUP = 1 << 30


@dataclass(frozen=True, slots=True)
class Args:
    bits: int = 8
    kind: str = "int"  # or float
    symmetric: bool = True
    strategy: str = "tensor"
    size: int | None = None  # columns of a group
    block: list[int] | None = None
    dynamic: bool | str = False  # or local


def read_args(where: str, raw: Any) -> Args | None:
    """ValueError where a value has another type than writers give it; whether it is supported is the caller's."""
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ValueError(f"quantization_config: {where} must be an object or null, got {raw!r:.120}")

    def wrong(key: str, choices: str) -> ValueError:
        return ValueError(f"quantization_config: {where}.{key} must be {choices}, got {raw[key]!r:.120}")

    # a null means the default, as if the key were not there
    given = {key: value for key, value in raw.items() if value is not None}
    bits, symmetric, size = given.get("num_bits", 8), given.get("symmetric", True), given.get("group_size")
    kind, dynamic = given.get("type", "int"), given.get("dynamic", False)
    if type(bits) is not int or not 1 <= bits <= 64:
        raise wrong("num_bits", "an integer from 1 to 64")
    if not isinstance(kind, str) or kind.lower() not in ("int", "float"):
        raise wrong("type", "int or float")
    if type(symmetric) is not bool:
        raise wrong("symmetric", "true or false")
    if type(dynamic) is not bool and dynamic != "local":
        raise wrong("dynamic", "true, false or 'local'")
    if size is not None and (type(size) is not int or not (size == -1 or 0 < size <= MAX_GROUP)):
        raise wrong("group_size", "null, -1 or a positive integer")
    strategy = given.get("strategy", _inferred(size, dynamic))
    if not isinstance(strategy, str) or strategy.lower() not in STRATEGIES:
        raise wrong("strategy", f"one of {', '.join(STRATEGIES)}")
    if strategy.lower() in ("group", "tensor_group") and (size is None or size < 1):
        raise ValueError(
            f"quantization_config: {where}.group_size must be positive for groups, got {size!r:.120}"
        )
    return Args(bits, kind.lower(), symmetric, strategy.lower(), size, _block(where, given), dynamic)


def _inferred(size: int | None, dynamic: bool | str) -> str:
    if size is None:
        return "token" if dynamic is True else "tensor"
    return "channel" if size == -1 else "group"


def _block(where: str, given: dict[str, Any]) -> list[int] | None:
    """[rows, columns]; old writers have it as "128x128"."""
    value = given.get("block_structure")
    if value is None:
        return None
    parts = value.split("x") if isinstance(value, str) else value
    sizes = [_size(part) for part in parts] if isinstance(parts, list) else []
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(
            f"quantization_config: {where}.block_structure must be [rows, columns], got {value!r:.120}"
        )
    return sizes


def _size(part: Any) -> int:
    if isinstance(part, str) and part.isdecimal() and len(part) < 9:
        return int(part)
    return part if type(part) is int else 0


def describe(args: Args | None) -> str:
    """What was found, for a message."""
    if args is None:
        return "unquantized"
    words = [f"{args.kind}{args.bits}", args.strategy]
    if args.size is not None and args.size != -1:
        words.append(f"{args.size}")
    if args.block is not None:
        words.append("x".join(map(str, args.block)))
    words.append("symmetric" if args.symmetric else "with zero points")
    if args.dynamic:
        words.append(f"dynamic={args.dynamic}")
    return f"({', '.join(words):.200})"
