"""What a plan is worth: rewards of candidate widths on recorded validation batches.

Symbols: S samples, K predictions that count, V tokens, p the dense model's distribution of the next token, q the
candidate's, y_t the token that follows.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_lop.errors import InvalidInputError
from hf_lop.learning.bench import Bench
from hf_lop.learning.data import IGNORED
from hf_lop.learning.decoder.batches import check_numbers
from hf_lop.learning.decoder.replay import Recorded
from hf_lop.learning.divergence import DenseTop
from hf_lop.learning.processes import Processes
from hf_lop.units.views import ElasticModel, OutputWeights


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one candidate.

    Attributes:
        value (`float`): higher is better.
        standard_error (`float`): of the value, from the spread between samples; nan where it is not known, as for a single
            sample.
        samples (`int`): S, samples with at least one prediction that counts; 0 where it is not known.
    """

    value: float
    standard_error: float
    samples: int


# A user's own reward: a candidate model in, its worth out.
Judge = Callable[[Any], Score | float]

# Each maps (log q [K, V], targets [K], dense predictions) to values [K], higher is better.
_Values = Callable[[torch.Tensor, torch.Tensor, DenseTop | None], torch.Tensor]


def _log_q_of(log_q: torch.Tensor, targets: torch.Tensor, _dense: DenseTop | None) -> torch.Tensor:
    return log_q.gather(1, targets.unsqueeze(1)).squeeze(1)


def _hits(log_q: torch.Tensor, targets: torch.Tensor, _dense: DenseTop | None) -> torch.Tensor:
    return (log_q.argmax(1) == targets).float()


def _agreement(log_q: torch.Tensor, _targets: torch.Tensor, dense: DenseTop | None) -> torch.Tensor:
    if dense is None:
        raise InvalidInputError('The divergence needs the dense predictions. Use Reward(..., kind="divergence").')
    return -dense.divergence(log_q)


@dataclass(frozen=True, slots=True)
class RewardKind:
    """One way to reward a candidate.

    Attributes:
        values: maps (log q `[K, V] float32`, targets `[K]`, dense predictions) to a value per prediction `[K]`.
        join (`str`): how the values of one sample become its share: "sum" or "all" (their minimum) give every sample
            the same weight; "mean" weighs all predictions alike.
        needs_labels (`bool`): whether batches must say which tokens are the answer.
        formula (`str`): the reward.
    """

    values: _Values
    join: str
    needs_labels: bool
    formula: str


REWARDS = {
    "log_likelihood": RewardKind(_log_q_of, "sum", True, "mean over samples of sum_t log q(y_t), in nats per answer"),
    "accuracy": RewardKind(_hits, "all", True, "fraction of samples with argmax q = y_t at every answer token"),
    "divergence": RewardKind(_agreement, "mean", False, "-mean over predictions of KL(p || q), in nats"),
    "perplexity": RewardKind(_log_q_of, "mean", False, "-log of the perplexity: mean log q(y_t), in nats per token"),
}


