"""What loading a size of an elastic repository reads and takes, from a folder and from a Hub, and how fast sizes change.

    python examples/benchmarks/elastic_loading.py --work work

writes results/elastic_loading.json and results/elastic_loading.md. Two models: the embedded demo MLLM with its pruner, and a
language model of the shape of Qwen2.5-0.5B (24 layers, 4,864 neurons, bfloat16) with random weights, a random neuron order
and widths that grow from layer to layer; bytes and times do not depend on values. The Hub is the test suite's, on this machine.

* weights: bytes of the parameters of the size, as they are stored
* read: bytes that are asked of the weight files of the folder, headers included
* from storage: bytes that this process got from the disk (/proc/self/io), the pruner included, with all files evicted from
  the page cache first
* downloaded: bytes of weight files that the Hub sent; with all: config and pruner as well, as on the first load of any size
* seconds: from_pretrained, and one number read of every page of the weights, as loaders may only map files; with everything
  in the page cache, median of the rounds, against the dense model in the same round; cold: once, with the files evicted
* switching: `Elastic.set_plan` with a plan at hand, median and 99th percentile over 1,000 changes between four sizes
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the Hub and the random pruner of the test suite

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from hf_lop import LOPPruner, demo  # noqa: E402
from hf_lop.hub.elastic.write import SHARE  # noqa: E402
from hf_lop.hub.read.files import Folder  # noqa: E402
from hf_lop.units.size import ModelSize  # noqa: E402
from tests.fake_pruner import fake_pruner  # noqa: E402
from tests.hub_server import File, Repository, run_python, serve  # noqa: E402

RATIOS = (0.3, 0.5, 0.7)
AUTO = {"demo": AutoModelForImageTextToText, "0.5B shape": AutoModelForCausalLM}


def write_demo(folder: Path) -> None:
    """Make the demo an elastic repository, in the dtype it is stored in."""
    model = AutoModelForImageTextToText.from_pretrained(demo.MODEL_DIR, dtype="auto")
    demo.load_pruner().make_elastic(model).save_pretrained(folder)


def write_large(folder: Path) -> None:
    """Make a model of the shape of Qwen2.5-0.5B with random weights, and an elastic repository of it."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    pruner = fake_pruner(model, sketch_rows=128)
    pruner.train_predictor("mlp")
    pruner.make_elastic(model).save_pretrained(folder, max_shard_size="300MB")


