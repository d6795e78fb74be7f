"""Run GGUF files in llama.cpp, by itself: `python tests/llama_cpp.py REQUESTS.json`.

The file holds a list of {"file", "prompts", "texts", "vocabulary"}. Prints a JSON list with, for each, the
log-probabilities of every token behind every prompt of token ids, and the token ids of every text.
"""

import json
import sys
import urllib.request

import xllamacpp

PLAIN = 77  # a token that is one ASCII letter; the log-probabilities do not depend on it


def ask(server, path, body):
    request = urllib.request.Request(
        f"{server.listening_address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def run(file, prompts, texts, vocabulary):
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    answers = []
    for prompt in prompts:
        body = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "cache_prompt": False}
        body["logit_bias"] = [[PLAIN, 1000]]  # of a token of several that make one character nothing would be said
        (first,) = ask(server, "/completion", body)["completion_probabilities"]
        found = {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
        answers.append([found[token] for token in range(vocabulary)])
    tokens = [ask(server, "/tokenize", {"content": text, "add_special": True})["tokens"] for text in texts]
    return {"logprobs": answers, "tokens": tokens}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as requests:
        print("RESULT " + json.dumps([run(**request) for request in json.load(requests)]))
