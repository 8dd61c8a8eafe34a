"""The models whose shapes the benches and the static gate use, and the chips they are held against.

Datasheet rates are the vendor's dense ones.  Practical rates of the H200 are the best published for cuBLAS and a copy;
those of the other chips are estimated from theirs.  A GPU run measures its own and uses those.
"""

from typing import NamedTuple

from kernels.spec import ModelShape


class Model(NamedTuple):
    """`tied`: the head is the embedding, so a memory plan counts it once."""

    shape: ModelShape
    layers: int
    tied: bool = False

    @property
    def linear_params(self) -> int:
        """Of all layers, without embedding and head."""
        s = self.shape
        return self.layers * (2 * s.D * s.H * s.K + 2 * s.D * s.G * s.K + 3 * s.D * s.F)

    @property
    def head_params(self) -> int:
        return self.shape.V * self.shape.D


MODELS = {
    "llama-3.2-1b": Model(ModelShape(D=2048, H=32, G=8, K=64, F=8192, V=128256), 16, tied=True),
    "llama-3-8b": Model(ModelShape(D=4096, H=32, G=8, K=128, F=14336, V=128256), 32),
}
# what a dry run puts in their place
TINY = Model(ModelShape(D=256, H=4, G=2, K=64, F=512, V=512), layers=2)


class Rates(NamedTuple):
    """Bytes and operations a second; `low` is for 8-bit products."""

    bandwidth: float
    f16: float
    low: float


class Chip(NamedTuple):
    capability: int
    num_sms: int
    clock: float
    memory: float
    datasheet: Rates
    practical: Rates

    @property
    def bytes_per_clock(self) -> float:
        """What one SM gets of the practical bandwidth."""
        return self.practical.bandwidth / self.num_sms / self.clock


CHIPS = {
    "h200": Chip(90, 132, 1.755e9, 141e9, Rates(4.8e12, 989e12, 1979e12), Rates(4.3e12, 790e12, 1350e12)),
    "h100": Chip(90, 132, 1.755e9, 80e9, Rates(3.35e12, 989e12, 1979e12), Rates(3.0e12, 790e12, 1350e12)),
    "a100": Chip(80, 108, 1.41e9, 80e9, Rates(2.039e12, 312e12, 624e12), Rates(1.75e12, 270e12, 480e12)),
    "l40s": Chip(89, 142, 2.52e9, 48e9, Rates(0.864e12, 362e12, 733e12), Rates(0.75e12, 300e12, 560e12)),
}
# the chip that a target's machine code is held against
CHIP_OF = {80: "a100", 89: "l40s", 90: "h200"}
