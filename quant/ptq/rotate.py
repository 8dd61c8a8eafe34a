"""Offline rotation (QuaRot, arXiv 2404.00456): the residual stream turned by R1, the values of every head by R2.

An RMS norm without weights commutes with an orthogonal matrix, so its weights go into what reads it first; then R1 goes
into the embeddings, the head and both sides of every layer, and nothing is left to do at run time.  Outliers of single
channels are spread over all of them.  Computed in float64, one layer at a time, no data.  The rotations that would need
work at run time (queries and keys after RoPE, the input of down) are not here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.ptq.model import ATTENTION_NORM, EMBED, FINAL_NORM, HEAD, MLP_NORM, Layer, Shape
from quant.ptq.pairs import PAIRS

LARGEST_FACTOR = 64  # columns that a power of two is cut into: a product costs as many per element


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix of +-1, float64 [n, n]; None where none of ours has that order.

    Orders: 1, 2, those of Paley's two constructions for a prime, and these times powers of two.
    """
    factors = hadamard_factors(n)
    if factors is None:
        return None
    out = factors[0]
    for factor in factors[1:]:
        out = torch.kron(out, factor)
    return out


def hadamard_factors(n: int) -> list[Tensor] | None:
    """Small Hadamard matrices whose Kronecker product has the order n, or None."""
    power = n & -n
    while power:
        core = _core(n // power)
        if core is not None:
            # a core of order 1 is needed where there is nothing else
            return [core] * (len(core) > 1 or power == 1) + _powers_of_two(power)
        power //= 2
    return None


def _powers_of_two(n: int) -> list[Tensor]:
    out = []
    while n > 1:
        order = min(n, LARGEST_FACTOR)
        factor = torch.ones(1, 1, dtype=torch.float64)
        while len(factor) < order:
            factor = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), factor)
        out.append(factor)
        n //= order
    return out


def _core(n: int) -> Tensor | None:
    """The matrix of order n that is no Kronecker product: 1, or a construction of Paley (1933)."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = n - 1
    if n % 4 == 0 and _is_prime(q) and q % 4 == 3:
        return _bordered(q, -1.0) + torch.eye(n, dtype=torch.float64)
    q = n // 2 - 1
    if n % 4 == 0 and q > 1 and _is_prime(q) and q % 4 == 1:
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(q, 1.0), plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
    return None


def _bordered(q: int, sign: float) -> Tensor:
    """The conference matrix of the prime q: zero diagonal, a border of ones, elsewhere whether i - j is a square."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)]).double()
    at = torch.arange(q)
    out = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    out[0, 1:], out[1:, 0] = 1.0, sign
    out[1:, 1:] = character[(at[:, None] - at) % q]
    return out


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


@dataclass(frozen=True, slots=True)
class Orthogonal:
    """An orthogonal matrix: signs, then the Kronecker product of `factors`, which are orthogonal."""

    signs_D: Tensor
    factors: tuple[Tensor, ...]

    def apply(self, x: Tensor) -> Tensor:
        """x @ Q along the last axis, in float64 whatever x is."""
        shape = x.shape
        x = (x.double() * self.signs_D.to(x.device)).reshape(-1, *(len(f) for f in self.factors))
        for factor in self.factors:
            # what was multiplied goes to the end: after the last factor all are where they were
            x = torch.tensordot(x, factor.to(x.device), dims=([1], [0]))
        return x.reshape(shape)


