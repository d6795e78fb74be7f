"""`hf lop`: the real `hf` installs hf_lop as its extension and runs it.

Real: the `hf` command, the environment it makes, pip, the build of the wheel from this checkout's sources, the manifest,
the dispatch. Simulated: GitHub (a server on 127.0.0.1), and the dependencies: pip is told to leave them out, and the
extension finds those of the test environment, so neither their download nor pip's time limit is tested.
"""

import importlib.util
import json
import os
import re
import site
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lop import __version__, demo

ROOT = Path(__file__).parents[2]
BUILD = ("hatchling", "pathspec", "pluggy", "packaging", "trove_classifiers")


def test_the_repository_follows_the_rules():
    """A root file hf-lop would be installed as a shell script; the first line with a description is what `hf` shows."""
    assert not (ROOT / "hf-lop").exists()
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    description = next(line for line in lines if line.startswith("description"))
    assert re.fullmatch(r'description = "[^"]{20,120}"', description)
    assert 'hf-lop = "hf_lop.cli:main"' in lines


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Run `hf` in a home of its own in which the extension was just installed."""
    for name in (*BUILD, "trustme"):
        pytest.importorskip(name, reason=f"{name} is not installed; the extra dev has it")
    from tests.github_server import serve

    home = tmp_path_factory.mktemp("home")
    (home / "build").mkdir()
    for name in BUILD:
        source = Path(importlib.util.find_spec(name).origin).parent
        (home / "build" / name).symlink_to(source)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PIP_", "PYTHON", "TRANSFORMERS_"))}
    clean |= {"HOME": str(home), "PATH": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1", "PIP_CONFIG_FILE": os.devnull}
    clean |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = Path(sys.executable).parent / "hf"

    def run(*arguments, code=0, **env):
        done = subprocess.run(
            [str(command), *map(str, arguments)],
            env=clean | {"PYTHONPATH": os.pathsep.join(site.getsitepackages()), "HF_HUB_OFFLINE": "1"} | env,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
            cwd=home,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    with serve({"me/hf-lop": ROOT}, home) as github:
        # "0" is pip's way to say: build with what is there, instead of fetching hatchling
        offline = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "HF_HUB_OFFLINE": "0"}
        env = github.env | offline | {"PYTHONPATH": str(home / "build")}
        missing = run("extensions", "install", "me/hf-none", code=1, **env)
        assert "not found" in missing.stdout + missing.stderr
        run("extensions", "install", "me/hf-lop", **env)
        run.log, run.home = github.log, home
    return run


@pytest.mark.slow
def test_it_is_installed_from_github_as_a_python_package(hf):
    assert "GET github.com/me/hf-lop/archive/HEAD.zip" in hf.log
    folder = hf.home / ".local/share/hf/extensions/hf-lop"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["type"], manifest["repo_id"], manifest["short_name"]) == ("python", "me/hf-lop", "lop")
    assert manifest["description"].startswith("Learned pruning of multimodal LLMs")
    assert list((folder / "venv").glob("lib/python*/site-packages/hf_lop/hub_cards/*.jinja"))


@pytest.mark.slow
def test_it_is_listed(hf):
    listed = hf("extensions", "list", "--format", "json").stdout
    (entry,) = json.loads(listed)
    assert (entry["command"], entry["source"], entry["type"]) == ("hf lop", "me/hf-lop", "python")
    assert "Learned pruning" in entry["description"]
    assert re.search(r"lop\s+Learned pruning", hf("--help").stdout)


@pytest.mark.slow
def test_it_runs(hf):
    assert hf("lop", "--version").stdout.strip() == __version__
    facts = json.loads(hf("lop", "inspect", demo.MODEL_DIR, "--json").stdout)
    assert facts["can_be_pruned"] is True
    assert "export" in hf("lop", "--help").stdout


@pytest.mark.slow
def test_exit_codes_pass_through(hf):
    failed = hf("lop", "inspect", "no-such-model", code=1)
    assert failed.stdout == ""
    assert "Error:" in failed.stderr
    hf("lop", "inspect", code=2)
    hf("lop", "no-such-command", code=2)


@pytest.mark.slow
def test_it_goes_again(hf):
    hf("extensions", "remove", "lop")
    assert not (hf.home / ".local/share/hf/extensions/hf-lop").exists()
