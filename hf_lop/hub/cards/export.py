"""What there is to say about each export format, and the card of an exported model."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_lop.hub.cards.facts import INHERITED, PIPELINES, linked, render

ALL = "It saves all that pruning saved."


@dataclass(frozen=True, slots=True)
class Format:
    """Facts about one export format.

    Attributes:
        what (`str`): what it is, in half a sentence.
        language (`str`): of `code`.
        code (`str`): how to load it; NAME, FILE, AUTO and REVISION stand for the Hub id or folder, the file in a shell, the
            Auto class, and a `revision=` argument.
        tested (`str`): which runtime has loaded it, and which has not.
        saves (`str`): what it keeps of the saving.
    """

    what: str
    language: str
    code: str
    tested: str
    saves: str = ALL


FORMATS = {
    "per_layer_config": Format(
        what="the config lists the layers that differ in transformers' sparse `per_layer_config`; the weights are the same",
        language="python",
        code="import hf_lop  # or pass trust_remote_code=True instead\n"
        "from transformers import AUTO\n\nmodel = AUTO.from_pretrained(NAMEREVISION)",
        tested="Tested: transformers reads and writes the config, hf_lop and `trust_remote_code=True` load the model. Not run: "
        "transformers alone, whose model classes do not read this schema yet (pull request 45332), except a few.",
    ),
    "uniform": Format(
        what="every layer is zero-padded to the widest one, so this is an ordinary model for any runtime",
        language="python",
        code="from transformers import AUTO\n\nmodel = AUTO.from_pretrained(NAMEREVISION)",
        tested="Tested: plain transformers, without hf_lop and without remote code; and vLLM by its own code.",
        saves="Padding does not save: every layer costs as much memory and time as the widest one.",
    ),
    "gguf": Format(
        what="one GGUF file of architecture `deci`, which has one FFN width per layer",
        language="text",
        code="llama-server --model FILE",
        tested="Tested: stock llama.cpp, through xllamacpp. Its K-quants need widths that are multiples of 256, its "
        "other quantisations of 32: prune with `--round-to 256` for them.",
    ),
}


def export_card(
    to: str,
    *,
    name: str,
    source: str | None,
    made: Mapping[str, Any],
    auto_class: str,
    file: str | None,
    parameters: Mapping[str, int],
    neurons: Mapping[str, int],
    base_data: Mapping[str, Any],
    revision: str | None,
) -> ModelCard:
    """Render the card of an exported model.

    Args:
        to (`str`): one of `FORMATS`.
        name (`str`): what a loader takes: the Hub id, or a folder as seen from its parent.
        source (`str`, *optional*): Hub id of the pruned model.
        made (`Mapping`): its `pruning_config`.
        auto_class (`str`): the Auto class that loads it.
        file (`str`, *optional*): name of the GGUF file.
        parameters (`Mapping[str, int]`): of the model when "dense", when "pruned", and as "exported".
        neurons (`Mapping[str, int]`): FFN neurons, by the same keys.
        base_data (`Mapping`): metadata of the pruned model's card; license and language are taken from it.
        revision (`str`, *optional*): branch it is pushed to.

    Returns:
        `ModelCard`: valid metadata and Markdown.
    """
    facts = FORMATS[to]
    base = linked(made.get("base_model"), made.get("base_revision"))
    branch = f", revision={json.dumps(revision)}" if revision not in (None, "main") else ""
    values = {"NAME": json.dumps(name), "AUTO": auto_class, "REVISION": branch}
    values["FILE"] = shlex.quote(file or "")
    code = re.sub("|".join(values), lambda found: values[found[0]], facts.code)  # at once: names may hold placeholders
    data = ModelCardData(
        base_model=source or made.get("base_model"),
        library_name="gguf" if to == "gguf" else "transformers",
        pipeline_tag=PIPELINES.get(auto_class),
        tags=["lop", "pruned", to],
        **{key: base_data.get(key) for key in INHERITED},  # type: ignore[arg-type]
    )
    rows = [
        (
            {"dense": "before pruning", "pruned": "pruned", "exported": "this export"}[key],
            f"{neurons[key]:,}",
            f"{parameters[key]:,}",
            f"{parameters[key] / parameters['dense'] - 1:+.1%}" if key != "dense" else "",
        )
        for key in ("dense", "pruned", "exported")
    ]
    return render(
        "export.md.jinja",
        data,
        name,
        source=f"[{source}](https://huggingface.co/{source})" if source else base or "A model on no Hub repository",
        format=to,
        what=facts.what,
        language=facts.language,
        code=code,
        tested=facts.tested,
        saves=facts.saves,
        rows=rows,
    )