def evict(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def from_storage() -> int:
    """Bytes that this process got from the disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Count what is asked of the files of folders."""
    asked, original = {"bytes": 0}, Folder.read_into

    def read_into(self: Folder, file: str, start: int, buffer: memoryview) -> None:
        asked["bytes"] += len(buffer)
        original(self, file, start, buffer)

    Folder.read_into = read_into  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        Folder.read_into = original  # type: ignore[method-assign]


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def on_disk(name: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure loading from a folder: the dense model, then every ratio without and with recovery."""

    def load(**size: Any) -> Any:
        return AUTO[name].from_pretrained(folder, dtype="auto", **size)

    sizes: dict[str, dict[str, Any]] = {"dense": {}}
    for ratio in RATIOS:
        sizes[f"{ratio:.0%}"] = {"lop_ratio": ratio, "lop_recover": None}
        sizes[f"{ratio:.0%}, recovered"] = {"lop_ratio": ratio}
    rows = []
    for label, size in sizes.items():
        evict(folder)
        before, start = from_storage(), time.perf_counter()
        with counting() as asked:
            model = touched(load(**size))
        rows.append({"size": label, "weights": weight_bytes(model), "from storage": from_storage() - before})
        rows[-1]["cold seconds"] = time.perf_counter() - start
        rows[-1]["read"] = asked["bytes"] if size else sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        del model
    seconds: dict[str, list[float]] = {label: [] for label in sizes}
    for _ in range(rounds):
        for label, size in sizes.items():
            seconds[label].append(timed(lambda s=size: touched(load(**s))))
    for row in rows:
        own, dense = seconds[row["size"]], seconds["dense"]
        row["seconds"] = statistics.median(own)
        row["against dense"] = statistics.median(a / b for a, b in zip(own, dense, strict=True))
    return rows


def touched(model: Any) -> Any:
    """Read a number of every page of all parameters: loaders may map files and leave the reading for later."""
    for parameter in model.parameters():
        parameter.detach().reshape(-1)[:: 4096 // parameter.element_size()].sum()
    return model


def timed(run: Callable[[], object]) -> float:
    """Measure the wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def over_http(name: str, folder: Path, home: Path) -> list[dict[str, Any]]:
    """Measure what a Hub sends, to a client without a cache."""
    rows = []
    with serve(home) as hub:
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        repository = hub.repositories["me/elastic"] = Repository()
        repository.commit(
            "main", "elastic", {n: File(p.read_bytes(), n.endswith("tensors")) for n, p in files.items()}
        )
        for ratio in RATIOS:
            for recover in (None, "auto"):
                code = f"""
import hf_lop
from transformers import {AUTO[name].__name__} as Auto
model = Auto.from_pretrained("me/elastic", lop_ratio={ratio}, lop_recover={recover!r}, dtype="auto")
print(sum(p.numel() * p.element_size() for p in model.parameters()))
"""
                hub.sent.clear()
                asked = len(hub.log)
                client = home / "client"
                weights = int(run_python(code, hub, home=client))
                shutil.rmtree(client)
                sent = dict(hub.sent)
                pruner = sum(count for path, count in sent.items() if "/pruner/" in path)
                body = sum(n for p, n in sent.items() if p.endswith(".safetensors") and "/pruner/" not in p)
                rows.append({"size": f"{ratio:.0%}" + (", recovered" if recover else ""), "weights": weights})
                rows[-1] |= {"downloaded": body, "with all": sum(sent.values()), "pruner": pruner}
                rows[-1]["requests"] = len(hub.log) - asked
    return rows


def switching(name: str, folder: Path) -> dict[str, Any]:
    """Measure changes of size in memory, and what memory an elastic model takes beyond the loaded one."""
    pruner: Any = LOPPruner.from_pretrained(folder)
    model = AUTO[name].from_pretrained(folder, dtype="auto")
    elastic = pruner.elastic(model)
    plans = [pruner.plan(ratio) for ratio in (*RATIOS, 0.0)]
    taken = []
    for index in range(1000):
        taken.append(timed(lambda i=index: elastic.set_plan(plans[i % len(plans)])))
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    elastic.set_plan(plans[1])
    new = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in elastic.model.parameters()}
    return {
        "median, us": statistics.median(taken) * 1e6,
        "99th percentile, us": statistics.quantiles(taken, n=100)[98] * 1e6,
        "with planning, median, ms": statistics.median(timed(lambda: elastic.set_plan(0.4)) for _ in range(20)) * 1e3,
        "weights": weight_bytes(model),
        "extra bytes": sum(count for place, count in new.items() if place not in owned),
        "materialize, s": timed(elastic.materialize),
    }


def repository_bytes(folder: Path) -> dict[str, int]:
    """Bytes of an elastic repository by part."""

    def size(pattern: str) -> int:
        return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())

    return {"dense": size("*.safetensors"), "elastic": size("elastic/*"), "pruner": size("pruner/*")}


