"""What a pruner records about its base model, and whether a model fits it."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from huggingface_hub import dataclasses as hub_dataclasses
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.planning.additive import additive_damage
from hf_lop.planning.known import Known, format_of, read_size
from hf_lop.units.checks import check_format
from hf_lop.units.kept import sorted_by as order_of
from hf_lop.units.size import ModelSize

Probed = TypeVar("Probed")


@hub_dataclasses.strict
class LOPConfig(PreTrainedConfig):
    """What a pruner knows about its base model and how it was made.

    Attributes:
        format (`int`): of the repository; 0 for those made before there were numbers.
        base_model (`str`, *optional*): Hub id of the dense model.
        base_revision (`str`, *optional*): commit of the dense model.
        base_model_type (`str`, *optional*): its `model_type`.
        base_dtype (`str`): dtype of its FFN weights.
        base_size (`dict`, *optional*): its `ModelSize`: widths, parameters, bytes, FLOPs.
        criterion (`str`): importance criterion behind the neuron order.
        calibration (`dict`, *optional*): where the statistics come from: dataset, samples, seed, fingerprints of the data;
            how plans were searched, and the seconds that every phase took.
        predictor (`str`): "transformer", "bilstm" or "mlp".
        predictor_loss (`float`, *optional*): mean squared error of the predicted layer ratios at the end of training.
        sketch_rows (`int`): directions per layer in the sketch of second moments; 0, as in repositories made before there
            were sketches, is none.
        min_ratio (`float`): smallest target ratio the predictor was trained on.
        max_ratio (`float`): largest target ratio the predictor was trained on.
        search_table (`list`, *optional*): the training pairs: `{"ratio": R, "ratios": [L floats]}`.
        other_tables (`dict`, *optional*): such tables of other searches, by engine, for comparisons.
        probes (`dict`, *optional*): what cutting single layers costs, in nats per prediction: `{"ratios": [P floats],
            "damage": [L][P floats], "context": c, "around": [L][P floats]}`, in the dense model and where all other
            layers are cut to the ratio c; see [`additive_plans`][hf_lop.allocation.additive_plans].
        round_to (`int` or `list`, *optional*): what the widths of its probes and candidates are multiples of, and those of its plans
            by default; a list where layers differ. None in older repositories, whose plans took single neurons.
        identity (`int`): entries of the fingerprint of the base's weights; 0, as in older repositories, is none.
        sorted_by (`str`, *optional*): SHA-256 of the neuron order by which an elastic model was sorted, in the pruner of its
            repository: the order there is 0, 1, 2, and so on.
    """

    model_type = "lop"
    format: int = 0
    base_model: str | None = None
    base_revision: str | None = None
    base_model_type: str | None = None
    base_dtype: str = "float32"
    base_size: dict[str, Any] | None = None
    criterion: str = "l2"
    calibration: dict[str, Any] | None = None
    predictor: str = "transformer"
    predictor_loss: float | None = None
    sketch_rows: int = 0
    min_ratio: float = 0.0
    max_ratio: float = 0.0
    search_table: list[dict[str, Any]] | None = None
    other_tables: dict[str, Any] | None = None
    probes: dict[str, Any] | None = None
    round_to: int | list[int] | None = None
    identity: int = 0
    sorted_by: str | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config; see transformers.

        Raises:
            CheckpointMismatchError: if it is of a format that this version does not know.
        """
        check_format(format_of(config_dict))
        return super().from_dict(config_dict, **kwargs)

    @property
    def size(self) -> ModelSize:
        """The base model's size.

        Raises:
            CheckpointMismatchError: if the config has none, or a damaged one.
        """
        size = read_size(self.base_size)
        dtype = getattr(torch, self.base_dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise CheckpointMismatchError(
                f"base_dtype is {self.base_dtype!r}, which is no floating-point dtype of torch. Take the pruner from its "
                "repository again."
            )
        return size

    @property
    def known(self) -> Known:
        """What this says about planning.

        Raises:
            CheckpointMismatchError: if it is damaged.
        """
        return Known.of({name: getattr(self, name) for name in ("base_size", "round_to", "sorted_by")})

    def table_of(self, search: str) -> list[dict[str, Any]] | None:
        """Return the rows that a search found ("additive", "mcts" or "cmaes"), or None if the pruner has none of it."""
        own = (self.calibration or {}).get("search") == search
        return self.search_table if own else (self.other_tables or {}).get(search)

    def estimate(self, widths: Sequence[int]) -> float | None:
        """Estimate how far a plan's predictions diverge from the dense model's, from the probes of single layers.

        Args:
            widths (`Sequence[int]`): `[L]` neurons kept in each layer, in this pruner's order.

        Returns:
            `float`: divergence in nats per prediction on the search data, before recovery unless `calibration` says that
                candidates were recovered; None without probes.
        """
        if not self.probes:
            return None
        dense = self.size.widths
        ratios = [1 - kept / full for kept, full in zip(widths, dense, strict=True)]
        return self.with_probes(
            lambda damage, probed, **others: additive_damage(damage, probed, dense, ratios, **others)
        )

    def with_probes(self, compute: Callable[..., Probed]) -> Probed:
        """Return what a function computes of the probes.

        Args:
            compute (`Callable`): takes `damage`, `ratios` and, where the pruner has them, the keywords `around` and `context`.

        Raises:
            CheckpointMismatchError: if the probes are damaged.
        """
        found: Any = self.probes
        try:
            others = {key: found[key] for key in ("around", "context") if found.get("around") is not None}
            return compute(found["damage"], found["ratios"], **others)
        except (InvalidInputError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointMismatchError(
                f"The probes of this pruner are damaged ({type(error).__name__}: {str(error)[:200]}). Take it from its repository "
                "again."
            ) from error

    def check_fits(
        self,
        model: PreTrainedModel,
        size: ModelSize,
        *,
        strict: bool,
        sorted_by: str | None = None,
        compared: bool = False,
    ) -> None:
        """Refuse a model that the pruner was not made for.

        Args:
            model (`PreTrainedModel`): the dense model to prune.
            size (`ModelSize`): its measured size.
            strict (`bool`): refuse, instead of warn about, another commit of the base model.
            sorted_by (`str`, *optional*): digest of the order by which the pieces of the model are sorted, as far as is known.
            compared (`bool`): whether its weights are compared with those of the base, which says more than commits do.

        Raises:
            CheckpointMismatchError: if model type, layers, widths or hidden size differ, the neurons are sorted otherwise, or
                the commit differs where `strict`.
        """
        base = self.size
        known = f"This pruner was made for {self.base_model or 'a model'} ({self.base_model_type})"
        facts = {
            "model type": (self.base_model_type, model.config.model_type),
            "number of decoder layers": (len(base.widths), len(size.widths)),
            "FFN widths": (list(base.widths), list(size.widths)),
            "hidden size": (base.hidden_size, size.hidden_size),
            "projections per FFN": (base.projections, size.projections),
        }
        for name, (expected, found) in facts.items():
            if expected is not None and expected != found:
                raise CheckpointMismatchError(
                    f"{known}: its {name} is {expected}, this model's {found}. Use the pruner of this model, or fit one."
                )
        order = order_of(model.config)
        if order != (sorted_by or self.sorted_by):
            raise CheckpointMismatchError(
                "The neurons of this model are sorted, by another order than this pruner's. Use the pruner of its own "
                "elastic repository: LOPPruner.from_pretrained(ID) with the id of that."
                if order
                else f"This pruner belongs to the sorted neurons of an elastic repository. {self.base_model or 'This model'} "
                "itself needs the pruner that the repository was made with."
            )
        if order or compared or getattr(model.config, "pruning_config", None):
            return  # the commit is of the elastic or pruned repository, the recorded one of what it was made from
        commit = getattr(model.config, "_commit_hash", None)
        if commit and self.base_revision and commit != self.base_revision:
            message = (
                f"{known} at commit {self.base_revision}; this model is at {commit}. Neuron orders may differ: load "
                f'it with revision="{self.base_revision}".'
            )
            if strict:
                raise CheckpointMismatchError(message)
            warnings.warn(message, stacklevel=3)


AutoConfig.register("lop", LOPConfig, exist_ok=True)
