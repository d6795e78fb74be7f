"""Any size from an elastic repository: `from_pretrained(ID, lop_ratio=0.3)` reads only what that size weighs.

The pruner in the repository plans the widths, and the weights are read in prefixes (see `hf_lop.hub.elastic.write`). From the Hub
they are put together to the folder of an ordinary pruned model, which stays in the assets of its cache, by repository, commit
and size. From a local folder they are read into memory, and nothing is written; but for weights that shall be on disk.
Either way transformers' own loader takes them: device maps, dtypes, quantisation and all else work as they do there.
"""

import contextlib
import copy
import hashlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import cached_assets_path, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME

from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.files import scratch_folder
from hf_lop.hub.elastic.read import Solvers, open_transposed, read_size
from hf_lop.hub.elastic.size_file import write_size
from hf_lop.hub.elastic.write import PRUNER
from hf_lop.hub.read.checkpoint import Shards
from hf_lop.hub.read.files import Files, Folder
from hf_lop.hub.read.load import read_config
from hf_lop.hub.read.repository import Repository
from hf_lop.hub.read.skeleton import load_skeleton
from hf_lop.hub.read.stored import stored_pieces
from hf_lop.hub.save.extras import save_pruned_extras
from hf_lop.hub.save.hooks import PREFIX
from hf_lop.hub.write.check import check_saved
from hf_lop.hub.write.whole import check_new, check_replaceable, whole_folder
from hf_lop.planning.budget import LIMITS, Budget
from hf_lop.planning.plan import Plan
from hf_lop.pruner.pruner import LOPPruner
from hf_lop.pruner.record import record
from hf_lop.recovery.choose import choose_recovery, prefix_solver, row_solver
from hf_lop.units.kept import note_kept
from hf_lop.units.kinds import find_units
from hf_lop.units.measure import measure_size
from hf_lop.units.modeling_lop import set_counts
from hf_lop.units.unit import Unit, take

SIZE_ARGUMENTS = (*LIMITS, "round_to", "recover")
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
Tensors = dict[str, torch.Tensor]


class _Source(NamedTuple):
    """An elastic repository at one commit, and the plan for a size of it."""

    name: str
    folder: Path  # what there is of it on this machine
    commit: str | None  # None for a folder
    hub: dict[str, Any]  # how to ask for more of it
    config: PreTrainedConfig
    pruner: LOPPruner
    budget: Budget
    plan: Plan
    recovery: str | None

    def key(self) -> str:
        """A name for this size among those of the repository."""
        facts = json.dumps([self.plan.widths, self.plan.round_to, self.recovery])
        return hashlib.sha256(facts.encode()).hexdigest()[:24]


