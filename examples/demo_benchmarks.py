"""Stand-ins for the paper's benchmarks, made of the demo's pictures: lmms-eval's own tasks and scores on local data.

    python examples/demo_benchmarks.py tasks --pictures 8
    hf-lop evaluate MODEL --tasks lop-paper,lop_demo --include-path tasks --batch-size 16

MODEL is the folder `hf_lop.demo.MODEL_DIR`, or the demo model cut to another size.

The demo model answers in one word, so MMBench (options to choose from) and MMMU (open questions) suit it, while yes and no,
which MME and POPE ask for, are not among its words: there it scores 0. `lop_demo` asks the questions it was trained for.
"""

import argparse
import importlib.util
import inspect
from io import BytesIO
from pathlib import Path
from typing import Any

from hf_lop.demo import _need_extra
from hf_lop.demo.scenes import COLOURS, SHAPES, Scene, draw_scene
from hf_lop.errors import InvalidInputError, MissingDependencyError

_INCLUDED = """\
include: {tasks}/{source}
task: {task}
dataset_path: parquet
dataset_name: null
dataset_kwargs: {{data_files: {{{split}: {data}}}}}
lmms_eval_specific_kwargs:
  default: {{{prompts}}}
"""
_DEMO = """\
task: lop_demo
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function demo_utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3}}
process_results: !function demo_utils.process_results
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
  - {{metric: perception, aggregation: !function demo_utils.mean_of_known, higher_is_better: true}}
  - {{metric: cognition, aggregation: !function demo_utils.mean_of_known, higher_is_better: true}}
"""


