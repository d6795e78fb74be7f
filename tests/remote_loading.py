"""Load pruned checkpoints with remote code in a process without hf_lop: `python tests/remote_loading.py FOLDER`.

Every folder in FOLDER holds a checkpoint, and in `expected.pt` the name of an auto class, inputs and logits. Prints a
JSON object that says what is wrong, by folder; nothing is wrong if it is empty.
"""

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


wrong = {}
for folder in sorted(path.parent for path in Path(sys.argv[1]).glob("*/expected.pt")):
    expected = torch.load(folder / "expected.pt", weights_only=True)
    try:
        auto = getattr(transformers, expected["auto"])
        model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        with torch.no_grad():
            logits = model.eval()(**expected["inputs"]).logits
        if any(info.values()):
            wrong[folder.name] = str(info)
        elif not same(logits.masked_fill(logits < -1e30, 0), expected["logits"], expected.get("close", 0.0)):
            wrong[folder.name] = "logits differ"
    except Exception as error:
        wrong[folder.name] = f"{type(error).__name__}: {error}"
if "hf_lop" in sys.modules:
    wrong["hf_lop"] = "was imported"
print(json.dumps(wrong))
