"""The list of supported models, written from what the walk finds.

python -m tests.support_table examples/guides/supported-models.md
"""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tqdm.auto import tqdm

from tests.families import MULTIMODAL, TEXT
from tests.walk import Outcome, walk

BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"


def render(outcomes: Iterable[Outcome]) -> str:
    """Markdown with the three groups; refused and unbuildable types stand under their reasons."""
    found = list(outcomes)
    groups = {
        "prunes": "prunes and reloads bit-equal",
        "refused": "refused, with the reason",
        "unbuildable": "not built",
    }
    lines = [
        f"Every model type of transformers {transformers.__version__}, walked with tiny random models "
        "(`python -m tests.support_table examples/guides/supported-models.md`):",
        "",
        f"| | multimodal ({len(MULTIMODAL)}) | text ({len(TEXT)}) |",
        "|---|---|---|",
    ]
    for group, title in groups.items():
        names = [o.model_type for o in found if o.group == group]
        lines.append(f"| {title} | {len(set(names) & set(MULTIMODAL))} | {len(set(names) & set(TEXT))} |")
    for title, types in (("multimodal", MULTIMODAL), ("text", TEXT)):
        names = [o.model_type for o in found if o.group == "prunes" and o.model_type in types]
        lines += ["", f"<details><summary>Prunes and reloads: {len(names)} {title} types</summary>", ""]
        lines += [", ".join(names), "", "</details>"]
    for group, title in (("refused", "Refused"), ("unbuildable", "Not built here")):
        lines += ["", f"<details><summary>{title}, by reason</summary>", ""]
        reasons: dict[str, list[str]] = {}
        for o in found:
            if o.group == group:
                reasons.setdefault(short_reason(o), []).append(o.model_type)
        for reason, names in sorted(reasons.items(), key=lambda entry: -len(entry[1])):
            lines.append(f"- {reason} ({len(names)}): {', '.join(names)}")
        lines += ["", "</details>"]
    return "\n".join(lines)


def short_reason(outcome: Outcome) -> str:
    """The clause of an error message that many types share: no class names, no layer, no parameter names."""
    if outcome.group != "refused":
        return outcome.reason
    clause = re.split(r"[;,.] ", re.sub(r" ?\([^)]*\)", "", outcome.reason.split(": ", 1)[-1]))[0]
    return re.sub(r"decoder layer \d+", "a decoder layer", clause)


def section(text: str) -> str | None:
    """What stands between the markers of a page; None where there are none."""
    return text.split(BEGIN)[1].split(END)[0].strip() if BEGIN in text and END in text else None


def main() -> None:
    path = Path(sys.argv[1])
    text = path.read_text(encoding="utf-8")
    if section(text) is None:
        sys.exit(f"{path} has no section between {BEGIN} and {END}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes = [walk(name) for name in tqdm([*MULTIMODAL, *TEXT])]
    if failed := [o for o in outcomes if o.group == "fails"]:
        sys.exit("\n".join(f"{o.model_type}: {o.reason}" for o in failed))
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{render(outcomes)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
