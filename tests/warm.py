"""Children that need not import torch again: each is forked from a process that has, before transformers or hf_lop."""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from types import ModuleType

READY = [  # what transformers imports; nothing here reads HF_HOME, and nothing is hf_lop's own
    "torch",
    "torch._dynamo.convert_frame",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch.export",
    "torchao",
    "torchvision.transforms.v2",
    "scipy.optimize",
    "sklearn.metrics",
    "typer",
]
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(READY)


def run(code, *, env, cwd, absent=(), timeout=280):
    """Run code as `python -c` would, with these environment variables alone.

    Raises:
        TimeoutExpired: it took too long, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        child = SPAWN.Process(target=_child, args=(code, env, str(cwd), [str(file) for file in files], absent))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise TimeoutExpired(code, timeout, *(file.read_text() for file in files if file.exists()))
        return CompletedProcess(code, child.exitcode, *(file.read_text() for file in files))


def _child(code, env, cwd, files, absent):
    for file, stream in zip(files, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    early = {"transformers", "huggingface_hub", "hf_lop", *absent} & set(sys.modules)
    assert not early, f"{early} was imported before the child began"
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = ["", *env.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = ["-c"]
    __import__("torch").set_num_threads(1)
    sys.modules["__main__"] = main = ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)
