"""What a GPU says: speed of aligned and odd widths, of prefill and decode, of a fit and of every recovery, and their memory.

    python examples/benchmarks/gpu.py --out examples/benchmarks/results/gpu      # one GPU, about eight minutes
    python examples/benchmarks/gpu.py --tiny                                     # a minute on a CPU, to see that it runs

The text decoder has the shape of Qwen2.5-VL-7B and random weights in bfloat16, whose neurons are scaled by exp(0.7 N(0, 1)), so that
they differ in importance; quality is no matter here. Times are medians of repeats within one run on one card: compare ratios. Each
part is printed when it is done, and one that fails does not stop the others.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache

from hf_lop import LOPPruner
from hf_lop.planning.budget import project

SEVEN_B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
RATIOS = (0.2, 0.3, 0.5, 0.7)
CACHE = 1024  # tokens that the static cache holds
Rows = list[list[str]]


class Bench:
    """One card, one shape."""

    def __init__(self, *, tiny: bool) -> None:
        self.tiny, self.shape = tiny, TINY if tiny else SEVEN_B
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.layers, self.neurons = self.shape["num_hidden_layers"], self.shape["intermediate_size"]
        self.batch, self.tokens = (2, 64) if tiny else (8, 512)

    # -- Measuring -----------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Wait for the card."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def median(self, run: Callable[[], Any], repeats: int = 5) -> float:
        """Return the median seconds of a run, after one that warms up."""
        run()
        spent = []
        for _ in range(repeats):
            self.sync()
            start = time.perf_counter()
            run()
            self.sync()
            spent.append(time.perf_counter() - start)
        return statistics.median(spent)

    def graphed(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Record a run as a CUDA graph, so that the host is not what is measured; on a CPU return it as it is."""
        if self.device.type != "cuda":
            return run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay  # type: ignore[no-any-return]

    def fresh(self) -> None:
        """Give memory back, and count its peak anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> str:
        """Return the peak memory since it was counted anew."""
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if self.device.type == "cuda" else "-"

    # -- Models --------------------------------------------------------------------------------------------------------

    def model(self) -> Any:
        """Build the dense model."""
        config = Qwen2Config(**self.shape, max_position_embeddings=32768, tie_word_embeddings=False)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.random.fork_rng(), torch.device(self.device):
                torch.manual_seed(0)
                model = Qwen2ForCausalLM(config).eval()
                with torch.no_grad():
                    for layer in model.model.layers:
                        scale = torch.exp(0.7 * torch.randn(self.neurons, 1, dtype=torch.float32))
                        layer.mlp.up_proj.weight.mul_(3 * scale.to(torch.bfloat16))
        finally:
            torch.set_default_dtype(before)
        return model

    def batches(self, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
        """Draw batches of random tokens."""
        generator = torch.Generator().manual_seed(seed)
        shape, top = (self.batch, self.tokens), self.shape["vocab_size"]
        drawn = [torch.randint(10, top, shape, generator=generator) for _ in range(count)]
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in drawn]

    def widths(self, ratio: float, block: int) -> list[int]:
        """Plan widths that differ from layer to layer, in blocks."""
        generator = torch.Generator().manual_seed(0)
        ratios = (ratio + 0.6 * torch.rand(self.layers, generator=generator) - 0.3).clamp(0.02, 0.95)
        kept = round(self.layers * self.neurons * (1 - ratio))
        found: list[int] = project(ratios.numpy(), [self.neurons] * self.layers, kept, round_to=block).tolist()
        return found

    def pruner(self) -> LOPPruner:
        """A pruner whose calibration takes no time: of one small batch."""
        data = self.batches(1, 1)
        return LOPPruner.fit(
            self.model(), data, self.batches(1, 2), predictor="mlp", sketch_rows=0, targets=(0.1, 0.8)
        )

    # -- Parts ---------------------------------------------------------------------------------------------------------

    def ffn(self) -> tuple[list[str], Rows]:
        """All FFNs alone, in a graph, at odd widths and in blocks, for one token, 32, and 4,096. In brackets: times as fast as dense."""
        lengths, rows = (1, 32, 256 if self.tiny else 4096), []
        dense: dict[int, float] = {}
        for ratio, block in [(0.0, 1), *((r, b) for r in RATIOS for b in (1, 8, 64))]:
            row = ["dense" if not ratio else f"{ratio:.0%}, {block}"]
            for length in lengths:
                spent = self._ffn(self.widths(ratio, block) if ratio else [self.neurons] * self.layers, length)
                dense.setdefault(length, spent)
                row.append(f"{1e3 * spent:.2f} ms ({dense[length] / spent:.2f})")
            rows.append(row)
        return ["neurons removed, round_to", *(f"{n:,} tokens" for n in lengths)], rows

    @torch.inference_mode()
    def _ffn(self, widths: Sequence[int], length: int) -> float:
        hidden = self.shape["hidden_size"]

        def matrix(*shape: int) -> torch.Tensor:
            return 0.02 * torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

        x = matrix(length, hidden)
        layers = [(matrix(width, hidden), matrix(width, hidden), matrix(hidden, width)) for width in widths]

        def run() -> torch.Tensor:
            h = x
            for gate, up, down in layers:
                h = nn.functional.linear(nn.functional.silu(h @ gate.T) * (h @ up.T), down)
            return h

        return self.median(self.graphed(run), 7)

    def whole(self) -> tuple[list[str], Rows]:
        """The whole model: one decode step in a graph, and prefill, dense and pruned. In brackets: times as fast as dense."""
        rows, dense = [], list[float]()
        model, pruner = self.model(), self.pruner()
        elastic = pruner.elastic(model)
        for ratio, block in [(0.0, 1), (0.3, 1), (0.3, 64), (0.5, 1), (0.5, 64), (0.7, 64)]:
            self.fresh()
            if ratio:
                elastic.set_plan(pruner.plan(ratio, round_to=block))
                cut = elastic.materialize()
            spent = self._steps(model if not ratio else cut)
            dense = dense or spent
            row = ["dense" if not ratio else f"{ratio:.0%}, {block}"]
            rows.append(row + [f"{1e3 * s:.2f} ms ({d / s:.2f})" for s, d in zip(spent, dense, strict=True)])
        length = 256 if self.tiny else 2048
        return [
            "neurons removed, round_to",
            "decode, batch 1",
            "batch 16",
            f"prefill, 1 x {length}",
            f"16 x {length}",
        ], rows

    @torch.inference_mode()
    def _steps(self, model: Any) -> list[float]:
        found, length, context = [], 256 if self.tiny else 2048, 512
        for batch in (1, 16):
            cache = StaticCache(config=model.config, max_cache_len=CACHE)
            ids = torch.randint(0, self.shape["vocab_size"], (batch, context), device=self.device)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            mask = torch.zeros(batch, 1, 1, CACHE, device=self.device, dtype=torch.bool)
            mask[..., : context + 1] = True
            given = {
                "input_ids": ids[:, :1].clone(),
                "attention_mask": mask,
                "position_ids": torch.full((batch, 1), context, device=self.device),
                "past_key_values": cache,
                "use_cache": True,
                "logits_to_keep": 1,
            }

            def step(given: dict[str, Any] = given) -> torch.Tensor:
                return model(**given).logits  # type: ignore[no-any-return]

            found.append(self.median(self.graphed(step), 7))
        for batch in (1, 16):
            ids = torch.randint(0, self.shape["vocab_size"], (batch, length), device=self.device)
            found.append(self.median(lambda ids=ids: model(input_ids=ids, use_cache=False, logits_to_keep=1), 3))
        return found

    def fit(self) -> tuple[list[str], Rows]:
        """A fit from probes: seconds by phase, against a forward pass of the dense model, and peak memory."""
        model, search = self.model(), self.batches(2, 2)
        inputs = {key: value.to(self.device) for key, value in search[0].items()}
        with torch.inference_mode():
            forward = self.median(lambda: model(**inputs, use_cache=False, logits_to_keep=1), 3)
        self.fresh()
        start = time.perf_counter()
        made = LOPPruner.fit(model, self.batches(12, 1), search)
        total, spent = time.perf_counter() - start, (made.config.calibration or {})["seconds"]
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        rows = [[phase, f"{seconds:.1f} s"] for phase, seconds in spent.items()]
        probes = 2 * self.layers * len((made.config.probes or {})["ratios"]) * len(search)
        rows += [
            ["in all", f"{total:.1f} s"],
            ["one probe", f"{spent['probes'] / probes / forward:.2f} dense forward passes of {1e3 * forward:.0f} ms"],
            ["peak memory", f"{self.peak()} for weights of {weights / 2**30:.1f} GiB"],
            ["plan(0.3)", f"{1e3 * self.median(lambda: made.plan(0.3)):.1f} ms"],
        ]
        return ["fit", ""], rows

    def recoveries(self) -> tuple[list[str], Rows]:
        """Cutting half of the neurons in memory, by every recovery."""
        pruner, rows = LOPPruner.fit(self.model(), self.batches(12, 1), self.batches(1, 2), predictor="mlp"), []
        for recover in (None, "fold", "sketch", "lstsq", "sequential"):
            if recover == "sketch" and not pruner.config.sketch_rows:
                continue
            data = self.batches(12, 1) if recover in ("lstsq", "sequential") else None
            model = self.model()
            self.fresh()
            start = time.perf_counter()
            pruner.prune(model, 0.5, recover=recover, data=data)
            self.sync()
            rows.append([str(recover).lower(), f"{time.perf_counter() - start:.2f} s", self.peak()])
        return ["recovery", "seconds", "peak memory"], rows


def main() -> None:
    """Measure every part, print its table, and write all of them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that it runs")
    parser.add_argument("--parts", nargs="+", default=["ffn", "whole", "fit", "recoveries"])
    parser.add_argument("--out", type=Path, help="results without suffix, printed only by default")
    arguments = parser.parse_args()
    bench = Bench(tiny=arguments.tiny)
    card = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    shape = "a tiny shape" if arguments.tiny else "the shape of Qwen2.5-VL-7B's text decoder"
    head = f"{card}, {shape}, bfloat16; torch {torch.__version__}, transformers {transformers.__version__}"
    found: dict[str, Any] = {"machine": head}
    lines = ["# What a GPU says", "", f"`python examples/benchmarks/gpu.py{' --tiny' * arguments.tiny}`: {head}.", ""]
    for part in arguments.parts:
        bench.fresh()
        try:
            heads, rows = getattr(bench, part)()
        except Exception:  # what one part cannot do must not hide the others
            traceback.print_exc(limit=-6)
            lines += [f"{part}: failed", ""]
            continue
        found[part] = [heads, *rows]
        doc = " ".join((getattr(bench, part).__doc__ or "").split())
        table = [
            f"{doc}",
            "",
            *(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]),
        ]
        print("\n".join(table), flush=True)
        lines += [*table, ""]
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".md").write_text("\n".join(lines))
        arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(part not in found for part in arguments.parts))


if __name__ == "__main__":
    main()