def orthogonal(n: int, seed: int | None = 0) -> Orthogonal:
    """A Hadamard matrix over sqrt(n) where we have one of that order, else a random orthogonal one.

    A Hadamard spreads an outlier evenly, +-1 / sqrt(n) into every channel.  There is none where n is above 2 and no
    multiple of 4, and some orders need constructions that we lack; there a random one (QR of normal numbers) spreads it
    nearly as well.  `seed` draws the signs of the rows too: without them (None) the mean of all channels would
    become a channel of its own, larger than the others.
    """
    if n < 1:
        raise ValueError(f"the order of a rotation must be at least 1, got {n}")
    g = torch.Generator().manual_seed(seed or 0)
    signs_D = torch.ones(n, dtype=torch.float64)
    if seed is not None:
        signs_D -= 2.0 * torch.randint(0, 2, (n,), generator=g)
    factors = hadamard_factors(n)
    if factors is None:
        q, r = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
        return Orthogonal(signs_D, (q * r.diagonal().sign(),))
    return Orthogonal(signs_D, tuple(f / len(f) ** 0.5 for f in factors))


@dataclass(frozen=True, slots=True)
class Rotation:
    """R1 of the residual stream and R2 of every head's values; None leaves that side alone."""

    residual: Orthogonal | None
    heads: Orthogonal | None


def rotation(shape: Shape, *, residual: bool = True, heads: bool = True, seed: int | None = 0) -> Rotation:
    """One for the whole model.  `seed`: see `orthogonal`; None is QoQ's plain Hadamard."""
    return Rotation(
        orthogonal(shape.hidden, seed) if residual else None,
        orthogonal(shape.head_dim, None if seed is None else seed + 1) if heads else None,
    )


def rotate_layer(layer: Layer, shape: Shape, turn: Rotation) -> None:
    """Turns one decoder layer in place; every other layer and `rotate_outer` must follow with the same `turn`."""
    if turn.residual is not None:
        fold_norms(layer)
        for name in ("q", "k", "v"):
            _turn_inputs(layer, f"self_attn.{name}_proj", turn.residual)
        for name in ("gate", "up"):
            _turn_inputs(layer, f"mlp.{name}_proj", turn.residual)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            _turn_outputs(layer, name, turn.residual, 1)
    if turn.heads is not None:
        _turn_outputs(layer, "self_attn.v_proj", turn.heads, shape.kv_heads)
        o_DX = layer["self_attn.o_proj.weight"]
        o_DX.copy_(turn.heads.apply(o_DX.reshape(-1, shape.heads, shape.head_dim)).view_as(o_DX))


def rotate_outer(outer: dict[str, Tensor], turn: Rotation) -> None:
    """Turns embeddings and head in place.  A tied head becomes a matrix of its own unless the last norm is all ones."""
    if turn.residual is None:
        return
    norm_D = outer[FINAL_NORM]
    if HEAD in outer or not torch.equal(norm_D, torch.ones_like(norm_D)):
        head_VD = outer.get(HEAD, outer[EMBED])
        outer[HEAD] = turn.residual.apply(head_VD.double() * norm_D).to(head_VD.dtype)
        outer[FINAL_NORM] = torch.ones_like(norm_D)
    outer[EMBED] = turn.residual.apply(outer[EMBED]).to(outer[EMBED].dtype)


def fold_norms(layer: Layer) -> None:
    """The weights of both norms into the matrices that read them; the norms become ones."""
    for norm, pair in ((ATTENTION_NORM, "qkv"), (MLP_NORM, "gate_up")):
        for consumer in PAIRS[pair].consumers:
            layer[f"{consumer}.weight"] *= layer[norm]
        layer[norm].fill_(1)


def _turn_inputs(layer: Layer, name: str, q: Orthogonal) -> None:
    w_NK = layer[f"{name}.weight"]
    w_NK.copy_(q.apply(w_NK))


def _turn_outputs(layer: Layer, name: str, q: Orthogonal, blocks: int) -> None:
    """Q^T W and Q^T b in each of `blocks` equal parts of the outputs."""
    w_NK = layer[f"{name}.weight"]
    N, K = w_NK.shape
    turned = q.apply(w_NK.reshape(blocks, N // blocks, K).transpose(1, 2)).transpose(1, 2)
    w_NK.copy_(turned.reshape(N, K))
    if (bias := layer.get(f"{name}.bias")) is not None:
        bias.copy_(q.apply(bias.view(blocks, -1)).flatten())
