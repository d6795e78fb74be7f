"""LOPPruner: a Hub model that turns a budget into a width for every layer, and cuts a model to them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, PreTrainedModel

from hf_lop.errors import CheckpointMismatchError, InvalidInputError, LOPError
from hf_lop.hub.elastic.write import PRUNER, keep_pruner
from hf_lop.hub.read.load import ODD, check_dtypes, check_loaded, check_numbers_of, check_safetensors, read_config
from hf_lop.hub.read.names import origin
from hf_lop.hub.save.extras import save_pruner_extras, stale_weights
from hf_lop.hub.write.push import push_folder
from hf_lop.hub.write.whole import filled_folder
from hf_lop.learning.config import LOPConfig
from hf_lop.learning.learned import Learned
from hf_lop.learning.predictors import RatioPredictor, build_predictor, train_predictor
from hf_lop.learning.rewards import Judge
from hf_lop.learning.sketch import SKETCH_ROWS, Sketch, check_rows
from hf_lop.learning.statistics import Statistics
from hf_lop.planning.blocks import AUTO, resolve, shown
from hf_lop.planning.budget import Budget
from hf_lop.planning.plan import Plan
from hf_lop.planning.predict import predict_ratios
from hf_lop.planning.table import look_up, training_pairs
from hf_lop.pruner.fit import Batches, fit
from hf_lop.pruner.kept import Run
from hf_lop.pruner.prepare import Samples, from_samples, loaded
from hf_lop.pruner.prune import Cut, prune_files, prune_model, seconds_on
from hf_lop.pruner.recipe import Recipe, usual_targets
from hf_lop.pruner.serve import Elastic, make_elastic
from hf_lop.units.checks import FORMAT
from hf_lop.units.measure import device_name
from hf_lop.version import __version__

AGAIN = "Take the pruner from its repository again."


class LOPPruner(PreTrainedModel):
    """A trained predictor with the neuron order and activation statistics of its base model.

    ```python
    LOPPruner.from_pretrained("org/lop-qwen25vl").prune(model, 0.3).push_to_hub("me/model-lop30")
    ```

    Buffers, each flat over all layers (`N` neurons in total): `neuron_order` `[N] uint16`, the neurons of each layer from
    most to least important; `mean`, `square`, `fluctuation`, `norm`: `[N] float32`, see `Statistics`; and unless
    `config.sketch_rows`, r, is 0, `sketch` `[N r / 2] uint8` and `sketch_scale` `[N] float32`, see `Sketch`. Not flat:
    `identity` `[64 T] int16`, the fingerprint of the base's weights, see `hf_lop.units.identity`.
    """

    config_class = LOPConfig
    config: LOPConfig
    base_model_prefix = "lop"
    main_input_name = "targets"
    neuron_order: torch.Tensor
    sketch: torch.Tensor
    sketch_scale: torch.Tensor
    identity: torch.Tensor

    def __init__(self, config: LOPConfig) -> None:
        super().__init__(config)
        widths, block = config.size.widths, config.size.block
        columns = sum(widths) * block
        if max(widths) > 2**16:
            raise CheckpointMismatchError(f"A layer has {max(widths)} neurons; the stored order allows at most 65536.")
        self.predictor = build_predictor(config.predictor, len(widths))
        self.register_buffer("neuron_order", torch.zeros(sum(widths), dtype=torch.uint16))
        for name in Statistics.__slots__:
            self.register_buffer(name, torch.zeros(columns))
        if check_rows(config.sketch_rows):
            self.register_buffer("sketch", torch.zeros(columns * config.sketch_rows // 2, dtype=torch.uint8))
            self.register_buffer("sketch_scale", torch.zeros(columns))
        if not 0 <= config.identity <= 2**24:
            raise CheckpointMismatchError(
                f"identity is {config.identity}; a fingerprint has 0 to 2**24 entries. {AGAIN}"
            )
        if config.identity:
            self.register_buffer("identity", torch.zeros(config.identity, dtype=torch.int16))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights alone: the predictor initialises its own, and everything else comes from a file."""

    # -- Planning ------------------------------------------------------------------------------------------------------

    def forward(self, targets: torch.Tensor) -> torch.Tensor:
        """Predict layer ratios `[B, L] float32` for target ratios `[B] float32`; their mean may miss the target."""
        ratios: torch.Tensor = self.predictor(targets)
        return ratios

    def predict(self, ratio: float) -> np.ndarray:
        """Predict the layer ratios `[L] float64` for one target ratio, before they are projected onto a budget."""
        named = self.predictor.named_parameters()
        weights = {name: parameter.detach().float().cpu().numpy() for name, parameter in named}
        return predict_ratios(self.config.predictor, weights, ratio, len(self.config.size.widths))

    def look_up(self, ratio: float, search: str | None = None) -> np.ndarray:
        """Return the layer ratios `[L] float64` of a table, interpolated between targets.

        Args:
            ratio (`float`): target ratio.
            search (`str`, *optional*): whose table; by default the one that the predictor learned from.

        Raises:
            InvalidInputError: if the pruner has no such table.
        """
        table = self.config.search_table if search is None else self.config.table_of(search)
        return look_up(table or [], ratio, len(self.config.size.widths))

    def plan(
        self,
        ratio: float | None = None,
        *,
        params: float | None = None,
        memory: float | str | None = None,
        flops: float | None = None,
        latency: float | None = None,
        round_to: int | Literal["auto"] = AUTO,
    ) -> Plan:
        """Plan the width of every layer for a budget. Needs no model and no data.

        Give at least one of the budgets; all that are given hold. The widths meet the one that binds exactly, up to one
        `round_to` step, from below.

        Args:
            ratio (`float`, *optional*): fraction of all FFN neurons to remove, in [0, 1).
            params (`float`, *optional*): parameters the whole model may have.
            memory (`float` or `str`, *optional*): bytes its parameters may take, or a string such as "6GB"; counted in the
                dtypes of the model that the pruner was made from.
            flops (`float`, *optional*): FLOPs its text decoder may need per token.
            latency (`float`, *optional*): seconds all its FFNs may take for one token on this device; measured now.
            round_to (`int` or `str`): widths are multiples of this, unless a layer keeps all its neurons; "auto" is what the pruner
                was fitted with, else 64, 32, 16 or 8 by the width of each layer, as GPUs are slow at odd widths. Where the
                budget allows no such blocks they are halved, and `Plan.notes` says so.

        Returns:
            `Plan`: the widths and what they save.

        Raises:
            InvalidInputError: if no budget is given, or a value is out of its range.
            InfeasibleBudgetError: if the smallest possible model exceeds a budget; the message names it.
        """
        return self.plan_for(
            Budget.of(ratio, params=params, memory=memory, flops=flops, latency=latency, round_to=round_to)
        )

    def plan_for(self, budget: Budget) -> Plan:
        """Plan the width of every layer for a budget; see `plan`."""
        measure = seconds_on(self.device, getattr(torch, self.config.base_dtype))
        plan = self.config.known.plan(self.predict, budget, measure=measure)
        return plan if plan.seconds is None else replace(plan, device=device_name(self.device))

    # -- Pruning -------------------------------------------------------------------------------------------------------

    def learned(self) -> Learned:
        """Return what this pruner knows about its base model: order, statistics and sketch; views of its buffers."""
        size = self.config.size
        columns = [width * size.block for width in size.widths]
        parts = [getattr(self, name).float().cpu().split(columns) for name in Statistics.__slots__]
        sketches = []
        if self.config.sketch_rows:
            codes = self.sketch.cpu().view(-1, self.config.sketch_rows // 2).split(columns)
            scales = self.sketch_scale.float().cpu().split(columns)
            sketches = [Sketch(*layer) for layer in zip(codes, scales, strict=True)]
        return Learned(
            size,
            self.config.base_dtype,
            list(self.neuron_order.cpu().to(torch.int64).split(list(size.widths))),
            [Statistics(*layer) for layer in zip(*parts, strict=True)],
            sketches,
            self.config.sorted_by,
            self.identity.cpu() if self.config.identity else None,
        )

    def order(self) -> list[torch.Tensor]:
        """Return the neurons of each layer from most to least important, `[n] int64`.

        Raises:
            CheckpointMismatchError: if a layer's order is no permutation of its neurons.
        """
        return self.learned().checked_order()

    def statistics(self) -> list[Statistics]:
        """Return the activation statistics of each layer, `[n] float32`, as they were measured in calibration."""
        return self.learned().statistics

    def directions(self) -> list[torch.Tensor]:
        """Return the sketch of second moments, B `[r, n] float32` of each layer; empty if this pruner has none."""
        return [sketch.directions() for sketch in self.learned().sketches]

    def _keep(self, learned: Learned) -> None:
        """Write what is known into the buffers."""
        self.neuron_order.copy_(torch.cat(learned.order).to(torch.uint16))
        for name in Statistics.__slots__:
            getattr(self, name).copy_(torch.cat([getattr(layer, name) for layer in learned.statistics]))
        if learned.sketches:
            self.sketch.copy_(torch.cat([sketch.codes.flatten() for sketch in learned.sketches]))
            self.sketch_scale.copy_(torch.cat([sketch.scale for sketch in learned.sketches]))
        self.config.identity = 0 if learned.identity is None else len(learned.identity)
        if learned.identity is not None:
            self.register_buffer("identity", learned.identity.clone())

    def prune(
        self,
        model: PreTrainedModel | str | Path,
        ratio: float | None = None,
        *,
        params: float | None = None,
        memory: float | str | None = None,
        flops: float | None = None,
        latency: float | None = None,
        round_to: int | Literal["auto"] = AUTO,
        method: str = "lop",
        recover: str | None = "auto",
        data: Batches | None = None,
        strict: bool = False,
        output_dir: str | Path | None = None,
        loading: Mapping[str, Any] | None = None,
    ) -> PreTrainedModel:
        """Cut a model to a budget, in place, or from file to file.

        Args:
            model (`PreTrainedModel`, `str` or `Path`): the dense base model; a Hub id or folder is loaded first, in the
                dtype it is stored in.
            ratio (`float`, *optional*): see [`~LOPPruner.plan`], as for the other budgets.
            params (`float`, *optional*): see `plan`.
            memory (`float` or `str`, *optional*): see `plan`; counted in the model's own dtype.
            flops (`float`, *optional*): see `plan`.
            latency (`float`, *optional*): see `plan`; measured in the model's dtype on its device.
            round_to (`int` or `str`): see `plan`.
            method (`str`): "lop", the predicted plan; a plan that was searched, such as "additive" or "cmaes", where the
                pruner has it; or a baseline from the same statistics: one of `METHODS`.
            recover (`str`, *optional*): let the output projections take over what the removed neurons did: "sequential", least
                squares on `data`, layer after layer, each fitted to what is missing behind it; "lstsq", least squares on
                `data`, every layer by itself; "sketch", the same on this pruner's sketch of the activations; "fold", their
                mean, from the stored statistics; or None. The
                default, "auto", is "sequential" with `data` ("lstsq" where the layers do not allow that), else "sketch" if there
                is one, else None. It holds out one batch of five, and takes the recovery back if these answers get worse by
                it; it does without `data` of fewer tokens than a layer keeps neurons.
                `config.pruning_config["recovery"]` says which it was.
            data (`Iterable[Mapping]`, *optional*): batches of model inputs like those the model shall work on.
            strict (`bool`): refuse all weights but those that the pruner was made of; else those of a fine-tuned or
                quantised version pass with a warning, and only other models are refused.
            output_dir (`str` or `Path`, *optional*): new or empty folder; with it, `model` must be a Hub id or folder, and is
                cut from file to file. The folder is the one that `prune(model, ...).save_pretrained(output_dir)` writes, byte
                by byte, but no weight is held in memory longer than it takes to copy it. It appears when it is complete; the
                same call goes on where one was killed. Recoveries that read data need the model
                in memory.
            loading (`Mapping`, *optional*): arguments of `from_pretrained` for a model given by name, such as
                `{"device_map": "cuda", "dtype": torch.bfloat16}`.

        Returns:
            `PreTrainedModel`: the same object, of the same class, device and dtype; with `output_dir` a model on the meta
            device, as its weights are in the folder only. Its text config lists a width per
            layer; `save_pretrained` and `push_to_hub` write everything needed to load it anywhere.

        Raises:
            UnsupportedModelError: if the model cannot be pruned.
            CheckpointMismatchError: if this pruner was made for another model.
            InvalidInputError: if the budget is out of range, `method` or `recover` is unknown, the pruner was not fitted for
                the method, or `recover` needs what is not there.
            InfeasibleBudgetError: if the budget is below the smallest possible model. Nothing was changed in any case.
        """
        budget = Budget.of(ratio, params=params, memory=memory, flops=flops, latency=latency, round_to=round_to)
        cut = Cut(budget, method, recover, strict)
        if output_dir is None:
            return prune_model(self.config, self.learned(), self.predict, model, cut, data, loading)
        if not isinstance(model, str | Path) or data is not None or loading:
            raise InvalidInputError(
                "With output_dir, model must be a Hub id or a folder, and neither data nor loading can be given."
            )
        return prune_files(self.config, self.learned(), self.predict, model, Path(output_dir), cut)

    # -- Any size from one model ---------------------------------------------------------------------------------------

    def make_elastic(self, model: PreTrainedModel | str | Path) -> PreTrainedModel:
        """Sort the neurons of every FFN by importance, in place, so that one repository gives every size.

        The model computes what it did before, up to the order of summation. Its `save_pretrained` and `push_to_hub` write
        an elastic repository: a dense checkpoint for any loader, this pruner beside it, and what
        `from_pretrained(ID, lop_ratio=0.3)` needs to read a size without the rest. One projection at a time is copied.

        Args:
            model (`PreTrainedModel`, `str` or `Path`): the dense base model; a Hub id or folder is loaded first.

        Returns:
            `PreTrainedModel`: the same object.

        Raises:
            UnsupportedModelError: if the model cannot be pruned.
            CheckpointMismatchError: if this pruner was made for another model, or the model is elastic already. Nothing was
                changed in either case.
        """
        model, known = make_elastic(self.config, self.learned(), model)
        twin = copy.deepcopy(self)
        twin._keep(known)
        twin.config.base_size, twin.config.base_dtype = known.size.to_dict(), known.dtype
        twin.config.sorted_by = known.sorted_by
        if twin.config.round_to is None:  # of a pruner that says nothing; a size must not change under its card
            twin.config.round_to = shown(resolve(AUTO, known.size.widths)[0])
        keep_pruner(model, twin)
        return model

    def elastic(self, model: PreTrainedModel | str | Path) -> Elastic:
        """Let a dense model change its size in microseconds; it is only read.

        Without a copy of weights for one from an elastic repository; else with a sorted copy of its FFN weights.

        Args:
            model (`PreTrainedModel`, `str` or `Path`): the dense base model, or the elastic one.

        Returns:
            `Elastic`: `set_plan` sets the size, `model` runs, `materialize` makes an ordinary pruned model.

        Raises:
            UnsupportedModelError: if the model cannot be pruned.
            CheckpointMismatchError: if this pruner was made for another model.
        """
        return Elastic(self.config, self.learned(), self.plan, model)

    # -- Making --------------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel | str | Path,
        data: Any,
        validation: Batches | None = None,
        *,
        processor: Any = None,
        samples: int = 400,
        search_samples: int = 400,
        report_samples: int | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        criterion: str = "l2",
        search: str = "additive",
        reward: str | Judge = "divergence",
        targets: Sequence[float] | None = None,
        evaluations: int = 200,
        predictor: str = "transformer",
        sketch_rows: int = SKETCH_ROWS,
        recover: str | None = None,
        round_to: int | Literal["auto"] = AUTO,
        seed: int = 0,
        journal: str | Path | None = None,
        base_model: str | None = None,
        provenance: dict[str, Any] | None = None,
        loading: Mapping[str, Any] | None = None,
    ) -> "LOPPruner":
        """Make a pruner: calibrate, probe each layer, plan every target, train the predictor on the plans.

        Samples are split at random into disjoint parts for calibration, search and report, of which the last is never looked
        at; the config records the fingerprints of all. For the report, draw the same parts again:
        `split_rows(data, (samples, search_samples, report_samples), seed)[2]` (from `hf_lop.learning.data`).

        In processes that `accelerate launch` or torchrun started, every process must call this with the same arguments;
        each runs every n-th batch, and all return the same pruner as one process that computes with as many threads, but for
        the last digits of the sketch. The first process keeps the journal.

        Args:
            model (`PreTrainedModel`, `str` or `Path`): the dense base model; not changed. A Hub id or folder is loaded.
            data (`Dataset`, `Sequence` or `str`): samples: chats with or without pictures, questions and answers, or plain
                texts, see [`model_batches`][hf_lop.learning.data.model_batches]; or a file or Hub id of such. With `validation`:
                ready batches of model inputs, for the activation statistics.
            validation (`Iterable[Mapping]`, *optional*): other ready batches, on which plans are judged. With `labels` only
                answers count; of samples that is the last turn of a chat.
            processor (*optional*): turns samples into model inputs; that of the model's repository by default.
            samples (`int`): samples for the activation statistics.
            search_samples (`int`): other samples, on which plans are judged.
            report_samples (`int`, *optional*): samples set aside for reports; what is left, at most 400, by default.
            batch_size (`int`): samples per batch.
            max_length (`int`, *optional*): tokens at which plain texts are cut.
            criterion (`str`): importance criterion, one of `CRITERIA`.
            search (`str`): "additive", plans from single-layer probes alone; "mcts", the paper's tree search; or
                "cmaes". The searches start from the additive plan.
            reward (`str` or `Callable`): what a search maximises: one of `REWARDS`, or your own judge of a candidate model, see
                [`scorer`][hf_lop.learning.rewards.scorer]. Additive plans need none.
            targets (`Sequence[float]`, *optional*): target ratios to plan; 0.1 to 0.7 in steps of 0.025 by default (the
                paper's step), for additive plans 0 to 0.9 in steps of 0.0125.
            evaluations (`int`): candidates that a search evaluates per target.
            predictor (`str`): "transformer", "bilstm" or "mlp".
            sketch_rows (`int`): directions per layer in the sketch of the activations, which lets `prune` recover without
                data; even, half a byte per neuron each. 0 for none; nor is one kept, with a warning, where calibration has fewer
                tokens than a layer has neurons.
            recover (`str`, *optional*): "sketch" judges every candidate as `prune` leaves it, after recovery from the sketch:
                what is best then is not what is best without.
            round_to (`int` or `str`): what the widths of probes and candidates are multiples of, so that what is searched is what is
                cut; the default of this pruner's plans. See `plan` for "auto".
            seed (`int`): of the draw of samples, the search, the predictor's initial weights and its training order.
            journal (`str` or `Path`, *optional*): folder that keeps probes and evaluations; the same call with the same
                folder resumes after a kill, to the same result.
            base_model (`str`, *optional*): Hub id of the base model, where it was not loaded by id.
            provenance (`dict`, *optional*): what the card says about the data, such as dataset, samples, seed.
            loading (`Mapping`, *optional*): see `prune`; by default a model goes to the device of its process, if there are several.

        Returns:
            `LOPPruner`: ready to plan, prune, save and push.

        Raises:
            UnsupportedModelError: if the model cannot be pruned.
            InvalidInputError: if an argument is unknown, there are too few samples, or the journal belongs to other data or
                settings.
            ProcessError: if another process failed or is gone.
        """
        targets = usual_targets(search) if targets is None else targets
        recipe = Recipe(
            criterion, search, reward, targets, evaluations, predictor, sketch_rows, recover, seed, round_to
        )
        facts: dict[str, Any] = {}
        if validation is None:
            how = Samples(processor, samples, search_samples, report_samples, batch_size, max_length, seed)
            model, calibration, validation, facts = from_samples(model, data, how, loading)
        else:
            model, calibration = loaded(model, loading), data
        fitted = fit(model, calibration, validation, recipe, Run(journal))
        learned, (source, commit) = fitted.learned, origin(model)
        pruner = cls(
            LOPConfig(
                format=FORMAT,
                base_model=base_model or source,
                base_revision=commit if base_model in (None, source) else None,
                base_model_type=model.config.model_type,
                base_dtype=learned.dtype,
                base_size=learned.size.to_dict(),
                criterion=criterion,
                calibration={**(provenance or {}), **facts, **fitted.provenance, "versions": _versions()},
                probes=fitted.probes,
                round_to=shown(fitted.blocks),
                sketch_rows=2 * learned.sketches[0].codes.shape[1] if learned.sketches else 0,
            )
        )
        pruner._keep(learned)
        pruner._take_predictor(predictor, fitted.predictor, fitted.loss, fitted.table)
        pruner.train(False)
        return pruner

    def train_predictor(
        self,
        predictor: str = "transformer",
        *,
        table: list[dict[str, Any]] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> list[float]:
        """Train a predictor on (R, layer ratios) pairs; it replaces the current one.

        Args:
            predictor (`str`): "transformer", "bilstm" or "mlp".
            table (`list[dict]`, *optional*): rows `{"ratio": R, "ratios": [L floats]}`, which the config records; this
                pruner's own table by default. Targets between rows are interpolated.
            seed (`int`): of the initial weights and the training order.
            progress (`bool`): show a progress bar on stderr.

        Returns:
            `list[float]`: mean squared error after each epoch.

        Raises:
            InvalidInputError: if there is no table, a row does not fit the model, or the predictor is unknown.
        """
        if table is not None and table != self.config.search_table:
            self.config.calibration = {**(self.config.calibration or {}), "search": "table given to train_predictor"}
        table = self.config.search_table or [] if table is None else table
        layers = len(self.config.size.widths)
        trained = build_predictor(predictor, layers, seed=seed)
        losses = train_predictor(trained, *training_pairs(table, layers), seed=seed, progress=progress)
        self._take_predictor(predictor, trained, losses[-1], table)
        return losses

    def _take_predictor(self, name: str, predictor: RatioPredictor, loss: float, table: list[dict[str, Any]]) -> None:
        """Put a predictor that was trained on a table in place of the current one."""
        self.predictor = predictor.to(self.device).eval()
        self.config.predictor, self.config.predictor_loss, self.config.search_table = name, loss, table
        self.config.min_ratio, self.config.max_ratio = 0.0, max(float(row["ratio"]) for row in table)

    # -- Saving and loading --------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *args: Any,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the pruner with its card and plots; see `PreTrainedModel.save_pretrained`.

        Args:
            save_directory (`str` or `Path`): folder to write.
            is_main_process (`bool`): other processes write neither card nor plots.
            *args: see transformers.
            repo_id (`str`, *optional*): Hub id that the card names; with `push_to_hub`, also where to push.
            push_to_hub (`bool`): push as well.
            **kwargs: see transformers.
        """
        if not self.should_save_on_this_rank(is_main_process):
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            return
        out = Path(save_directory)
        with filled_folder(out, stale_weights) as folder:
            super().save_pretrained(folder, is_main_process, *args, **kwargs)
            save_pruner_extras(self.config, lambda ratio: self.plan(ratio).widths, folder, repo_id, out=out)
        if push_to_hub:
            self.push_to_hub(repo_id or out.name, token=kwargs.get("token"))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:  # type: ignore[override]
        """Push weights, config, card and plots in one commit.

        Args:
            repo_id (`str`): Hub repository; made if it does not exist.
            **kwargs: `private`, `token`, `revision`, `commit_message`, `commit_description`, `create_pr`; and `collection`,
                the title or slug of a collection to add it to.

        Returns:
            `CommitInfo`: the commit, with its URL.
        """
        return push_folder(lambda folder, name: self.save_pretrained(folder, repo_id=name), repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a pruner from a Hub id or a folder; see `PreTrainedModel.from_pretrained`.

        Raises:
            InvalidInputError: if there is no such repository.
            CheckpointMismatchError: if it is no pruner repository, or a file of it is damaged.
        """
        name = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
        config = read_config(name, **hub)
        if isinstance(getattr(config, "elastic_config", None), dict):
            kwargs["subfolder"] = hub["subfolder"] = PRUNER
            config = read_config(name, **hub)
        dtypes = check_safetensors(Path(name) / hub.get("subfolder", ""))
        if config.model_type != "lop":
            raise CheckpointMismatchError(
                f"{name} holds a model of type {config.model_type!r}, not a pruner ('lop'). Pass the id of a pruner repository."
            )
        try:
            kwargs.setdefault("config", config)
            kwargs["ignore_mismatched_sizes"] = True  # check_loaded refuses them, and says why
            kwargs["use_safetensors"] = True  # a pickle can run code
            loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise CheckpointMismatchError(f"{name}: a weight file is damaged ({error}). Download it again.") from error
        except OSError as error:  # its config was found
            raise CheckpointMismatchError(f"{name} has no model.safetensors that can be read: {error}") from error
        except (LOPError, torch.OutOfMemoryError):
            raise
        except ODD as error:
            what = f"{type(error).__name__}: {str(error)[:300]}"
            raise CheckpointMismatchError(
                f"{name}: no pruner can be built from its config ({what}). {AGAIN}"
            ) from error
        check_loaded(str(name), loaded[1], whole=True)
        check_dtypes(str(name), loaded[0], dtypes)
        check_numbers_of(str(name), loaded[0])
        return loaded if wants_info else loaded[0]


def _versions() -> dict[str, str]:
    return {"hf_lop": __version__, **{package.__name__: package.__version__ for package in (torch, transformers)}}


AutoModel.register(LOPConfig, LOPPruner, exist_ok=True)
