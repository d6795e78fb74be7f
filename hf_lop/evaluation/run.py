"""`hf_lop.evaluate`: a model in memory or by id, on tasks of lmms-eval and lm-eval."""

import difflib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel

from hf_lop.errors import EvaluationError, InvalidInputError
from hf_lop.evaluation.fingerprint import weight_fingerprint
from hf_lop.evaluation.harnesses import HARNESSES, knows, need_extra, run_task, task_manager, wrap
from hf_lop.evaluation.loading import load_evaluated
from hf_lop.evaluation.paper import NAME, TASKS
from hf_lop.evaluation.results import Results, TaskResult
from hf_lop.hub.read.load import read_config
from hf_lop.hub.read.names import hub_id
from hf_lop.version import __version__


def evaluate(
    model: str | Path | PreTrainedModel,
    tasks: str | Sequence[str],
    *,
    processor: Any = None,
    pruner: str | Path | None = None,
    ratio: float | None = None,
    harness: str | None = None,
    include_path: str | Path | Sequence[str | Path] = (),
    limit: int | None = None,
    batch_size: int = 1,
    cache: str | Path | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Results:
    """Run benchmarks on a dense or pruned model.

    Every task is run on its own, so one that fails costs no other its result. Under torchrun or `accelerate launch` each
    process answers its share of the questions of lmms-eval tasks, and all return the same results; there, the first failure
    ends the run.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): Hub id or folder, or a model in memory.
        tasks (`str` or `Sequence[str]`): names of tasks or groups, or one string with commas; `lop-paper` stands for the
            paper's four benchmarks.
        processor: processor or tokenizer of a model in memory; by default that of the repository it came from.
        pruner (`str` or `Path`, *optional*): pruner to cut the model with before it is evaluated; needs `ratio`.
        ratio (`float`, *optional*): fraction of FFN neurons it removes.
        harness (`str`, *optional*): "lmms-eval" or "lm-eval". By default the tasks of a model that reads images are looked up
            in lmms-eval first, then in lm-eval; those of a language model in lm-eval.
        include_path (`str`, `Path` or a sequence): folders with task files of your own.
        limit (`int`, *optional*): questions per task, from the first on. For tests: a part is no benchmark result.
        batch_size (`int`): questions at a time.
        cache (`str` or `Path`, *optional*): folder in which answers are kept, by the weights that gave them; the same call
            with it resumes.
        revision (`str`, *optional*): branch, tag or commit of `model`.
        dtype (`str`): of the weights; "auto" for that of the checkpoint.
        device (`str`, *optional*): where to load to, by default the GPU if there is one.
        trust_remote_code (`bool`): run the model code of the repository.

    Returns:
        `Results`: numbers, answers, and what made them.

    Raises:
        MissingDependencyError: if the extra `eval` is not installed.
        InvalidInputError: if an argument is out of its range, or no harness knows a task; nothing was loaded then.
        EvaluationError: if a task failed or its dataset is missing; its `results` hold those of all other tasks.
    """
    need_extra()
    names = read_names(tasks)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InvalidInputError(f"limit is {limit!r}; pass a positive number of questions, or None for all.")
    if batch_size < 1:
        raise InvalidInputError(f"batch_size is {batch_size}; pass a positive number.")
    folders = read_folders(include_path)
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = read_config(model, **hub) if isinstance(model, str | Path) else model.config
    plan = assign_tasks(names, harness, type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, folders)

    accelerator = Accelerator()
    loaded, processor = load_evaluated(
        model,
        processor,
        pruner=pruner,
        ratio=ratio,
        dtype=dtype,
        device_map=device or str(accelerator.device),
        **hub,
    )
    weights = weight_fingerprint(loaded)
    wrapped: dict[str, Any] = {}
    found: list[TaskResult] = []
    failed: list[EvaluationError] = []
    for name, (used, manager) in plan.items():
        try:
            if used not in wrapped:
                wrapped[used] = wrap(used, loaded, processor, batch_size)
            found += run_task(used, wrapped[used], name, manager, limit=limit, cache=_cache(cache, used, weights))
        except EvaluationError as error:
            failed.append(error)
            if accelerator.num_processes > 1:  # the other processes wait for this one
                raise
    results = Results(
        model=_public_name(model),
        weights=weights,
        parameters=loaded.num_parameters(),
        pruning=getattr(loaded.config, "pruning_config", None),
        tasks=tuple(found),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hf_lop_version=__version__,
    )
    if failed:
        summary = EvaluationError(" ".join(str(one) for one in failed))
        summary.results = results if found else None
        raise summary from failed[0]
    return results


def read_names(tasks: str | Sequence[str]) -> list[str]:
    """Return the names of tasks, `lop-paper` spelled out.

    Raises:
        InvalidInputError: if there is none.
    """
    given = [part.strip() for part in (tasks.split(",") if isinstance(tasks, str) else tasks)]
    names = [name for part in given for name in (TASKS if part == NAME else (part,))]
    if not names or not all(names):
        raise InvalidInputError(f"tasks is {tasks!r}; name at least one task, such as {NAME!r} or 'pope'.")
    return list(dict.fromkeys(names))


def read_folders(include_path: str | Path | Sequence[str | Path]) -> list[str]:
    """Return folders with task files.

    Raises:
        InvalidInputError: if one does not exist.
    """
    folders = [str(f) for f in ([include_path] if isinstance(include_path, str | Path) else include_path)]
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise InvalidInputError(f"{missing[0]} is no folder. include_path takes folders with task files (.yaml).")
    return folders


def assign_tasks(
    names: Sequence[str], harness: str | None, reads_images: bool, folders: Sequence[str]
) -> dict[str, tuple[str, Any]]:
    """Return the harness, and its index of tasks, of every name.

    Raises:
        InvalidInputError: if there is no such harness, or none knows a name.
    """
    if harness is not None and harness not in HARNESSES:
        raise InvalidInputError(f"harness is {harness!r}; choose one of {', '.join(HARNESSES)}.")
    asked = (harness,) if harness else HARNESSES if reads_images else ("lm-eval",)
    found: dict[str, tuple[str, Any]] = {}
    known: set[str] = set()
    for each in asked:
        left = [name for name in names if name not in found]
        if not left:
            break
        manager = task_manager(each, left, folders)
        known |= set(manager.task_index)
        found.update({name: (each, manager) for name in left if knows(each, manager, name, folders)})
    if unknown := [name for name in names if name not in found]:
        near = difflib.get_close_matches(unknown[0], known, 3)
        raise InvalidInputError(
            f"No task {unknown[0]!r} in {' or '.join(asked)}. "
            + (f"Did you mean {', '.join(near)}? " if near else "")
            + "Pass include_path=... for task files of your own."
        )
    return {name: found[name] for name in names}


def _cache(folder: str | Path | None, harness: str, weights: str) -> str | None:
    if folder is None:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return str(Path(folder, "lmms-eval" if harness == "lmms-eval" else f"lm-eval-{weights}"))


def _public_name(model: str | Path | PreTrainedModel) -> str:
    """Return a Hub id, or the last part of a path: the rest is nobody else's business."""
    name = str(model) if isinstance(model, str | Path) else str(model.name_or_path)
    return hub_id(name) or Path(name).resolve().name
