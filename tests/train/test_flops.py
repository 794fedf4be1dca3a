"""The closed form of FLOPs against the reference's Table 1, and by counting our own model's operators."""

from __future__ import annotations

import pytest

from train.config.model import TI2V_5B, LoRAConfig
from train.estimate.flops import adapted_linears, block_forward_flops, forward_flops, step_flops
from train.geometry import SAVE_GROUPS, Shape, num_tokens

EVERY_LINEAR = LoRAConfig(rank=32, targets=("self_attn", "cross_attn", "ffn"))
# clip: tokens, TFLOP forward, step without recomputation, step with every block run twice (performance.md, Table 1)
TABLE_1 = {
    (17, 704, 1280): (4_400, 47.4, 106.5, 153.9),
    (33, 704, 1280): (7_920, 95.1, 227.2, 322.2),
    (49, 704, 1280): (11_440, 151.9, 379.8, 531.7),
    (81, 704, 1280): (18_480, 293.0, 781.0, 1_074.0),
    (121, 704, 1280): (27_280, 520.8, 1_462.0, 1_983.0),
    (17, 480, 832): (1_950, 19.6, 41.4, 60.9),
    (33, 480, 832): (3_510, 36.8, 81.1, 117.8),
    (49, 480, 832): (5_070, 55.8, 127.0, 182.7),
    (81, 480, 832): (8_190, 99.1, 237.7, 336.8),
    (121, 480, 832): (12_090, 163.4, 411.5, 574.9),
}


@pytest.mark.parametrize("clip", TABLE_1)
def test_the_formula_is_table_1(clip: tuple[int, int, int]) -> None:
    tokens, forward, step, full = TABLE_1[clip]
    shape = Shape(1, num_tokens(TI2V_5B, *clip))
    assert shape.tokens == tokens
    assert forward_flops(TI2V_5B, shape, EVERY_LINEAR) / 1e12 == pytest.approx(forward, rel=0.005)
    ours = step_flops(TI2V_5B, shape, EVERY_LINEAR)
    assert ours / 1e12 == pytest.approx(step, rel=0.005)
    blocks = sum(block_forward_flops(TI2V_5B, shape, names, 32) for names in adapted_linears(TI2V_5B, EVERY_LINEAR))
    assert (ours + blocks) / 1e12 == pytest.approx(full, rel=0.005)


def test_rank_moves_a_step_as_the_reference_counted() -> None:
    shape = Shape(1, 11_440)
    for rank, tflop in ((16, 528.5), (32, 531.7), (128, 550.7)):
        lora = EVERY_LINEAR.model_copy(update={"rank": rank})
        blocks = sum(block_forward_flops(TI2V_5B, shape, n, rank) for n in adapted_linears(TI2V_5B, lora))
        assert (step_flops(TI2V_5B, shape, lora) + blocks) / 1e12 == pytest.approx(tflop, rel=0.001)


def test_what_is_kept_is_not_computed_again() -> None:
    shape, lora = Shape(1, 11_440), LoRAConfig()
    everything = step_flops(TI2V_5B, shape, lora)
    assert step_flops(TI2V_5B, shape, lora, [SAVE_GROUPS] * 30) == everything
    nothing = step_flops(TI2V_5B, shape, lora, [()] * 30)
    one_block = step_flops(TI2V_5B, shape, lora, [(), *[SAVE_GROUPS] * 29])
    assert everything < one_block < nothing
    assert nothing - everything == 30 * (one_block - everything)
    # The feed-forward's way down is needed by nothing behind it, so even `full` leaves it out of the second run.
    assert nothing / everything < 1.33


def test_blocks_before_the_first_lora_have_no_backward_pass() -> None:
    shape = Shape(1, 4_400)
    late = LoRAConfig(targets=("blocks.29.self_attn.*",))
    forward = forward_flops(TI2V_5B, shape, late)
    assert step_flops(TI2V_5B, shape, late) < forward * 1.06
    assert step_flops(TI2V_5B, shape, late, [()] * 30) < forward * 1.09


@pytest.mark.parametrize(("size", "words"), [((48, 480, 832), "4n \\+ 1"), ((49, 720, 1280), "multiples of 32")])
def test_a_size_the_model_does_not_take_is_refused(size: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        num_tokens(TI2V_5B, *size)