def write_benchmarks(folder: str | Path, pictures: int = 16, split: str = "report") -> Path:
    """Write data and task files of `mmbench_en_dev_static`, `mme`, `mmmu_val`, `pope` and `lop_demo`.

    Args:
        folder (`str` or `Path`): where to; pass it as `include_path`.
        pictures (`int`): how many, at least 1; each gives two questions of every benchmark, and four of `lop_demo`.
        split (`str`): name the pictures are drawn from; see [`load_data`][hf_lop.demo.load_data].

    Returns:
        `Path`: the folder.

    Raises:
        InvalidInputError: if there is to be no picture.
        MissingDependencyError: if an extra is not installed.
    """
    if pictures < 1:
        raise InvalidInputError(f"pictures is {pictures}, but a benchmark has at least one. Pass a positive number.")
    _need_extra()
    harness = importlib.util.find_spec("lmms_eval")
    if harness is None or harness.origin is None:
        raise MissingDependencyError('These tasks are lmms-eval\'s. Run: pip install "hf-lop[eval]"')
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [draw_scene(f"{split}/{index}") for index in range(pictures)]
    tasks = Path(harness.origin).parent / "tasks"
    no_prompt = 'pre_prompt: "", post_prompt: ""'
    open_prompt = 'prompt_type: format, multiple_choice_prompt: "", open_ended_prompt: ""'
    for task, source, part, prompts, rows in (
        ("mmbench_en_dev_static", "mmbench/mmbench_en_dev_static.yaml", "dev", no_prompt, _mmbench(scenes)),
        ("mme", "mme/mme.yaml", "test", no_prompt, _mme(scenes)),
        ("mmmu_val", "mmmu/mmmu_val.yaml", "validation", open_prompt, _mmmu(scenes)),
        ("pope", "pope/pope.yaml", "test", no_prompt, _pope(scenes)),
    ):
        data = _write(folder / f"{task}.parquet", rows)
        text = _INCLUDED.format(tasks=tasks, source=source, task=task, split=part, data=data, prompts=prompts)
        (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
    questions = [
        {"image": _png(scene), "question": q.text, "answer": q.answer, "category": q.category}
        for scene in scenes
        for q in scene.questions
    ]
    data = _write(folder / "lop_demo.parquet", questions)
    (folder / "lop_demo.yaml").write_text(_DEMO.format(data=data), encoding="utf-8")
    # lmms-eval imports this file wherever it runs, and may not find the one you read there.
    functions = "\n\n".join(inspect.getsource(code) for code in (doc_to_visual, process_results, mean_of_known))
    (folder / "demo_utils.py").write_text(f"from typing import Any\n\n\n{functions}", encoding="utf-8")
    return folder


def doc_to_visual(row: dict[str, Any]) -> list[Any]:
    """Return the picture of a question."""
    return [row["image"].convert("RGB")]


def process_results(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Score one answer by exact match, over all questions and in its category."""
    right = float(answers[0].strip() == row["answer"])
    other = "cognition" if row["category"] == "perception" else "perception"
    return {"accuracy": right, row["category"]: right, other: float("nan")}


def mean_of_known(scores: list[float]) -> float:
    """Return the mean of the scores that are numbers."""
    known = [score for score in scores if score == score]
    return sum(known) / len(known) if known else float("nan")


def _png(scene: Scene) -> dict[str, Any]:
    png = BytesIO()
    scene.image.save(png, format="png")
    return {"bytes": png.getvalue(), "path": None}


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    from datasets import Dataset, Features, Image, Value

    kinds = {int: Value("int64"), str: Value("string")}
    features = {
        key: Image() if "image" in key and key != "image_source" else kinds[type(v)] for key, v in rows[0].items()
    }
    Dataset.from_list(rows, features=Features(features)).to_parquet(str(path))
    return path


def _mmbench(scenes: list[Scene]) -> list[dict[str, Any]]:
    """Colour and shape with four options; each question twice, the second time with the options moved on by one."""
    rows = []
    for number, (scene, kind) in enumerate((scene, kind) for scene in scenes for kind in (0, 1)):
        question = scene.questions[kind]
        others = [word for word in (COLOURS, SHAPES)[kind] if word != question.answer]
        options = [*others[:3]]
        options.insert(number % 4, question.answer)
        for copy in (0, 1):
            moved = options[-copy:] + options[:-copy] if copy else options
            rows.append(
                {"index": number + copy * 1_000_000, "question": question.text, "hint": "nan"}
                | {"answer": "ABCD"[moved.index(question.answer)], **dict(zip("ABCD", moved, strict=True))}
                | {"category": question.kind, "image": _png(scene), "source": "demo", "L2-category": question.category}
                | {"comment": "", "split": "dev"}
            )
    return rows


def _mme(scenes: list[Scene]) -> list[dict[str, Any]]:
    """Two questions per picture, of which one is true; perception and cognition in turn."""
    categories = ("color", "commonsense_reasoning", "existence", "numerical_calculation")
    rows = []
    for number, scene in enumerate(scenes):
        thing = scene.things[0]
        other = next(colour for colour in COLOURS if colour != thing.colour)
        for colour, answer in ((thing.colour, "Yes"), (other, "No")):
            question = f"Is the {thing.shape} {colour}? Please answer yes or no."
            rows.append(
                {"question_id": f"demo/{number}", "image": _png(scene), "question": question, "answer": answer}
                | {"category": categories[number % len(categories)]}
            )
    return rows


def _mmmu(scenes: list[Scene]) -> list[dict[str, Any]]:
    """Colour as an open question, and owner with options."""
    rows: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        for kind, subject in ((0, "Art"), (2, "Math")):
            question = scene.questions[kind]
            options = [question.answer, *(name for name in ("anna", "boris", "clara") if name != question.answer)]
            shared = {"explanation": "", "image_1": _png(scene), **{f"image_{i}": None for i in range(2, 8)}}
            rows.append(
                {"id": f"validation_{subject}_{number + 1}", "question": f"<image 1> {question.text}"}
                | {"options": "[]" if kind == 0 else str(options), **shared, "img_type": "['Drawing']"}
                | {"answer": question.answer if kind == 0 else "A", "topic_difficulty": "Easy"}
                | {"question_type": "open" if kind == 0 else "multiple-choice", "subfield": question.kind}
            )
    return rows


def _pope(scenes: list[Scene]) -> list[dict[str, Any]]:
    """One shape that is there and one that is not."""
    rows: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        present = scene.things[0].shape
        absent = next(shape for shape in SHAPES if shape not in {thing.shape for thing in scene.things})
        for shape, answer in ((present, "yes"), (absent, "no")):
            rows.append(
                {"id": str(len(rows)), "question_id": str(len(rows)), "question": f"Is there a {shape} in the image?"}
                | {"answer": answer, "image_source": f"demo_{number}", "image": _png(scene)}
                | {"category": ("adversarial", "popular", "random")[number % 3]}
            )
    return rows


def main() -> None:
    """Write the tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to; pass it to evaluate as --include-path")
    parser.add_argument("--pictures", type=int, default=16)
    arguments = parser.parse_args()
    print(write_benchmarks(arguments.folder, arguments.pictures))


if __name__ == "__main__":
    main()
