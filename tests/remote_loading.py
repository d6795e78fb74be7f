"""Load pruned checkpoints with remote code in a process without hf_lop: `python tests/remote_loading.py FOLDER`.

Every folder in FOLDER holds a checkpoint, and in `expected.pt` the name of an auto class, inputs and logits. It may hold
`heads.json`, with what loads of the other classes of its auto_map report and read, see `tests/heads.py`. Prints a JSON object
that says what is wrong, by folder; nothing is wrong if it is empty.
"""

import hashlib
import json
import sys
import warnings
from pathlib import Path

import torch
import transformers

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def same(logits, wanted, tolerance):
    """Bit by bit, but for logits that were computed on another machine."""
    return torch.equal(logits, wanted) or (
        tolerance and torch.allclose(logits, wanted, rtol=tolerance, atol=tolerance)
    )


def check(folder, expected):
    """The class that was pruned."""
    auto = getattr(transformers, expected["auto"])
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(**expected["inputs"]).logits
    if any(info.values()):
        return str(info)
    if not same(logits.masked_fill(logits < -1e30, 0), expected["logits"], expected.get("close", 0.0)):
        return "logits differ"
    return ""


def check_head(folder, head, pruned):
    """Another class: the first Auto class that gives it loads its weights, the others build it without any."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for name in head["autos"]:
        with torch.device("meta"):
            model = getattr(transformers, name).from_config(config, trust_remote_code=True)
        if (type(model).__name__, type(model).__module__.split(".")[0]) != (head["cls"], "transformers_modules"):
            return f"{name} gives {type(model)}"
    if pruned in head["autos"]:
        return ""
    auto = getattr(transformers, head["autos"][0])
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    if {key: sorted(map(str, values)) for key, values in info.items()} != head["info"]:
        return f"reports {info}"
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name not in info["missing_keys"]:
            total.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return "" if total.hexdigest() == head["digest"] else "weights differ"


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


wrong = {}
for folder in sorted(path.parent for path in Path(sys.argv[1]).glob("*/expected.pt")):
    expected = torch.load(folder / "expected.pt", weights_only=True)
    if found := attempt(check, folder, expected):
        wrong[folder.name] = found
    heads = folder / "heads.json"
    for head in json.loads(heads.read_text()) if heads.exists() else ():
        if not head["skipped"] and (found := attempt(check_head, folder, head, expected["auto"])):
            wrong[f"{folder.name} as {head['cls']}"] = found
if "hf_lop" in sys.modules:
    wrong["hf_lop"] = "was imported"
print(json.dumps(wrong))
