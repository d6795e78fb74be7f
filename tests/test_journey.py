"""The journey of a user: fine-tune with LoRA, merge, prune with the base's pruner, fine-tune, quantise, push, pull, evaluate.

Every step is a Python of its own against a local Hub; what a card says is compared with what the files beside it hold.
"""

import json
import re
import struct

import pytest
import yaml

pytest.importorskip("lmms_eval", reason="the extra eval is not installed")

from demo_benchmarks import write_benchmarks

from hf_lop.planning.show import si
from tests.hub_server import run_python, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRAIN = """
import copy, json, warnings
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from hf_lop import LOPPruner, demo

def fine_tune(model, rate):
    collate = lambda rows: next(demo.batches(processor, Dataset.from_list(rows), with_answer=True))
    how = TrainingArguments("trained", max_steps=4, per_device_train_batch_size=16, learning_rate=rate, report_to=[],
                            save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True)
    Trainer(model, how, train_dataset=demo.load_data("calibration", 64), data_collator=collate).train()
    return model.eval()

def logits(model):
    with torch.no_grad():
        return model(**next(demo.batches(processor, demo.load_data("report", 4)))).logits
"""
MAKE = (
    TRAIN
    + """
HfApi().create_repo("me/base")
commit = HfApi().upload_folder(repo_id="me/base", folder_path=demo.MODEL_DIR).oid
processor = AutoProcessor.from_pretrained("me/base")
model = AutoModelForImageTextToText.from_pretrained("me/base", dtype=torch.float32)
fitted = LOPPruner.fit(model, demo.load_data("search", 128), processor=processor, samples=64, search_samples=64)
assert (fitted.config.base_model, fitted.config.base_revision) == ("me/base", commit)
fitted.push_to_hub("me/lop-base")

lora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj", "down_proj"], r=4))
merged = fine_tune(lora, 1e-3).merge_and_unload().requires_grad_(True)
merged.save_pretrained("merged")
processor.save_pretrained("merged")

pruner = LOPPruner.from_pretrained("me/lop-base")
kept = copy.deepcopy(merged)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pruned = pruner.prune(merged, 0.5, round_to=16)
said = [str(one.message) for one in caught if "are near those of me/base" in str(one.message)]
fine_tune(pruned, 1e-4)
pruned.save_pretrained("pruned")
processor.save_pretrained("pruned")
torch.save(logits(pruned), "expected.pt")
pruned.push_to_hub("me/journey")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pruner.make_elastic(kept).push_to_hub("me/elastic")
print(json.dumps({"said": said, "parameters": pruned.num_parameters(), "made": pruned.config.pruning_config}))
"""
)
QUANTISE = """
import json
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, TorchAoConfig
import hf_lop
how = TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=["model.visual", "lm_head"])
model = AutoModelForImageTextToText.from_pretrained("me/journey", quantization_config=how)
print(model.push_to_hub("me/journey-int8").commit_url)
"""
READ = """
import sys
import torch
from transformers import AutoModelForImageTextToText
load = AutoModelForImageTextToText.from_pretrained
model, info = load(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
assert "hf_lop" not in sys.modules
inputs = torch.load(sys.argv[2] + "/inputs.pt")
with torch.no_grad():
    found = model.eval()(**inputs).logits
expected = torch.load(sys.argv[2] + "/expected.pt")
print(float((found - expected).norm() / expected.norm()))
"""
INPUTS = """
import torch
from transformers import AutoProcessor
from hf_lop import demo
torch.save(next(demo.batches(AutoProcessor.from_pretrained("me/journey"), demo.load_data("report", 4))), "inputs.pt")
"""
COMMAND = "import sys; sys.argv[0] = 'hf-lop'; from hf_lop.cli import main; main()"
PULLED = """
import json, warnings
import torch
from transformers import AutoModelForImageTextToText
from hf_lop import LOPPruner
from hf_lop.units.configs import layer_widths, text_configs

warnings.simplefilter("ignore")
pulled = AutoModelForImageTextToText.from_pretrained("half")
loaded = AutoModelForImageTextToText.from_pretrained("me/elastic", lop_ratio=0.5)
wanted = LOPPruner.from_pretrained("me/lop-base").prune(AutoModelForImageTextToText.from_pretrained("merged"), 0.5)
inputs = torch.load("inputs.pt")
with torch.no_grad():
    found = [model.eval()(**inputs).logits for model in (pulled, loaded, wanted)]
print(json.dumps({"widths": [layer_widths(text_configs(model)[0]) for model in (pulled, loaded, wanted)],
                  "apart": [float((one - found[2]).norm() / found[2].norm()) for one in found]}))
"""


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("maker")) as hub:
        hub.made = json.loads(run_python(MAKE, hub).splitlines()[-1])
        run_python(INPUTS, hub)
        yield hub


@pytest.fixture(scope="module")
def int8(journey):
    run_python(QUANTISE, journey)
    return journey.files("me/journey-int8")


