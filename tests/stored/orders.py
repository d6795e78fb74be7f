"""Load repositories of several versions in one process, in every order: `python orders.py OLD NEW EXPECTED`.

OLD and NEW hold the same model, each with the remote code of its version. A process without hf_lop is warmed up, and forked
for every order of three loads: OLD by its remote code, NEW by its remote code, and NEW by the hook of hf_lop, which is imported
then. Prints a JSON list of what went wrong.
"""

import itertools
import json
import os
import sys

import torch
import transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
AUTO = transformers.AutoModelForCausalLM
OLD, NEW, EXPECTED = sys.argv[1:]
tensors = load_file(EXPECTED)
inputs = {name: tensors[name] for name in ("input_ids", "attention_mask")}


def load(step):
    if step == "hook":
        import hf_lop  # noqa: F401

        return AUTO.from_pretrained(NEW, output_loading_info=True)
    return AUTO.from_pretrained({"old": OLD, "new": NEW}[step], trust_remote_code=True, output_loading_info=True)


def check(order):
    for step in order:
        model, info = load(step)
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        if any(info.values()):
            return f"{step} in {order}: {info}"
        if not torch.allclose(logits, tensors["logits"], rtol=1e-5, atol=1e-5):
            return f"{step} in {order}: logits differ by {(logits - tensors['logits']).abs().max()}"
    return None


wrong = []
for order in itertools.permutations(("old", "new", "hook")):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            found = check(order)
        except BaseException as error:
            found = f"{order}: {type(error).__name__}: {error}"
        os.write(writer, json.dumps(found).encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = json.loads(pipe.read() or '"nothing came back"')
    os.waitpid(child, 0)
    wrong += [found] if found else []
print(json.dumps(wrong))
