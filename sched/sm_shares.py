"""How the multiprocessors of a GPU are divided between its models: per cents, and whole chunks of them.

A model's `sm_share` is a number, or None for a part of what the numbers leave, by weight (the bytes of its weights: what
a step reads).  A cap may overlap others' caps: two clients at 60 % are slower than alone only while both are busy.  A
partition may not.
"""

from collections.abc import Mapping

# NVIDIA's advice for caps: twice an even part each, so that an idle neighbour's multiprocessors are not left idle
CAP_FACTOR = 2.0


def divide(
    given: Mapping[str, int | None], weights: Mapping[str, float], *, disjoint: bool
) -> dict[str, int]:
    """Per cent of each model, 1 to 100; ValueError where disjoint shares are together more than there is.

    One model alone has all of it, unless a number says otherwise.
    """
    fixed = sum(share for share in given.values() if share is not None)
    automatic = [name for name, share in given.items() if share is None]
    if disjoint and fixed + len(automatic) > 100:
        shown = ", ".join(f"{name} {'auto' if share is None else share}" for name, share in given.items())
        raise ValueError(
            f"sm_share must be together at most 100, with 1 left for each that is auto, where models have partitions "
            f"of their own, got {shown}"
        )
    total = sum(weights[name] for name in automatic) or 1.0
    # numbers that are only caps may take all of it and leave the others as much
    left = 100 - fixed if disjoint or fixed < 100 else 100
    factor = 1.0 if disjoint else CAP_FACTOR
    shares = {name: share for name, share in given.items() if share is not None}
    spare = left - len(automatic)
    for name in automatic:
        part = weights[name] / total
        exact = 1 + spare * part if disjoint else factor * left * part
        shares[name] = max(1, min(100, int(exact)))
    if disjoint and automatic:
        largest = max(automatic, key=lambda name: weights[name])
        shares[largest] += 100 - sum(shares.values())
    return {name: shares[name] for name in given}


def in_chunks(shares: Mapping[str, int], chunks: int) -> dict[str, int]:
    """Disjoint shares as whole chunks: at least one each, as near to the per cents as they go.

    ValueError where there are fewer chunks than models.
    """
    if chunks < len(shares):
        raise ValueError(
            f"sharing must be none or mps for {len(shares)} models on a GPU with {chunks} chunks of SMs"
        )
    found = {name: max(1, share * chunks // 100) for name, share in shares.items()}
    while sum(found.values()) > chunks:
        # those that were given their one chunk took it from whoever has most beyond its share
        most = max((n for n in found if found[n] > 1), key=lambda n: found[n] - shares[n] * chunks / 100)
        found[most] -= 1
    whole = min(chunks, round(sum(shares.values()) * chunks / 100))
    while sum(found.values()) < whole:
        least = max(found, key=lambda n: shares[n] * chunks / 100 - found[n])
        found[least] += 1
    return found
