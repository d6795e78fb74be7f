"""Run a model folder in vLLM: `PYTHON_WITH_VLLM examples/runtimes/run_vllm.py FOLDER PROMPTS.json [transformers|vllm]`.

The third argument says whose model code runs: transformers', with remote code, by default, or vLLM's own.

Prints, for every prompt of token ids, the log-probabilities of the likeliest first tokens and the greedy tokens.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

COUNT, TOKENS = 8, 4


def main() -> None:
    """Load, generate, print."""
    from vllm import LLM, SamplingParams

    folder, prompts = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    implementation = sys.argv[3] if len(sys.argv) > 3 else "transformers"
    llm = LLM(
        folder,
        model_impl=implementation,
        trust_remote_code=implementation == "transformers",
        dtype="float32",
        max_model_len=128,
        max_num_seqs=4,
        enforce_eager=True,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=COUNT, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    answers = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": {str(token): entry.logprob for token, entry in output.outputs[0].logprobs[0].items()},
        }
        for output in outputs
    ]
    print("RESULT " + json.dumps(answers))


if __name__ == "__main__":
    main()
