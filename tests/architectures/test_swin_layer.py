import torch

from nnunetv2_misfm.architectures.swin import SwinLayer


def swin_layer(channels: int, *, num_heads: int, window_size: int) -> SwinLayer:
    return SwinLayer(
        channels,
        num_heads,
        window_size=window_size,
        window_shrink="per_axis",
        mask_padding=False,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
    )


def test_nothing_that_is_saved_depends_on_the_grid() -> None:
    layer = swin_layer(8, num_heads=2, window_size=3)
    shapes = {key: value.shape for key, value in layer.state_dict().items()}
    assert shapes["blocks.0.attn.relative_position_bias_table"] == (5**3, 2)
    assert not any("index" in key for key in shapes)
    for grid in ((1, 2, 9), (3, 3, 3)):
        assert layer(torch.randn(1, *grid, 8)).shape == (1, *grid, 8)
    assert {key: value.shape for key, value in layer.state_dict().items()} == shapes


def test_only_the_second_block_of_a_layer_shifts() -> None:
    torch.manual_seed(0)
    layer = swin_layer(4, num_heads=1, window_size=2).eval()
    tokens = torch.randn(1, 4, 4, 4, 4)
    changed = tokens.clone()
    changed[0, 0, 0, 0, 0] += 1
    for block, reach in zip(layer.blocks, (8, 1), strict=True):  # a window of eight; alone in its corner
        touched = (block(changed) - block(tokens)).abs().amax(dim=-1) > 1e-6
        assert touched.sum() == reach
