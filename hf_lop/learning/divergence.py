"""The divergence from a dense model's predictions, from a compact record of them.

Symbols: K predictions, V tokens in the vocabulary, p the dense model's distribution of the next token, q another one.
"""

import math
from dataclasses import dataclass

import torch

TOP = 256  # dense probabilities kept per prediction


@dataclass(frozen=True, slots=True)
class DenseTop:
    """The dense model's distributions of K predictions, `min(V, 256)` tokens and the rest of each.

    The rest counts as one token, which gives a lower bound of the divergence: exact up to 256 tokens, and else short
    only by what differs among tokens outside of the dense model's first 256. It takes 2 kB per prediction instead of
    the 608 kB of a whole distribution over 152,064 tokens.

    Attributes:
        index (`torch.Tensor`): `[K, k] int32` tokens.
        log_p (`torch.Tensor`): `[K, k] float32` log-probabilities.
        log_rest (`torch.Tensor`): `[K] float32` log-probability of all other tokens; -inf where there are none.
    """

    index: torch.Tensor
    log_p: torch.Tensor
    log_rest: torch.Tensor

    @classmethod
    def of(cls, log_p: torch.Tensor) -> "DenseTop":
        """Keep the most likely tokens of distributions `[K, V]`."""
        top, index = log_p.topk(min(TOP, log_p.shape[1]), dim=1)
        return cls(index.int(), top, _log_rest(top, log_p.shape[1]))

    def divergence(self, log_q: torch.Tensor) -> torch.Tensor:
        """Return KL(p || q) of each prediction, `[K] float32`, for q `[K, V]` as log-probabilities."""
        top = log_q.gather(1, self.index.long())
        inside = _weighted(self.log_p, top).sum(1)
        return inside + _weighted(self.log_rest, _log_rest(top, log_q.shape[1]))


def _log_rest(top: torch.Tensor, vocabulary: int) -> torch.Tensor:
    if top.shape[1] == vocabulary:
        return torch.full_like(top[:, 0], -math.inf)
    rest = (1 - top.double().exp().sum(1)).clamp_min(1e-12)  # below that, rounding decides
    return rest.log().float()


def _weighted(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Terms p (log p - log q), 0 where p is 0."""
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
