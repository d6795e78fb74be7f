"""Cutting from file to file at the shape of Qwen2.5-VL-7B, against copying the input with `cp`, in one run.

    python examples/benchmarks/streaming.py --work work                  # needs 55 GB of disk; --layers 28: 35 GB

The checkpoint has the real shapes, vision tower included, random bfloat16 weights, and shards of 5 GB. Before every timed
step all files are on disk and out of the page cache; every step ends when what it wrote is on disk. `cp` copies shard by
shard, and each copy is removed, untimed, before the next, so that less disk is needed. Peak memory is that of the process,
from its resource usage.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
LAYERS, WIDTH = 28, 18944  # Qwen2.5-VL-7B
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": WIDTH,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}


def make(work: Path, layers: int) -> None:
    """Write the checkpoint and a pruner for it: random order, statistics and sketch; plans are those of a table."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    from hf_lop.hub.write.tensors import SavedTensor, layout
    from hf_lop.learning.config import LOPConfig
    from hf_lop.pruner.pruner import LOPPruner
    from hf_lop.units.kinds import find_units
    from hf_lop.units.measure import measure_size

    config = AutoConfig.for_model(
        "qwen2_5_vl", text_config={**TEXT, "num_hidden_layers": layers}, vision_config=VISION, dtype="bfloat16"
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    state = revert_weight_conversion(model, model.state_dict())
    base = work / "base"
    base.mkdir(parents=True)
    model.save_pretrained(base, state_dict={})
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2**26, generator=generator).mul_(0.02).bfloat16().view(torch.uint8).numpy()
    split = split_torch_state_dict_into_shards(
        state, max_shard_size="5GB", filename_pattern="model{suffix}.safetensors"
    )
    for file, names in split.filename_to_tensors.items():
        tensors = [SavedTensor(name, tuple(state[name].shape), torch.bfloat16, name) for name in names]
        header, ordered = layout(tensors, {"format": "pt"})
        with (base / file).open("wb") as stream:
            stream.write(header)
            for tensor in ordered:
                left = tensor.num_bytes
                while left:
                    start = 2 * int(torch.randint(2**25, (), generator=generator))
                    left -= stream.write(memoryview(pool)[start : start + min(left, 2**26)])
            os.fsync(stream.fileno())
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    size = measure_size(model, find_units(model))
    ratios = [0.3 * (0.6 + 0.8 * layer / (layers - 1)) for layer in range(layers)]
    table = [{"ratio": 0.0, "ratios": [0.0] * layers}, {"ratio": 0.3, "ratios": ratios}]
    pruner = LOPPruner(
        LOPConfig(
            base_model_type="qwen2_5_vl",
            base_dtype="bfloat16",
            base_size={key: getattr(size, key) for key in type(size).__slots__},
            calibration={"search": "additive"},  # whose plans the table stands for
            search_table=table,
            max_ratio=0.3,
            sketch_rows=128,
        )
    )
    order = [torch.randperm(width, generator=generator) for width in size.widths]
    pruner.neuron_order.copy_(torch.cat(order).to(torch.uint16))
    for name in ("mean", "square", "fluctuation", "norm"):
        getattr(pruner, name).copy_(torch.rand(sum(size.widths), generator=generator) + 0.1)
    pruner.sketch.copy_(torch.randint(0, 256, pruner.sketch.shape, generator=generator, dtype=torch.uint8))
    pruner.sketch_scale.copy_(torch.rand(sum(size.widths), generator=generator) * 0.05)
    pruner.save_pretrained(work / "pruner")


def forget(folder: Path) -> None:
    """Bring everything to disk, and the files of a folder out of the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command: list[str]) -> tuple[float, int]:
    """Run a command; return its seconds until all is on disk, and the most bytes it had in memory."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def copy(base: Path, work: Path) -> float:
    """Return the seconds that `cp` of all shards takes."""
    forget(base)
    seconds = 0.0
    for shard in sorted(base.glob("*.safetensors")):
        seconds += run(["cp", str(shard), str(work / "copy")])[0]
        (work / "copy").unlink()
        os.sync()
    return seconds


def measure(work: Path, layers: int, repeats: int) -> dict[str, object]:
    """Measure one size: `cp` and each recovery in turn."""
    shutil.rmtree(work, ignore_errors=True)
    run([sys.executable, __file__, "--work", str(work), "--make", str(layers)])
    base, out = work / "base", work / "pruned"
    rows: dict[str, list[tuple[float, int]]] = {"none": [], "sketch": []}
    copies = []
    for _ in range(repeats):
        for recover, found in rows.items():
            copies.append(copy(base, work))
            forget(base)
            command = [sys.executable, "-m", "hf_lop", "prune", str(base), "--pruner", str(work / "pruner")]
            options = ["--ratio", "0.3", "--method", "additive", "--out", str(out), "--stream", "--recover", recover]
            found.append(run(command + options))
            written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            shutil.rmtree(out)
    cp = statistics.median(copies)
    size = sum(path.stat().st_size for path in base.iterdir())
    shutil.rmtree(work)
    return {
        "layers": layers,
        "input_bytes": size,
        "output_bytes": written,
        "cp_seconds": copies,
        **{
            recover: {
                "seconds": [seconds for seconds, _ in found],
                "times_cp": statistics.median(seconds for seconds, _ in found) / cp,
                "peak_bytes": max(peak for _, peak in found),
            }
            for recover, found in rows.items()
        },
    }


def table(report: dict[str, object]) -> str:
    """Write the results as Markdown."""
    lines = [
        "| decoder layers | input | output | `cp` of the input | recovery | streamed | times `cp` | peak memory |",
        "|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in report["rows"]:
        cp = statistics.median(row["cp_seconds"])
        for recover in ("none", "sketch"):
            found = row[recover]
            lines.append(
                f"| {row['layers']} | {row['input_bytes'] / 1e9:.1f} GB | {row['output_bytes'] / 1e9:.1f} GB | {cp:.0f} s "
                f"| {recover} | {statistics.median(found['seconds']):.0f} s | {found['times_cp']:.2f} "
                f"| {found['peak_bytes'] / 2**30:.2f} GiB |"
            )
    runs = len(report["rows"][0]["none"]["seconds"])
    return (
        f"`python examples/benchmarks/streaming.py` on {report['machine']}: Qwen2.5-VL-7B's shapes, 30 % of the neurons, "
        f"median of {runs} runs for each recovery and {2 * runs} for `cp`, in turn; cold page cache, until all is on disk. "
        "Times are those of the whole command, starting Python included.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    """Measure, and write results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder for checkpoints; removed afterwards")
    parser.add_argument("--layers", type=int, nargs="+", default=[LAYERS, 2 * LAYERS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "streaming", help="results, without suffix")
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        return make(options.work, options.make)
    report: dict[str, object] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "rows": []}
    for layers in options.layers:
        report["rows"].append(measure(options.work / "streaming", layers, options.repeats))
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(table(report))
    print(table(report))
    return None


if __name__ == "__main__":
    main()
