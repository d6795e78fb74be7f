"""Whose weights a pruner was made of: a fingerprint of the decoder, and how a model compares with it.

A run of 64 entries of every tensor of every decoder layer is kept, cast to bfloat16: 128 bytes a tensor. Where a run lies
depends on the number and the shape of its tensor only, so that the same entries are read of any model of these shapes.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hf_lop.errors import CheckpointMismatchError
from hf_lop.units.decoder import text_decoder
from hf_lop.units.kept import Earlier, Read

RUN = 64
FEWEST = 16  # entries of a run that must be left of a cut matrix to tell anything
# Correlation of a matrix's run with that of the base, the least of all matrices, from which a model is the base changed a
# little, and not another one: examples/benchmarks/results/identity.md has what either has.
NEAR = 0.5
LAYER = re.compile(r"(^|\.)\d+\.")


def read_memory(parameter: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Read entries of a parameter in memory."""
    return parameter.detach().reshape(-1)[start : start + count]


def _runs(model: Any, shapes: dict[int, Sequence[int]]) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Yield the tensors of the decoder's layers, and where the run of each begins and how long it is.

    Args:
        model (`PreTrainedModel`): the model.
        shapes (`dict`): what tensors had before they were cut, by their id.
    """
    named = sorted(
        (name, parameter) for name, parameter in text_decoder(model).named_parameters() if LAYER.search(name)
    )
    for number, (_, parameter) in enumerate(named):
        shape = shapes.get(id(parameter), parameter.shape)
        width = shape[-1] if shape else 1
        count = min(RUN, width)
        generator = torch.Generator().manual_seed(number)
        row = int(torch.randint(max(1, math.prod(shape) // max(1, width)), (1,), generator=generator))
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
    return _sample(model, read, None)[0].view(torch.int16)


def _sample(model: Any, read: Read, earlier: Earlier | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the runs of all tensors as the dense model has them, `[64 T] bfloat16`, and which entries are known, `[64 T] bool`."""
    cut = earlier.tensors(model) if earlier is not None else {}
    found, known = [torch.zeros(0, dtype=torch.bfloat16)], [torch.zeros(0, dtype=torch.bool)]
    for parameter, start, count in _runs(model, {key: tensor.shape for key, tensor in cut.items()}):
        run, there = torch.zeros(RUN, dtype=torch.bfloat16), torch.ones(RUN, dtype=torch.bool)
        if tensor := cut.get(id(parameter)):
            run[:count], there[:count] = tensor.read(read, parameter, start, count)
        elif parameter.numel():
            run[:count] = read(parameter, start, count).cpu()
        found.append(run)
        known.append(there)
    return torch.cat(found), torch.cat(known)


def compare(
    stored: torch.Tensor, model: Any, read: Read = read_memory, earlier: Earlier | None = None
) -> tuple[str, float]:
    """Compare a model with a fingerprint.

    Args:
        stored (`torch.Tensor`): `[64 T] int16`, of the base.
        model (`PreTrainedModel`): the model to prune, of the same sizes, but for what was cut.
        read (`Callable`): see [`sample_weights`].
        earlier (`Earlier`, *optional*): the cut behind it; entries that it took, or a recovery changed, are not compared.

    Returns:
        `tuple[str, float]`: "same", if all runs agree in bfloat16 (float16 may differ in the last bit); "near", if those
            of all matrices correlate; or "other"; and the least correlation.
    """
    found, known = _sample(model, read, earlier)
    if found.shape != stored.shape:
        return "other", 0.0
    bits = stored.view(torch.bfloat16)
    base, own = (runs.float().view(-1, RUN) for runs in (bits, torch.where(known, found, bits)))
    # Through float16, numbers are rounded twice, and small ones to multiples of 2^-24.
    halved = next(model.parameters()).dtype == torch.float16
    last_bit = (base.abs() * 2**-7).clamp_min(2**-24) if halved else torch.zeros_like(base)
    if bool(((own - base).abs() <= last_bit).all()):
        return "same", 1.0
    matrices = torch.tensor([parameter.dim() > 1 for parameter, _, _ in _runs(model, {})])
    # Unknown entries are those of the base above, which would speak for it.
    shown = known.view(-1, RUN).float()
    judged = matrices & (shown.sum(1) >= FEWEST)
    least = float(_correlation((base * shown)[judged], (own * shown)[judged]).min()) if judged.any() else 0.0
    return ("near" if least >= NEAR else "other"), least


def _correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Correlation of rows, about 0; 1 where both are 0."""
    norms = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(norms > 0, (a * b).sum(1) / norms.clamp_min(1e-30), (a == b).all(1).float())


def check_identity(
    stored: torch.Tensor | None,
    model: Any,
    base: str | None,
    *,
    strict: bool,
    read: Read = read_memory,
    earlier: Earlier | None = None,
) -> str:
    """Refuse a model that a pruner was not made of.

    Args:
        stored (`torch.Tensor`, *optional*): the pruner's fingerprint; older pruners have none.
        model (`PreTrainedModel`): the model to prune.
        base (`str`, *optional*): what the pruner was made for.
        strict (`bool`): refuse all but the same weights.
        read (`Callable`): see [`sample_weights`].
        earlier (`Earlier`, *optional*): see [`compare`].

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
    answer, least = compare(stored, model, read, earlier)
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
