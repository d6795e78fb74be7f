"""Batches of model inputs: what of them a model is given, and which tokens its decoder sees are real."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lop.errors import InvalidInputError
from hf_lop.learning.decoder.sound import not_finite


def to_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Move a batch to the device of the model's first parameter."""
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def model_inputs(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a batch on the model's device without its labels, with which the model would compute a loss."""
    return to_device({key: value for key, value in batch.items() if key != "labels"}, model)


def check_any(count: int) -> None:
    """Refuse calibration on no batch."""
    if not count:
        raise InvalidInputError(
            "No calibration batch was given, so there is nothing to measure or to fit to. Pass at least one."
        )


def check_numbers(sums: torch.Tensor, what: str, batch: int, where: str, model: nn.Module | None = None) -> None:
    """Refuse a batch that gives what is no number: in sums over batches it would be in all of them.

    Args:
        sums (`torch.Tensor`): what was made of it.
        what (`str`): kind of batch, such as "Calibration".
        batch (`int`): its number.
        where (`str`): what is not finite, such as "activations in layer 3".
        model (`nn.Module`, *optional*): what the batch was given to; its weights are looked at if something is not finite.

    Raises:
        InvalidInputError: if one is NaN or infinite.
    """
    if not torch.isfinite(sums).all():
        if model is not None and (name := not_finite(model)):
            raise InvalidInputError(
                f"{what} batch {batch} gives {where} that are not finite, as the model's weight {name} holds NaN or infinity. "
                "Load the model again, or take another."
            )
        raise InvalidInputError(
            f"{what} batch {batch} gives {where} that are not finite. Look for NaN or infinity in its inputs and in the weights, "
            "load a model in bfloat16 or float32 rather than float16, or leave the batch out."
        )


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which of the tokens that a decoder sees in a batch are real.

    Attributes:
        samples (`int`): B, samples of the batch.
        mask (`torch.Tensor`, *optional*): `[B, T] bool`, False at padding; None where nothing is padded.
    """

    samples: int
    mask: torch.Tensor | None

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "Tokens":
        """Read them from a batch of model inputs.

        Raises:
            InvalidInputError: if the batch has no inputs of a decoder, or a mask that is not one of tokens.
        """
        name = "decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask"
        mask = batch.get(name)
        if mask is not None and getattr(mask, "ndim", None) != 2:
            found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise InvalidInputError(
                f"{name} is {found}. Which tokens are padding is read from a mask of tokens, [samples, tokens]; one of pairs of "
                "tokens does not tell it. Pass such a mask, or none with samples of equal length."
            )
        padded = mask is not None and not bool(mask.all())
        for key in ("decoder_input_ids", "input_ids", "inputs_embeds", "attention_mask"):
            if batch.get(key) is not None:
                return cls(len(batch[key]), mask.bool() if padded and mask is not None else None)
        raise InvalidInputError(f"A batch needs input_ids or inputs_embeds; this one has {sorted(batch)}.")

    def mask_of(self, length: int) -> torch.Tensor | None:
        """Return the mask, if it fits samples of this many tokens.

        Raises:
            InvalidInputError: if it does not, so that nobody knows which tokens are padding.
        """
        if self.mask is not None and self.mask.shape[-1] != length:
            raise InvalidInputError(
                f"The decoder sees {length} tokens per sample, the attention mask {self.mask.shape[-1]}: padding cannot be "
                "told apart from tokens. Use batches of one sample, or of samples of equal length."
            )
        return self.mask

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations `[..., n]`, of which some models flatten the first axes, as `[B, T, n]`."""
        x = x.reshape(self.samples, -1, x.shape[-1])
        self.mask_of(x.shape[1])
        return x

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations `[tokens, n]` of real tokens, from those of all, `[..., n]`."""
        x = self.split(x)
        return x.flatten(0, 1) if self.mask is None else x[self.mask]