def load_size(
    original: Callable[..., Any], cls: Any, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
) -> Any:
    """Load a model at a size, from an elastic repository.

    Args:
        original (`Callable`): transformers' own `from_pretrained`.
        cls (`type`): the model class.
        pretrained_model_name_or_path (`str` or `Path`): Hub id or folder of an elastic repository.
        *args: see transformers.
        **kwargs: see transformers; and at least one of `lop_ratio`, `lop_params`, `lop_memory`, `lop_flops`, `lop_latency`,
            as of [`~hf_lop.LOPPruner.plan`], with `lop_round_to` as well. `lop_recover` is "sketch", least squares on the
            pruner's sketch of the activations; None; or "auto", the default: "sketch" if there is one.

    Returns:
        `PreTrainedModel`: an ordinary pruned model; with its loading info if asked for.

    Raises:
        InvalidInputError: if no budget is given, or there is no such repository.
        InfeasibleBudgetError: if the budget is below the smallest possible model.
        CheckpointMismatchError: if the repository is not elastic, or a part of it is damaged or of something else.
    """
    asked = {key.removeprefix(PREFIX): kwargs.pop(key) for key in list(kwargs) if key.startswith(PREFIX)}
    if unknown := sorted(asked.keys() - set(SIZE_ARGUMENTS)):
        known = ", ".join(PREFIX + kind for kind in SIZE_ARGUMENTS)
        raise InvalidInputError(f"{PREFIX}{unknown[0]} is no size that from_pretrained knows; use one of {known}.")
    recover = asked.pop("recover", "auto")
    hub = {key: kwargs.pop(key) for key in HUB if key in kwargs}
    if kwargs.pop("subfolder", ""):
        raise InvalidInputError("An elastic repository has its model at the top; leave subfolder out.")
    config = kwargs.pop("config", None)
    source = _find(pretrained_model_name_or_path, Budget.of(**asked), recover, hub)
    on_disk = kwargs.get("offload_folder") is not None or _has_disk(kwargs.get("device_map"))
    with contextlib.ExitStack() as stack:
        folder, tensors = stack.enter_context(_size_folder(source, in_memory=not on_disk))
        if config is not None:
            kwargs["config"] = _pruned_config(cls, config, folder, source.plan)
        if tensors is None:
            loaded = original(cls, folder, *args, **kwargs)
        else:  # transformers takes either a name or weights
            loaded = original(cls, None, *args, state_dict=tensors, **{"config": folder, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if tensors is not None and (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        if "disk" in getattr(model, "hf_device_map", {}).values():
            weakref.finalize(model, stack.pop_all().close)  # weights that are on disk are read there later
    if getattr(model, "hf_quantizer", None) is None:
        note_prefixes(model, find_units(model), source.plan.widths)
    model.name_or_path = model.config._name_or_path = source.name  # processors and provenance are there
    model.config._commit_hash = source.commit
    return loaded


def _has_disk(device_map: Any) -> bool:
    return isinstance(device_map, dict) and "disk" in device_map.values()


def pull(
    name: str | Path, out: str | Path, budget: Budget, *, recover: str | None = "auto", **hub: Any
) -> dict[str, Any]:
    """Write a size of an elastic repository as a pruned model that loads anywhere.

    Args:
        name (`str` or `Path`): Hub id or folder of an elastic repository.
        out (`str` or `Path`): folder to write; appears whole or not at all.
        budget (`Budget`): what it may cost.
        recover (`str`, *optional*): "sketch", "auto" or None, see [`load_size`].
        **hub: `revision`, `token`.

    Returns:
        `dict`: its `pruning_config`, and the number of its `parameters`.

    Raises:
        LOPError: as of [`load_size`].
    """
    out = Path(out).resolve()  # "." has no name
    check_new(out)
    check_replaceable(out)
    source = _find(name, budget, recover, hub)
    with whole_folder(out) as folder:
        model, _ = _assemble(source, folder)
        save_pruned_extras(model, folder)
        check_saved(model, folder)
    return {"pruning_config": model.config.pruning_config, "parameters": model.num_parameters()}


def _find(name: str | Path, budget: Budget, recover: str | None, hub: dict[str, Any]) -> _Source:
    """Find an elastic repository and plan; reads config and pruner only."""
    folder, commit = Path(name), None
    if not folder.is_dir():
        try:
            folder = Path(hf_hub_download(str(name), "config.json", **hub)).parent
        except (OSError, HFValidationError) as error:
            raise InvalidInputError(f"{name} cannot be read as a model: {error} Pass a folder or a Hub id.") from error
        commit = folder.name
        hub = {**hub, "revision": commit}
    config = read_config(name, **hub)
    if not isinstance(getattr(config, "elastic_config", None), dict):
        raise CheckpointMismatchError(
            f"{name} is no elastic repository, so it has no size to choose. Make one with hf-lop make-elastic, or prune: "
            "LOPPruner.from_pretrained(...).prune(...)."
        )
    pruner = LOPPruner.from_pretrained(name, subfolder=PRUNER, **hub)
    recovery = choose_recovery(recover, data=False, sketch=pruner.config.sketch_rows > 0)
    if recovery not in ("sketch", None):
        raise InvalidInputError(
            f'{PREFIX}recover is {recover!r}; a size is read without the weights it does not have, so choose "sketch", "auto" or '
            "None. Or load the whole model, and prune it."
        )
    plan = pruner.plan_for(budget)
    recovery = recovery if plan.neurons_removed else None
    return _Source(str(name), folder, commit, hub, config, pruner, budget, plan, recovery)


# -- Folders -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _size_folder(source: _Source, *, in_memory: bool) -> Iterator[tuple[Path, Tensors | None]]:
    """The folder of a pruned model, which stays if it is of the Hub; its weights, where they are not in it."""
    if source.commit is None:
        root = cached_assets_path("hf_lop", "elastic", "local")
        with scratch_folder(root) as folder:
            yield folder, _assemble(source, folder, in_memory=in_memory)[1]
        return
    sizes = cached_assets_path("hf_lop", source.name, source.commit)
    folder = sizes / source.key()
    with WeakFileLock(sizes / f"{source.key()}.lock"):  # a second process waits, and finds what the first made
        if source.hub.get("force_download") or not folder.exists():
            with whole_folder(folder, replace=True) as partial:
                _assemble(source, partial)
    yield folder, None


def _pruned_config(cls: Any, config: Any, folder: Path, plan: Plan) -> PreTrainedConfig:
    """Write the widths into a config that the caller gives: that of the dense model, maybe with settings of their own."""
    if not isinstance(config, PreTrainedConfig):
        config = AutoConfig.from_pretrained(config)
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    set_counts(model, find_units(model), plan.widths)
    vars(model.config).pop("elastic_config", None)
    model.config.pruning_config = json.loads((folder / "config.json").read_text())["pruning_config"]
    pruned: PreTrainedConfig = model.config
    return pruned


def _assemble(source: _Source, folder: Path, *, in_memory: bool = False) -> tuple[PreTrainedModel, Tensors | None]:
    """Write config and weights of a pruned model; return it without weights, and these where they stay in memory."""
    files: Files = Folder(source.folder, ahead=False)
    if source.commit is not None and not source.hub.get("local_files_only"):
        files = Repository(source.name, source.commit, token=source.hub.get("token"))
    with Shards(files) as main, open_transposed(files) as transposed:
        hub = {key: source.hub[key] for key in ("revision", "token") if key in source.hub}
        skeleton = load_skeleton(source.name, source.config, main, **hub)
        model, units = skeleton.model, find_units(skeleton.model)
        source.pruner.config.check_fits(model, measure_size(model, units), strict=False)
        entries = stored_pieces(skeleton, units)
        remote = source.commit is not None
        path, widths, solvers = folder / SAFE_WEIGHTS_NAME, source.plan.widths, _solvers(source)
        tensors: Tensors | None = None
        if in_memory:
            tensors = read_size(main, transposed, entries, widths, solvers)
        else:
            write_size(main, transposed, entries, widths, path, solvers=solvers, remote=remote)
    set_counts(model, units, source.plan.widths)
    for unit, width in zip(units, source.plan.widths, strict=True):
        take(model, unit, torch.arange(width))
    note_prefixes(model, units, source.plan.widths)
    record(source.pruner.config, model, source.plan, recovery=source.recovery)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    return model, tensors


def note_prefixes(model: PreTrainedModel, units: Sequence[Unit], widths: Sequence[int]) -> None:
    """Remember that a size has the first pieces of the elastic model."""
    note_kept(model, units, [torch.arange(width) for width in widths])


def _solvers(source: _Source) -> Solvers | None:
    kept = [torch.arange(width) for width in source.plan.widths]
    learned = source.pruner.learned()
    whole = row_solver(source.recovery, kept, learned.statistics, learned.directions)
    return Solvers(whole, prefix_solver(learned.statistics, learned.directions)) if whole is not None else None
