"""How sizes are shown."""


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
