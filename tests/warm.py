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


def start(code, *arguments, env=None, cwd=None, files=(os.devnull, os.devnull), absent=()):
    """Start what `python -c code arguments` would, with these environment variables or one's own.

    Returns:
        `Process`: with `join`, `kill` and `exitcode`; what it prints goes to the two files.
    """
    given = (code, [str(argument) for argument in arguments], dict(env or os.environ), str(cwd or Path.cwd()))
    child = SPAWN.Process(target=_child, args=(*given, [str(file) for file in files], absent))
    child.start()
    return child


def run(code, *arguments, timeout=280, **options):
    """Let it end; the result has what it printed.

    Raises:
        TimeoutExpired: it took too long, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        child = start(code, *arguments, files=files, **options)
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise TimeoutExpired(code, timeout, *(file.read_text() for file in files if file.exists()))
        return CompletedProcess(code, child.exitcode, *(file.read_text() for file in files))


def _child(code, arguments, env, cwd, files, absent):
    for file, stream in zip(files, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    early = {"transformers", "huggingface_hub", "hf_lop", *absent} & set(sys.modules)
    assert not early, f"{early} was imported before the child began"
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = ["-c", *arguments]
    __import__("torch").set_num_threads(1)
    sys.modules["__main__"] = main = ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)
