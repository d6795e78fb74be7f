"""Whose weights a pruner was made of: a fingerprint of the decoder, and how a model compares with it.

A run of 64 entries of every tensor of every decoder layer is kept, cast to bfloat16: 128 bytes a tensor. Where a run lies
depends on the number and the shape of its tensor only, so that the same entries are read of any model of these shapes.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hf_lop.errors import CheckpointMismatchError
from hf_lop.units.decoder import text_decoder

RUN = 64
# Correlation of a matrix's run with that of the base, the least of all matrices, from which a model is the base changed a
# little, and not another one: examples/benchmarks/results/identity.md has what either has.
NEAR = 0.5
LAYER = re.compile(r"(^|\.)\d+\.")

# Reads entries `[count]` of a parameter: those from the flat index `start` on.
Read = Callable[[torch.Tensor, int, int], torch.Tensor]


def read_memory(parameter: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Read entries of a parameter in memory."""
    return parameter.detach().reshape(-1)[start : start + count]


def _runs(model: Any) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Yield the tensors of the decoder's layers, and where the run of each begins and how long it is."""
    named = sorted(
        (name, parameter) for name, parameter in text_decoder(model).named_parameters() if LAYER.search(name)
    )
    for number, (_, parameter) in enumerate(named):
        width = parameter.shape[-1] if parameter.dim() else 1
        count = min(RUN, width)
        generator = torch.Generator().manual_seed(number)
        row = int(torch.randint(max(1, parameter.numel() // max(1, width)), (1,), generator=generator))
        column = int(torch.randint(width - count + 1, (1,), generator=generator))
        yield parameter, row * width + column, count


def is_in_memory(model: Any) -> bool:
    """Whether all parameters of a model can be read: none is on the meta device or offloaded."""
    return not any(parameter.is_meta for parameter in model.parameters())


def sample_weights(model: Any, read: Read = read_memory) -> torch.Tensor:
    """Return the runs of all tensors, `[64 T] int16`, the bits of bfloat16; what a tensor is shorter by is 0.

    Args:
        model (`PreTrainedModel`): the dense model.
        read (`Callable`): reads entries of its parameters, where they are not in memory.
    """
    found = []
    for parameter, start, count in _runs(model):
        run = torch.zeros(RUN, dtype=torch.bfloat16)
        if parameter.numel():
            run[:count] = read(parameter, start, count).cpu()
        found.append(run)
    return torch.cat(found).view(torch.int16) if found else torch.zeros(0, dtype=torch.int16)


def compare(stored: torch.Tensor, model: Any, read: Read = read_memory) -> tuple[str, float]:
    """Compare a model with a fingerprint.

    Args:
        stored (`torch.Tensor`): `[64 T] int16`, of the base.
        model (`PreTrainedModel`): the dense model to prune, of the same sizes.
        read (`Callable`): see [`sample_weights`].

    Returns:
        `tuple[str, float]`: "same", if all runs agree in bfloat16 (float16 may differ in the last bit); "near", if those
            of all matrices correlate; or "other"; and the least correlation.
    """
    found = sample_weights(model, read)
    if found.shape != stored.shape:
        return "other", 0.0
    base, own = (bits.view(torch.bfloat16).float().view(-1, RUN) for bits in (stored, found))
    # Through float16, numbers are rounded twice, and small ones to multiples of 2^-24.
    halved = next(model.parameters()).dtype == torch.float16
    last_bit = (base.abs() * 2**-7).clamp_min(2**-24) if halved else torch.zeros_like(base)
    if bool(((own - base).abs() <= last_bit).all()):
        return "same", 1.0
    matrices = torch.tensor([parameter.dim() > 1 for parameter, _, _ in _runs(model)])
    least = float(_correlation(base[matrices], own[matrices]).min()) if matrices.any() else 0.0
    return ("near" if least >= NEAR else "other"), least


def _correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Correlation of rows, about 0; 1 where both are 0."""
    norms = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(norms > 0, (a * b).sum(1) / norms.clamp_min(1e-30), (a == b).all(1).float())


def check_identity(
    stored: torch.Tensor | None, model: Any, base: str | None, *, strict: bool, read: Read = read_memory
) -> str:
    """Refuse a model that a pruner was not made of.

    Args:
        stored (`torch.Tensor`, *optional*): the pruner's fingerprint; older pruners have none.
        model (`PreTrainedModel`): the dense model to prune.
        base (`str`, *optional*): what the pruner was made for.
        strict (`bool`): refuse all but the same weights.
        read (`Callable`): see [`sample_weights`].

    Returns:
        `str`: "same", "near", or "unknown" where there is no fingerprint.

    Raises:
        CheckpointMismatchError: if it is another model, or not known to be the same and `strict`.
    """
    if stored is None or (read is read_memory and not is_in_memory(model)):
        if strict:
            raise CheckpointMismatchError(
                f"Whether this model has the weights that the pruner of {base or 'its base model'} was made of cannot be told, "
                "and strict was asked for: pruners of before 0.2 have no fingerprint, and offloaded weights cannot be compared. "
                "Load the model into memory, fit the pruner anew, or leave strict out."
            )
        return "unknown"
    answer, least = compare(stored, model, read)
    known = f"This pruner was made of the weights of {base or 'its base model'}"
    if answer == "other":
        raise CheckpointMismatchError(
            f"{known}; those of this model are others (correlation {least:.2f} where they differ most, at least {NEAR} is "
            "needed), so neuron orders and statistics say nothing about it. Use the pruner of this model, or fit one."
        )
    if answer == "near" and strict:
        raise CheckpointMismatchError(
            f"{known}; those of this model are near (correlation {least:.3f} where they differ most), not the same, and strict "
            "was asked for. Load the base model itself, or leave strict out."
        )
    return answer