class Reward:
    """A reward of widths: recorded batches replayed on an elastic model. Deterministic.

    Several processes score a candidate together, each on its share of the batches, which it alone records and holds.
    Shares are split rather than candidates, so that a search which asks for one candidate at a time gains as well.
    Sums over samples are rounded once, at their end: one process and several get the same value, bit by bit.

    Attributes:
        kind (`str`): one of `REWARDS`.
        elastic (`ElasticModel`): set to the widths that were scored last.
        recorded (`list[Recorded]`): the batches of this process, with the predictions that this reward reads.

    Example:
        ```python
        reward = Reward.on(model, order, batches, "divergence")
        score = reward([64, 48, 80, 96])
        print(score.value, "+-", score.standard_error)
        ```
    """

    def __init__(
        self,
        elastic: ElasticModel,
        recorded: Sequence[Recorded],
        kind: str = "divergence",
        processes: Processes | None = None,
    ) -> None:
        """Make a reward from parts that several rewards may share; "divergence" runs the dense model once.

        Args:
            elastic (`ElasticModel`): of the dense model.
            recorded (`Sequence[Recorded]`): validation batches, recorded with `elastic.model` at its dense widths.
            kind (`str`): one of `REWARDS`.
            processes (`Processes`, *optional*): those that share the batches; each has recorded its own, and all of them
                make and call this reward together.

        Raises:
            InvalidInputError: if `kind` is unknown, no target is known, or answers are needed and not labelled.
        """
        if kind not in REWARDS:
            raise InvalidInputError(f"kind is {kind!r}; choose one of {', '.join(REWARDS)}.")
        self.kind, self.elastic, self._processes = kind, elastic, processes or Processes()
        self.recorded: list[Recorded] = []
        self._dense: list[DenseTop | None] = []
        if not sum(self._processes.gather(lambda: self._prepare(recorded))):
            raise InvalidInputError("No prediction has a known target. Pass samples of at least two tokens.")

    def _prepare(self, recorded: Sequence[Recorded]) -> int:
        """Choose the predictions that count and make the dense ones; return the number of batches."""
        if REWARDS[self.kind].needs_labels and not all(entry.labelled for entry in recorded):
            raise InvalidInputError(
                f"The reward {self.kind!r} needs to know the answers, and a batch has no labels. Pass labels (-100 outside "
                'of the answers), or use the reward "divergence" or "perplexity".'
            )
        self.recorded = list(recorded) if self.kind == "divergence" else _with_targets(recorded)
        self._dense = [None] * len(self.recorded)
        if self.kind == "divergence":
            self.elastic.set_widths([unit.count for unit in self.elastic.units])
            bar = self._processes.bar(self.recorded, "dense predictions")
            self._dense = [DenseTop.of(self._log_q(entry)) for entry in bar]
        return len(self.recorded)

    @classmethod
    def on(
        cls,
        model: nn.Module,
        order: Sequence[torch.Tensor],
        batches: Iterable[Mapping[str, Any]],
        kind: str = "divergence",
        processes: Processes | None = None,
        outputs: OutputWeights | None = None,
    ) -> "Reward":
        """Sort the neurons of a dense model, record batches and make a reward from them.

        Args:
            model (`nn.Module`): the dense model; only read, see [`ElasticModel`] for the memory this takes.
            order (`Sequence[torch.Tensor]`): neurons of each layer from most to least important, `[n] int64`.
            batches (`Iterable[Mapping]`): validation batches of model inputs. With `labels` `[B, T]` (-100 outside of
                the answers) only answers count, see [`predictions`][hf_lop.learning.decoder.replay.predictions].
            kind (`str`): one of `REWARDS`.
            processes (`Processes`, *optional*): those that share the batches; all of them pass the same.
            outputs (`Callable`, *optional*): output projections of cut layers, see [`ElasticModel`].

        Returns:
            `Reward`: ready to be called.

        Raises:
            InvalidInputError: if `kind` is unknown, no target is known, or answers are needed and not labelled.
        """
        bench = Bench(model, order, batches, processes, outputs)
        return cls(bench.elastic, bench.recorded, kind, processes)

    def __call__(self, widths: Sequence[int]) -> Score:
        """Score widths `[L]`, one per layer.

        Raises:
            InvalidInputError: if there is not one width per layer, each in [1, dense width].
        """
        samples = [entry for share in self._processes.gather(lambda: self._share(widths)) for entry in share]
        return joined(samples)

    def _share(self, widths: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the value and the weight of every sample of this process, per batch."""
        self.elastic.set_widths(widths)
        kind, found = REWARDS[self.kind], []
        for number, (entry, dense) in enumerate(zip(self.recorded, self._dense, strict=True)):
            log_q = self._log_q(entry)
            where = f"predictions at widths {list(widths)}"
            # One NaN among the logits makes all of a row's log-probabilities NaN.
            check_numbers(log_q[:, 0].nan_to_num(math.nan, 0, 0), "Validation", number, where)
            values = kind.values(log_q, entry.target, dense)
            check_numbers(values, "Validation", number, where)  # logits near the largest number leave none of them
            found.append(by_sample(values, entry.sample, kind.join))
        return found

    def _log_q(self, entry: Recorded) -> torch.Tensor:
        return entry.logits(self.elastic.model).float().log_softmax(-1)


def reward_name(reward: str | Judge) -> str:
    """Return the name of a reward in records and journals; of a callable its `name`, or else its `__name__`.

    Raises:
        InvalidInputError: if the name is unknown, or the callable has none.
    """
    if isinstance(reward, str) and reward in REWARDS:
        return reward
    name = getattr(reward, "name", None) or getattr(reward, "__name__", None)
    if not callable(reward):
        raise InvalidInputError(f"reward is {reward!r}; choose one of {', '.join(REWARDS)}, or pass a callable.")
    if not isinstance(name, str) or name == "<lambda>" or name in REWARDS:
        raise InvalidInputError(
            f"The reward {reward!r} has no name of its own, by which a journal could tell it from others. Use a function made "
            "by def, or give the callable an attribute `name`."
        )
    return name


def scorer(bench: Bench, reward: str | Judge) -> Callable[[Sequence[int]], Score]:
    """Return what scores widths `[L]`: a [`Reward`] of one of `REWARDS`, or a callable's own verdict.

    The callable brings its own data. It is given the candidate, a model of the same class in evaluation mode that can
    `generate` and is valid during the call (its config keeps the dense widths), and returns a number or a `Score`, higher
    for better; what is returned here raises `InvalidInputError` if it returns something else. Of several processes each
    calls it for every candidate, and the verdict of the main one counts.
    """
    if isinstance(reward, str):
        return Reward(bench.elastic, bench.recorded, reward, bench.processes)
    elastic = bench.elastic

    def score(widths: Sequence[int]) -> Score:
        elastic.set_widths(widths)
        with torch.no_grad():
            found = reward(elastic.model)
        if isinstance(found, Score):
            return found
        try:
            return Score(float(found), math.nan, 0)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"The reward {reward_name(reward)} returned a {type(found).__name__}; return a number, or a Score."
            ) from error

    return score


def _with_targets(recorded: Sequence[Recorded]) -> list[Recorded]:
    """Leave out predictions whose target is unknown."""
    known = [entry.select(entry.target != IGNORED) for entry in recorded]
    return [entry for entry in known if len(entry.target)]


def by_sample(values: torch.Tensor, sample: torch.Tensor, join: str) -> tuple[np.ndarray, np.ndarray]:
    """Join values `[K]` by sample `[K]`, see [`RewardKind`]; return the value and the weight of each sample `[S] float64`."""
    index, counts = sample.unique(return_inverse=True, return_counts=True)[1:]
    shares = values.new_zeros(len(counts), dtype=torch.float64)
    shares.scatter_reduce_(0, index, values.double(), "amin" if join == "all" else "sum", include_self=False)
    weights = counts.double() if join == "mean" else torch.ones_like(shares)
    return shares.cpu().numpy(), weights.cpu().numpy()


def joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Score:
    """Return the score of samples, given the values and weights that [`by_sample`] found in parts of them."""
    sums, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _ratio(sums, weights)


def _ratio(sums: np.ndarray, weights: np.ndarray) -> Score:
    """Sum of sums over sum of weights, with the standard error of a ratio estimate between independent samples."""
    weight, count = math.fsum(weights), len(sums)  # fsum is exact, so the order of samples does not matter
    value = math.fsum(sums) / weight
    residual = sums - value * weights
    spread = count / (count - 1) * math.fsum(residual**2) if count > 1 else math.nan
    return Score(value, math.sqrt(spread) / weight, count)
