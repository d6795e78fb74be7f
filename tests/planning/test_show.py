"""What widths are said to suit."""

import pytest

from hf_lop.planning.show import groups


@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ([90, 41, 17], ["multiples of 1. ", "need multiples of their group", "round_to=128 or round_to=256"]),
        ([96, 40, 8], ["multiples of 8. ", "round_to=128"]),
        ([96, 480, 192], ["multiples of 96, so groups of up to 32 weights", "round_to=128", "round_to=256"]),
        ([128, 640, 384], ["groups of up to 128 weights", "round_to=256 for llama.cpp's K-quants"]),
        ([512, 768], ["multiples of 256, so they suit", "K-quants"]),
    ],
)
def test_quantisers_by_groups(widths, words):
    assert all(part in groups(widths) for part in words), groups(widths)
