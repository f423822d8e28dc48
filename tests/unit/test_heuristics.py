"""The candidate tiles of the Triton kernels are tiles that Triton takes."""

import pytest

from tpkernels.kernels import heuristics
from tpkernels.kernels.launch_config import power_of_two

TILES = {name: tiles for name, tiles in vars(heuristics).items() if name.endswith("_tiles")}
FEATURES = [2**i for i in range(18)]  # a Tunable rounds up to them


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("name", TILES)
def test_sizes_and_warps_are_powers_of_two(name, itemsize):
    for features in FEATURES:
        candidates = TILES[name](features, itemsize)
        assert candidates
        for config in candidates:
            for size in (*config.blocks.values(), config.num_warps):
                assert size == power_of_two(size), (features, config)
            assert config.num_warps <= 16 and config.num_stages >= 2


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("name", ["norm_tiles", "norm_backward_tiles"])
def test_all_candidates_take_whole_rows_or_none_does(name, itemsize):
    for features in FEATURES:
        widths = {config.blocks["BLOCK_N"] for config in TILES[name](features, itemsize)}
        assert widths == {features} or max(widths) < features


@pytest.mark.parametrize("itemsize", [2, 4])
def test_gated_tiles_have_half_the_columns_and_no_fewer_than_a_tensor_core_takes(itemsize):
    plain, gated = (
        [config.blocks for config in tiles(4096, itemsize)]
        for tiles in (heuristics.column_linear_tiles, heuristics.gated_column_linear_tiles)
    )
    assert gated == [{**blocks, "BLOCK_N": blocks["BLOCK_N"] // 2} for blocks in plain]
    for blocks in (*plain, *gated):
        assert min(blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"]) >= 16
