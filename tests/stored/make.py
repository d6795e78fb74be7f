"""Makes the samples that a version of hf_lop leaves behind: run it in a checkout of that version, `python make.py FOLDER`.

The folder 0.1.0 was made in a checkout of f58fae8. Every model folder has `expected.safetensors` beside it: the inputs and the
logits that a load must give.
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import torch
from hf_lop.compare import compare
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_lop.pruner import LOPPruner
from tests import conftest
from tests.conftest import text_batches
from tests.fake_pruner import fake_pruner

CASES = {"gated": "sketch", "fused": "sketch", "conv1d": None, "plain_bias": "fold", "gated-bias": "bias"}
BUDGETS = [
    {"ratio": 0.1},
    {"ratio": 0.5},
    {"ratio": 0.3, "round_to": 8},
    {"params": 25000},
    {"memory": 98000},
    {"flops": 45000},
]


ORIGINALS = copy.deepcopy(conftest.CONFIGS)


def build(kind):
    """A model with a config of its own: pruning writes into it."""
    conftest.CONFIGS[kind] = copy.deepcopy(ORIGINALS[kind])
    return conftest.build(kind)


def expected(model, folder, **more):
    batch = text_batches(1, seed=5)[0]
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    save_file({**batch, "logits": logits, **more}, folder.with_name(folder.name + ".safetensors"))


def main(out):
    out.mkdir(parents=True)
    for case, recover in CASES.items():
        model = build(case.partition("-")[0])
        fake_pruner(model).prune(model, 0.4, recover=recover)
        model.save_pretrained(out / case)
        shutil.rmtree(out / case / "assets")
        expected(model, out / case)

    base = build("gated")
    calibration, search = text_batches(2), text_batches(1, seed=1)
    options = {"search": "mcts", "targets": (0.2, 0.4), "evaluations": 3, "predictor": "mlp", "sketch_rows": 4}
    pruner = LOPPruner.fit(base, calibration, search, journal=out / "journal", **options)
    pruner.save_pretrained(out / "pruner")
    shutil.rmtree(out / "pruner" / "assets")
    plans = [{**budget, "widths": pruner.plan(**budget).widths} for budget in BUDGETS]
    (out / "plans.json").write_text(json.dumps({"plans": plans, "table": pruner.config.search_table}, indent=1) + "\n")
    journal = next((out / "journal").glob("evaluations*.jsonl"))
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:4]) + lines[4][:20])  # as a kill leaves it

    report = text_batches(1, seed=7)
    compare(
        [pruner], base, report, ratios=(0.3,), methods=("lop", "uniform"), rewards=("divergence",), folder=out / "rows"
    )

    elastic = build("gated")
    fake_pruner(elastic).make_elastic(elastic).save_pretrained(out / "elastic")
    shutil.rmtree(out / "elastic" / "assets")
    sizes = {}
    for ratio in (0.2, 0.6):
        model = AutoModelForCausalLM.from_pretrained(out / "elastic", lop_ratio=ratio).eval()
        with torch.no_grad():
            sizes[f"at {ratio}"] = model(**text_batches(1, seed=5)[0]).logits
    expected(elastic, out / "elastic", **sizes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