def card_of(files):
    text = files["README.md"].decode()
    rows = re.findall(r"^\| (.*?) \|$", text, re.MULTILINE)
    return text, {cells[0]: cells[1:] for cells in (row.split(" | ") for row in rows)}


def stored_of(files):
    """Shapes by name, and bytes of all tensors, from the header of the only weight file."""
    (data,) = (data for name, data in files.items() if name == "model.safetensors")
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {name: entry["shape"] for name, entry in header.items()}, len(data) - 8 - length


def run_cli(hub, *arguments):
    return run_python(COMMAND.replace("sys.argv[0] = 'hf-lop'", f"sys.argv = {['hf-lop', *arguments]!r}"), hub)


def test_the_fine_tuned_base_is_called_near(journey):
    """It was loaded from the base's own repository, at the pruner's commit, and trained since."""
    assert len(journey.made["said"]) == 1
    assert journey.made["made"]["base_match"] == "near"
    config = json.loads(journey.files("me/journey")["config.json"])
    assert config["pruning_config"]["base_match"] == "near"
    assert "near those that the pruner was made of" in card_of(journey.files("me/journey"))[0]


def test_the_card_says_what_the_files_hold(journey):
    files = journey.files("me/journey")
    text, rows = card_of(files)
    config = json.loads(files["config.json"])
    shapes, stored = stored_of(files)
    widths = config["text_config"]["intermediate_size"]
    found = [
        shape[0]
        for name, shape in sorted(shapes.items())
        if name.endswith("mlp.up_proj.weight") and "visual" not in name
    ]
    assert sorted(found) == sorted(widths)
    assert rows["FFN neurons"][1] == f"{sum(widths):,}"
    assert rows["parameters"][1] == f"{journey.made['parameters']:,}"
    assert rows["memory of the weights"][1] == si(stored, "B")
    assert all(
        width % 16 == 0 or width == full
        for width, full in zip(widths, config["pruning_config"]["dense_widths"], strict=True)
    )
    assert "All widths are multiples of" in text
    assert "base_model: me/base" in text
    assert "processor_config.json" in files or "preprocessor_config.json" in files


def test_it_is_read_without_hf_lop(journey, tmp_path):
    code = READ.replace("sys.argv[1]", repr("me/journey")).replace("sys.argv[2]", repr(str(journey.home)))
    assert float(run_python(code, journey, home=tmp_path, block=("hf_lop",)).splitlines()[-1]) == 0


def test_quantised(journey, int8, tmp_path):
    text, rows = card_of(int8)
    _, stored = stored_of(int8)
    assert "quantisation (`torchao`)" in text
    assert rows["parameters"][1] == f"{journey.made['parameters']:,}"
    shown, unit = rows["memory of the weights"][1].split()
    assert float(shown) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(stored, rel=0.02)
    assert stored < stored_of(journey.files("me/journey"))[1] * 0.7
    assert json.loads(int8["config.json"])["pruning_config"]["base_match"] == "near"
    code = READ.replace("sys.argv[1]", repr("me/journey-int8")).replace("sys.argv[2]", repr(str(journey.home)))
    assert float(run_python(code, journey, home=tmp_path, block=("hf_lop",)).splitlines()[-1]) < 0.1


def test_evaluated(journey, tmp_path):
    """The numbers on the card are those of the file that evaluate wrote, and a second save of the model leaves them."""
    tasks = write_benchmarks(tmp_path / "tasks", 2)
    out = tmp_path / "results.json"
    run_cli(
        journey, "evaluate", "me/journey", "--tasks", "lop_demo", "--include-path", str(tasks), "--batch-size", "8",
        "--dtype", "float32", "--out", str(out), "--push-results", "me/journey",
    )  # fmt: skip
    results = json.loads(out.read_text())
    assert results["parameters"] == journey.made["parameters"]
    assert results["pruning"] == journey.made["made"]
    (task,) = results["tasks"]
    text = journey.files("me/journey")["README.md"].decode()
    metadata = yaml.safe_load(text.split("---")[1])
    shown = {
        metric["type"]: metric["value"] for one in metadata["model-index"][0]["results"] for metric in one["metrics"]
    }
    assert shown == pytest.approx(task["metrics"])
    assert metadata["base_model"] == "me/base"


def test_any_size_is_pulled(journey):
    run_cli(journey, "pull", "me/elastic", "--ratio", "0.5", "--out", "half")
    found = json.loads(run_python(PULLED, journey).splitlines()[-1])
    assert found["widths"][0] == found["widths"][1] == found["widths"][2]
    assert max(found["apart"]) < 1e-3
    text, rows = card_of({"README.md": (journey.home / "half/README.md").read_bytes()})
    _, stored = stored_of({"model.safetensors": (journey.home / "half/model.safetensors").read_bytes()})
    assert rows["memory of the weights"][1] == si(stored, "B")
    assert "near those that the pruner was made of" in text
