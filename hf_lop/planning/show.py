"""How sizes are shown, and what they suit."""

import math
from collections.abc import Sequence

GROUPS = 128  # weights that quantisers by groups give one scale, at most; llama.cpp's K-quants 256
K_QUANTS = 256


def si(value: float, unit: str = "", *, number: str = ".2f") -> str:
    """Format with a decimal prefix: 8292166656 -> 8.29 G, and with the unit "B" 8.29 GB.

    Args:
        value (`float`): a number of bytes, parameters or FLOPs.
        unit (`str`): what follows the prefix.
        number (`str`): format of the number before a prefix.
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:{number}} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip()


def groups(widths: Sequence[int]) -> str:
    """Say which quantisers that work in groups of weights take these widths: they cut rows of output projections into groups.

    Args:
        widths (`Sequence[int]`): `[L]`, of all layers.
    """
    common = math.gcd(*widths)
    fits = common & -common  # the largest power of two in it
    known = f"All widths are multiples of {common}"
    kinds = "GPTQ, AWQ, W4A16 and torchao's int4"
    if fits >= K_QUANTS:
        return f"{known}, so they suit quantisers that work in groups: {kinds}, and llama.cpp's K-quants."
    if fits >= 32:
        return (
            f"{known}, so groups of up to {fits} weights suit them, such as those of {kinds}. Longer ones need widths of their "
            f"multiples: prune with round_to={GROUPS}, or round_to={K_QUANTS} for llama.cpp's K-quants."
        )
    return (
        f"{known}. Quantisers that work in groups of 32 to {GROUPS} weights ({kinds}) need multiples of their group, and llama.cpp's "
        f"K-quants of {K_QUANTS}: prune with round_to={GROUPS} or round_to={K_QUANTS} for them. Quantisers by row or tensor do not."
    )
