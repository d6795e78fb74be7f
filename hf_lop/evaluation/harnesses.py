"""lmms-eval and lm-eval: which tasks they know, and one run of one task. Both are imported here, when they are needed."""

import argparse
import contextlib
import importlib.util
import random
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_lop.errors import EvaluationError, LOPError, MissingDependencyError
from hf_lop.evaluation.results import TaskResult, read_raw
from hf_lop.files import scratch_folder

HARNESSES = ("lmms-eval", "lm-eval")


def need_extra() -> None:
    """Check that both harnesses are there.

    Raises:
        MissingDependencyError: if one is not installed.
    """
    missing = [name for name in ("lmms_eval", "lm_eval") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f'Evaluation needs {" and ".join(missing)}, which this Python does not have. Run: pip install "hf-lop[eval]"'
        )


def task_manager(harness: str, names: Sequence[str], folders: Sequence[str]) -> Any:
    """Return a harness's index of tasks.

    Tasks in the user's folders come before built-in ones of the same name, and where they are all that is asked for the
    built-in ones (thousands of files, which take seconds) are not read.

    Args:
        harness (`str`): one of `HARNESSES`.
        names (`Sequence[str]`): tasks that will be run.
        folders (`Sequence[str]`): folders with task files of the user.
    """
    with _quietly():
        if folders:
            own = _manager(harness, folders, builtin=False)
            if all(name in own.task_index for name in names):
                return own
        return _manager(harness, folders, builtin=True)


def _manager(harness: str, folders: Sequence[str], *, builtin: bool) -> Any:
    if harness == "lm-eval":
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=list(folders) or None, include_defaults=builtin)
    from lmms_eval.tasks import TaskManager as MultimodalTaskManager

    made = MultimodalTaskManager("ERROR", list(folders) or None, include_defaults=builtin, model_name="hf_lop")
    if builtin and folders:  # there the built-in tasks win; here the user's do, as in lm-eval
        own = MultimodalTaskManager("ERROR", list(folders), include_defaults=False)
        made._task_index.update(own.task_index)
    return made


def knows(harness: str, manager: Any, name: str, folders: Sequence[str]) -> bool:
    """Whether a harness can run a task; a file in the user's folders is lmms-eval's if it says where the pictures are."""
    entry = manager.task_index.get(name)
    if harness == "lm-eval" or entry is None or entry["type"] != "task":
        return entry is not None
    path = Path(entry["yaml_path"]).resolve()
    if not any(path.is_relative_to(Path(folder).resolve()) for folder in folders):
        return True
    with _quietly():
        config = manager._get_config(name)
    return bool(config.get("doc_to_visual") or config.get("doc_to_messages"))


def wrap(harness: str, model: PreTrainedModel, processor: Any, batch_size: int) -> Any:
    """Return a loaded model as one of a harness.

    Raises:
        UnsupportedModelError: if lmms-eval is to run a model that takes no images.
    """
    if harness == "lm-eval":
        from lm_eval.models.huggingface import HFLM

        tokenizer = getattr(processor, "tokenizer", processor)
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    from hf_lop.evaluation.lmms_model import LOPModel

    return LOPModel(model, processor=processor, batch_size=batch_size, device=str(model.device))


def run_task(
    harness: str, wrapped: Any, task: str, manager: Any, *, limit: int | None = None, cache: str | None = None
) -> list[TaskResult]:
    """Run one task, or one group of tasks.

    Args:
        harness (`str`): one of `HARNESSES`.
        wrapped: what `wrap` returned.
        task (`str`): a name that the manager knows.
        manager: what `task_manager` returned.
        limit (`int`, *optional*): questions per task, from the first on.
        cache (`str`, *optional*): lmms-eval: folder of its response cache; lm-eval: prefix of its cache files.

    Returns:
        `list[TaskResult]`: of the task, or of the group and its members; the same in every process.

    Raises:
        EvaluationError: if the task fails, with the cause.
    """
    try:
        with _quietly(), _own_seeds(), scratch_folder() as scratch:
            if harness == "lm-eval":
                from lm_eval import simple_evaluate

                raw = simple_evaluate(
                    wrapped, tasks=[task], task_manager=manager, limit=limit, use_cache=cache, bootstrap_iters=0
                )
            else:
                from lmms_eval.evaluator import simple_evaluate as evaluate_multimodal

                # Tasks write files for submissions into output_path; without it, into the current directory.
                arguments = argparse.Namespace(output_path=str(scratch), process_with_media=False, reasoning_tags=None)
                raw = evaluate_multimodal(
                    wrapped,
                    tasks=[task],
                    task_manager=manager,
                    limit=limit,
                    use_cache=cache,
                    bootstrap_iters=0,
                    cli_args=arguments,
                )
    except (LOPError, KeyboardInterrupt):
        raise
    except BaseException as error:  # harnesses also call sys.exit
        cause = _cause(error)
        told = f"{type(cause).__name__}: {cause}".strip().rstrip(":")
        raise EvaluationError(f"The task {task} failed in {harness}. {told}") from cause
    return _shared(None if raw is None else read_raw(raw, harness, version(harness)))


def _cause(error: BaseException) -> BaseException:
    """Return what went wrong: lmms-eval reports a dataset that it cannot load as "tried several times"."""
    attempt = getattr(error, "last_attempt", None)
    return error if attempt is None else attempt.exception() or error


def _shared(found: list[TaskResult] | None) -> list[TaskResult]:
    """Give all processes what only the first has."""
    box = [found]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0] or []


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep stdout for results, and lmms-eval's log of every step off the terminal."""
    from loguru import logger

    logger.disable("lmms_eval")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.enable("lmms_eval")


@contextlib.contextmanager
def _own_seeds() -> Iterator[None]:
    """Give the caller's random states back: the harnesses seed them all."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