def computed_7b() -> dict[str, Any]:
    """Compute the parts of an elastic repository of the shape of Qwen2.5-VL-7B, and the bytes of its sizes."""
    layers, hidden, neurons, rows, total = 28, 3584, 18944, 128, 8_292_166_656
    size = ModelSize(
        (neurons,) * layers, hidden, 3, total, 2 * total, 0, (3 * hidden,) * layers, (6 * hidden,) * layers
    )
    transposed = layers * int(SHARE * neurons) * hidden * 2
    products = layers * hidden * rows * 4
    pruner = layers * neurons * (2 + 4 * 4 + 4 + rows // 2)  # order, statistics, scale and codes of the sketch
    found: dict[str, Any] = {"dense": 2 * total, "elastic": transposed + products, "pruner": pruner}
    for ratio in RATIOS:
        width = round(neurons * (1 - ratio))
        weights = size.bytes_at((width,) * layers)
        whole = (neurons - width) * layers * hidden * 2 if width > int(SHARE * neurons) else 0
        found[f"{ratio:.0%}"] = {"weights": weights, "downloaded, recovered": weights + whole + products}
    return found


def table(result: dict[str, Any]) -> str:
    """Render the results as Markdown."""
    lines = ["# Loading sizes from an elastic repository", ""]
    lines += [f"How it is measured: `examples/benchmarks/elastic_loading.py`. {result['machine']}.", ""]
    lines += ["Bytes of the repository, in MB (computed for the 7B shape, measured for the others):", ""]
    lines += ["| model | dense weights | elastic/ | of dense | pruner/ |", "|---|---:|---:|---:|---:|"]
    for name, parts in [(n, m["repository"]) for n, m in result["models"].items()] + [
        ("7B shape", result["7B shape"])
    ]:
        share = parts["elastic"] / parts["dense"]
        lines.append(
            f"| {name} | {mb(parts['dense'])} | {mb(parts['elastic'])} | {share:.1%} | {mb(parts['pruner'])} |"
        )
    for name, measured in result["models"].items():
        lines += ["", f"## {name}, from a folder", ""]
        lines += ["| size | weights, MB | read, MB | / weights | from storage, MB | cold, s | seconds | / dense |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
        for row in measured["disk"]:
            lines.append(
                f"| {row['size']} | {mb(row['weights'])} | {mb(row['read'])} | {row['read'] / row['weights']:.3f} "
                f"| {mb(row['from storage'])} | {row['cold seconds']:.2f} | {row['seconds']:.2f} | {row['against dense']:.2f} |"
            )
        lines += ["", f"## {name}, over HTTP", ""]
        lines += [
            "| size | weights, MB | downloaded, MB | / weights | with config and pruner, MB | / weights | requests |"
        ]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
        for row in measured["http"]:
            lines.append(
                f"| {row['size']} | {mb(row['weights'])} | {mb(row['downloaded'])} | {row['downloaded'] / row['weights']:.3f} "
                f"| {mb(row['with all'])} | {row['with all'] / row['weights']:.3f} | {row['requests']} |"
            )
    lines += ["", "## Changing the size in memory", ""]
    lines += ["| model | set_plan, median | 99th percentile | with planning | extra memory | materialize |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for name, measured in result["models"].items():
        row = measured["switching"]
        lines.append(
            f"| {name} | {row['median, us']:.0f} us | {row['99th percentile, us']:.0f} us | "
            f"{row['with planning, median, ms']:.1f} ms | {row['extra bytes']} bytes | {row['materialize, s']:.2f} s |"
        )
    return "\n".join(lines) + "\n"


def mb(count: int) -> str:
    """Format bytes as MB."""
    return f"{count / 1e6:.3f}" if count < 1e7 else f"{count / 1e6:,.1f}"


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the repositories; they are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "elastic_loading")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(AUTO), default=list(AUTO))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "models": {},
        "7B shape": computed_7b(),
    }
    for name in arguments.models:
        folder = arguments.work / name.replace(" ", "-")
        if not (folder / "pruner" / "model.safetensors").is_file():
            {"demo": write_demo, "0.5B shape": write_large}[name](folder)
        result["models"][name] = {
            "repository": repository_bytes(folder),
            "switching": switching(name, folder),
            "disk": on_disk(name, folder, arguments.rounds),
            "http": over_http(name, folder, arguments.work / "hub"),
        }
    for suffix, text in (("json", json.dumps(result, indent=2) + "\n"), ("md", table(result))):
        path = arguments.out.with_suffix(f".{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
