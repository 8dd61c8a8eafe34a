"""Block-scaled fp8: exact where nothing rounds, every block under its own scale, and NaN that does not get lost."""

import pytest
import torch
from torch import Tensor

from kernels.gemm_fp8_block import BlockConfig, gemm_fp8_block_cpu, gemm_fp8_block_triton, prepare_fp8_block
from kernels.launch import ASSUMED
from kernels.quant_blocks import FP8, quant_blocks_cpu, quant_blocks_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = {
    "cpu": (quant_blocks_cpu, gemm_fp8_block_cpu, "float8", "cpu"),
    "triton": (quant_blocks_triton, gemm_fp8_block_triton, "cuda", DEVICE),
}
CONFIGS = [
    BlockConfig(swap, t, n, splits, 4, 2)
    for swap, t, n in ((True, 16, 128), (False, 64, 64))
    for splits in (1, 3)
]


def exact_rows(T: int, K: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes and scales (powers of two) that quantizing their product gives back exactly, as float64."""
    codes_TK = torch.randint(-4, 5, (T, K), generator=g).double()
    codes_TK[:, ::128] = 448
    scale_TQ = 2.0 ** torch.randint(0, 4, (T, -(-K // 128)), generator=g).double()
    return codes_TK, scale_TQ


def each_column(scale: Tensor, K: int) -> Tensor:
    return scale.repeat_interleave(128, 1)[:, :K]


def product(
    run: str, x_TK: Tensor, codes_NK: Tensor, scale_PQ: Tensor, config: BlockConfig | None = None
) -> Tensor:
    quantize, multiply, form, device = RUNS[run]
    rows = quantize(x_TK.to(device))
    w = prepare_fp8_block(codes_NK.to(device), scale_PQ.to(device), form=form)
    return multiply(*rows, w, torch.float32, **({} if config is None else {"config": config})).cpu()


@pytest.mark.parametrize(
    ("run", "config"), [("cpu", None), ("triton", None), *(("triton", c) for c in CONFIGS)], ids=str
)
def test_sums_of_exact_products_are_exact(run: str, config: BlockConfig | None) -> None:
    """Integers times powers of two, sums below 2^24 of them: any order gives one sum, any other scale another."""
    T, N, K = 21, 300, 700
    g = torch.Generator().manual_seed(7)
    codes_TK, scale_TQ = exact_rows(T, K, g)
    codes_NK = torch.randint(-2, 3, (N, K), generator=g).double()
    scale_PQ = 2.0 ** torch.randint(-3, 1, (3, 6), generator=g).double()
    x_TK = codes_TK * each_column(scale_TQ, K)
    w_NK = codes_NK * each_column(scale_PQ.repeat_interleave(128, 0)[:N], K)
    y_TN = product(run, x_TK.float(), codes_NK.to(FP8), scale_PQ.float(), config)
    assert torch.equal(y_TN.double(), x_TK @ w_NK.t())


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's, of inf * 0
@pytest.mark.parametrize("run", RUNS)
def test_rows_are_quantized_block_by_block(run: str) -> None:
    x_TK = torch.zeros(4, 300)
    x_TK[0, 5], x_TK[0, 200], x_TK[1, 299] = 448.0, 1e-3, -7.0
    x_TK[2, 130], x_TK[3, 0] = float("nan"), float("inf")
    codes_TK, scale_TQ = (t.cpu() for t in RUNS[run][0](x_TK.to(RUNS[run][3])))
    assert scale_TQ.shape == (4, 3)
    assert scale_TQ[0].tolist() == pytest.approx([1.0, 1e-3 / 448, 1.0])
    assert scale_TQ[1].tolist() == pytest.approx([1.0, 1.0, 7 / 448])
    assert codes_TK[0, [5, 200]].float().tolist() == [448.0, 448.0]
    assert not codes_TK[1, :299].float().any()
    # a block of NaN or inf leaves the others of its row alone, but not their sum
    codes_NK = torch.ones(2, 300).to(FP8)
    y_TN = product(run, x_TK, codes_NK, torch.ones(1, 3))
    assert not y_TN[2:].isfinite().any()
    assert y_TN[:2].isfinite().all()
    assert scale_TQ[2, [0, 2]].tolist() == [1.0, 1.0]


def test_scales_of_another_shape_are_refused() -> None:
    codes_NK = torch.zeros(129, 256).to(FP8)
    with pytest.raises(ValueError, match=r"must be \[2, 2\], got \[129, 2\]"):
        prepare_fp8_block(codes_NK, torch.ones(129, 2))
    with pytest.raises(ValueError, match=r"float8_e4m3fn codes.*int8"):
        prepare_fp8_block(torch.zeros(128, 128, dtype=torch.int8), torch.ones(1, 1))


@pytest.mark.parametrize("target", [89, 90, 100])
def test_a_config_covers_one_scale_of_weights(target: int) -> None:
    gpu = ASSUMED[target]
    for T, N, K in ((1, 64, 128), (16, 4096, 4096), (300, 6144, 4096), (5000, 128, 14336)):
        for c in (BlockConfig.pick(gpu, T, N, K), *BlockConfig.candidates(gpu, T, N, K)):
            assert 128 % c.block_n == 0, f"{c}"
            assert c.swap or c.block_t >= 64, f"{c}"
    assert len({BlockConfig.pick(gpu, T, 4096, 4096, deterministic=True) for T in range(1, 600, 7)}) == 1
