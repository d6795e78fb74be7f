"""Every code block of the README runs: Python against a loopback Hub, shell lines as printed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import run_python, serve

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
UPLOAD = """
from huggingface_hub import HfApi
from hf_lop import demo
for name, folder in (("org/demo", demo.MODEL_DIR), ("org/lop-demo", demo.PRUNER_DIR)):
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder)
"""


def test_every_block_is_of_a_kind_that_is_tested():
    assert {language for language, _ in BLOCKS} <= {"python", "bash", "text", "bibtex"}


@pytest.fixture
def hub(tmp_path):
    with serve(tmp_path) as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_blocks_run_in_order(hub, tmp_path):
    """The README is one session: what one block pushes or saves, a later one loads."""
    run_python(UPLOAD, hub, home=tmp_path / "home")
    for language, code in BLOCKS:
        if language == "python":
            hides = ("hf_lop",) if "trust_remote_code=True" in code else ()
            run_python(code, hub, home=tmp_path / "home", block=hides, cwd=tmp_path)
        elif language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                check_shell(shlex.split(line, comments=True), hub, tmp_path)


def check_shell(words, hub, tmp_path):
    if not words or words[0] == "pip":  # installation is what `make` does
        return
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", words[1]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
        subprocess.run([sys.executable, words[1], "--help"], cwd=ROOT, check=True, capture_output=True)
    else:
        assert words[0] == "hf-lop", words
        code = f"import sys; from hf_lop.cli import main; sys.argv = {words!r}; main()"
        run_python(code, hub, home=tmp_path / "home", cwd=tmp_path)
