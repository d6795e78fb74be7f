"""The main job on the embedded demo: prune, save, reload without hf_lop, compare with the dense model."""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_lop import demo
from hf_lop.errors import CheckpointMismatchError, InvalidInputError
from hf_lop.files import scratch_folder
from hf_lop.planning.plan import Plan

# What a user without hf_lop runs: the finder makes sure that this Python really cannot import the package.
_RELOAD = """
import sys

class NoHfLop:
    def find_spec(self, name, path=None, target=None):
        if name == "hf_lop" or name.startswith("hf_lop."):
            raise ImportError("hf_lop is hidden from this Python")

sys.meta_path.insert(0, NoHfLop())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

folder, inputs, outputs = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
with torch.inference_mode():
    save_file({"logits": model(**load_file(inputs)).logits.contiguous()}, outputs)
"""


@dataclass(frozen=True, slots=True)
class Report:
    """What the quickstart measured; dense first, pruned second.

    Attributes:
        plan (`Plan`): widths per layer.
        recovery (`str`, *optional*): how the kept neurons took over the removed ones' work.
        folder (`Path`): the pruned checkpoint.
        plot (`Path`): the plan as a picture.
        max_difference (`float`): largest logit difference between the pruned model and its reload without hf_lop.
        accuracy (`tuple`): share of right answers on held-out questions, by category.
        questions (`int`): how many were asked.
        file_bytes (`tuple[int, int]`): size of model.safetensors.
        tokens_per_second (`tuple[float, float]`): generated tokens, batch of 16, median of 5 runs in turn.
        plan_milliseconds (`float`): time to plan, warm, median of 9.
    """

    plan: Plan
    recovery: str | None
    folder: Path
    plot: Path
    max_difference: float
    accuracy: tuple[dict[str, float], dict[str, float]]
    questions: int
    file_bytes: tuple[int, int]
    tokens_per_second: tuple[float, float]
    plan_milliseconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        plain = {**asdict(self), "plan": self.plan.to_dict(), "folder": str(self.folder), "plot": str(self.plot)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    def __str__(self) -> str:
        (dense, pruned), (dense_bytes, pruned_bytes), (before, after) = (
            self.accuracy,
            self.file_bytes,
            self.tokens_per_second,
        )
        rows = [("", "dense", "pruned")]
        rows += [(f"accuracy, {name}", f"{dense[name]:.1%}", f"{pruned[name]:.1%}") for name in dense]
        rows += [
            ("parameters", f"{self.plan.dense.parameters:,}", f"{self.plan.parameters:,}"),
            ("model.safetensors", f"{dense_bytes / 1e6:.2f} MB", f"{pruned_bytes / 1e6:.2f} MB"),
            ("generated tokens/s", f"{before:,.0f}", f"{after:,.0f}"),
        ]
        table = "\n".join(f"  {name:<22}{first:>14}{second:>14}" for name, first, second in rows)
        return (
            f"{self.plan}\n\n{table}\n\n"
            f"  {self.questions} held-out questions; planned in {self.plan_milliseconds:.1f} ms; "
            f"recovery: {self.recovery or 'none'}\n"
            f"  reloaded without hf_lop (trust_remote_code=True): largest logit difference {self.max_difference}\n"
            f"  checkpoint: {self.folder}\n  plot: {self.plot}"
        )


def _tokens_per_second(models: tuple[PreTrainedModel, ...], inputs: dict[str, Any], new: int = 24) -> list[float]:
    """Time greedy generation of every model in turn, so that a slow moment of the machine hits all of them."""
    runs: list[list[float]] = [[] for _ in models]
    for _ in range(6):
        for model, times in zip(models, runs, strict=True):
            start = time.perf_counter()
            model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)  # type: ignore[operator]
            times.append(time.perf_counter() - start)
    return [len(inputs["input_ids"]) * new / statistics.median(times[1:]) for times in runs]


def run(ratio: float, out: Path, questions: int = 600) -> Report:
    """Prune the demo model, check its reload in a Python without hf_lop, and compare it with the dense model.

    Args:
        ratio (`float`): fraction of all FFN neurons to remove, in [0, 1).
        out (`Path`): folder for the checkpoint and the plot; made anew.
        questions (`int`): held-out questions to answer.

    Returns:
        `Report`: what was measured; printing it shows a table.

    Raises:
        InvalidInputError: if the ratio is out of range, or the folder holds something else.
        CheckpointMismatchError: if the reloaded model's logits differ from the pruned model's.
    """
    pruner = demo.load_pruner()
    plan = pruner.plan(ratio)
    if out.exists() and any(out.iterdir()) and not (out / "pruned" / "modeling_lop.py").exists():
        raise InvalidInputError(f"{out} holds other files. Choose a new folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    dense, processor = demo.load_model()
    pruned = pruner.prune(demo.MODEL_DIR, ratio)
    folder, plot = out / "pruned", out / "plan.png"
    pruned.save_pretrained(folder)
    plan.plot(plot)
    pruned.float()  # stored in bfloat16, computed with in float32 like the dense model

    report = demo.load_data("report", questions)
    inputs = next(demo.batches(processor, report, 16))
    with torch.inference_mode():
        logits = pruned(**inputs).logits
    difference = float((logits - _reload_without_hf_lop(folder, inputs)).abs().max())
    if difference:
        raise CheckpointMismatchError(f"The reloaded model's logits differ by up to {difference}. Please report this.")
    plan_times = []
    for _ in range(9):
        start = time.perf_counter()
        pruner.plan(ratio)
        plan_times.append(time.perf_counter() - start)
    accuracy = [demo.accuracy(demo.answer(m, processor, report, 64), report) for m in (dense, pruned)]
    speeds = _tokens_per_second((dense, pruned), inputs)
    files = [path / "model.safetensors" for path in (demo.MODEL_DIR, folder)]
    return Report(
        plan=plan,
        recovery=pruned.config.pruning_config["recovery"],
        folder=folder,
        plot=plot,
        max_difference=difference,
        accuracy=(accuracy[0], accuracy[1]),
        questions=len(report),
        file_bytes=(files[0].stat().st_size, files[1].stat().st_size),
        tokens_per_second=(speeds[0], speeds[1]),
        plan_milliseconds=statistics.median(plan_times) * 1e3,
    )


def _reload_without_hf_lop(folder: Path, inputs: dict[str, Any]) -> torch.Tensor:
    """Load the checkpoint in a second Python that cannot import hf_lop, and return its logits."""
    with scratch_folder() as scratch:
        given, answer = scratch / "inputs.safetensors", scratch / "logits.safetensors"
        save_file({name: value.contiguous() for name, value in inputs.items()}, given)
        environment = {**os.environ, "HF_MODULES_CACHE": str(scratch), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", _RELOAD, str(folder.resolve()), str(given), str(answer)]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if child.returncode:
            raise CheckpointMismatchError(f"The checkpoint did not load without hf_lop:\n{child.stderr}")
        return load_file(answer)["logits"]
