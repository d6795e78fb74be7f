"""A short name for the weights of a model: equal weights give equal names, on every device."""

from hashlib import sha256
from itertools import chain

import torch
from torch import nn

_CHUNK = 2**22  # elements that are widened to 64 bits at a time
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weight_fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that depend on name, shape, dtype and bits of every parameter and buffer.

    The bits are summed as integers, plain and weighted by their position: exact in any order of summation, and no copy of
    the weights leaves their device.

    Args:
        model (`nn.Module`): any model, with its weights on any devices but "meta".
    """
    digest = sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        flat = tensor.detach().contiguous().flatten()
        if flat.dtype.is_complex:
            flat = torch.view_as_real(flat).flatten()
        bits = flat.view(_INTEGERS[flat.element_size()])
        sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
        for start in range(0, len(bits), _CHUNK):
            part = bits[start : start + _CHUNK].long()
            place = torch.arange(start, start + len(part), device=bits.device) % 65521 + 1
            sums += torch.stack([part.sum(), (part * place).sum()])  # may wrap around, always to the same number
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums.tolist()}\n".encode())
    return digest.hexdigest()[:16]
