"""Gathering along one axis on a CPU: numpy takes a third of torch's time if it need not check the indices again."""

from typing import Any

import numpy as np
import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy has no bfloat16


def gather(tensor: torch.Tensor, axis: int, index: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the entries of a tensor at some indices, like `torch.index_select`.

    Args:
        tensor (`torch.Tensor`): on any device, of any dtype of 1, 2, 4 or 8 bytes; its gradient is not followed.
        axis (`int`): axis along which entries are taken.
        index (`torch.Tensor`): `[k] int64` on the same device, each in `[0, tensor.shape[axis])`: another one is not refused.
        out (`torch.Tensor`, *optional*): contiguous, of the result's shape and dtype, on a CPU; to be written to.
    """
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        return tensor.index_select(axis, index)
    if out is None:
        out = torch.empty((*tensor.shape[:axis], len(index), *tensor.shape[axis + 1 :]), dtype=tensor.dtype)
    kind = _INTEGERS[tensor.element_size()]
    raw: Any = tensor.view(kind).numpy()
    np.take(raw, index.numpy(), axis=axis, out=out.view(kind).numpy(), mode="clip")
    return out
