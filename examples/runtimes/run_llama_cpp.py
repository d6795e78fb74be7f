"""Run GGUF files in llama.cpp, by itself: `python examples/runtimes/run_llama_cpp.py REQUESTS.json`.

The file holds a list of {"file", "prompts", "texts", "vocabulary"}. Prints a JSON list with, for each, the
log-probabilities of every token behind every prompt of token ids, and the token ids of every text.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def ask(server: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a request to the server's HTTP interface."""
    request = urllib.request.Request(
        f"{server.listening_address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        answered: dict[str, Any] = json.load(answer)
        return answered


def run(file: str, prompts: list[list[int]], texts: list[str], vocabulary: int) -> dict[str, Any]:
    """Load one file, with keys and values kept in float32, and answer one request."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    # A token that is part of a character ends an answer without its probabilities: let it be a letter. They do not change.
    (letter,) = ask(server, "/tokenize", {"content": "m"})["tokens"]
    answers = []
    for prompt in prompts:
        body = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "cache_prompt": False}
        body["logit_bias"] = [[letter, 1000]]
        (first,) = ask(server, "/completion", body)["completion_probabilities"]
        found = {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
        answers.append([found[token] for token in range(vocabulary)])
    tokens = [ask(server, "/tokenize", {"content": text, "add_special": True})["tokens"] for text in texts]
    return {"logprobs": answers, "tokens": tokens}


if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("RESULT " + json.dumps([run(**request) for request in requests]))
