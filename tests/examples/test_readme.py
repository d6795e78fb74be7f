"""Every code block of the README and of the guides runs: Python against a loopback Hub, shell lines as printed."""

import re
import shlex
import subprocess
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest

from tests.hub_server import run_python, serve

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "examples" / "guides").glob("*.md"))]
BLOCKS = {
    page: re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for page in PAGES
}
RUN = [page for page in PAGES if {language for language, _ in BLOCKS[page]} & {"python", "bash"}]
UPLOAD = """
from huggingface_hub import HfApi
from hf_lop import demo
for name, folder in (("org/demo", demo.MODEL_DIR), ("org/lop-demo", demo.PRUNER_DIR)):
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder)
"""
# What the README pushes, for the guides that load it.
PUSHED = {
    "me/demo-lop30": 'demo.load_pruner().prune("org/demo", 0.3).push_to_hub("me/demo-lop30")\n',
    "me/demo-lop50": 'demo.load_pruner().prune("org/demo", 0.5).push_to_hub("me/demo-lop50")\n',
    "me/demo-lora": (
        "from peft import LoraConfig, get_peft_model\n"
        "targets = r'.*language_model.*(q|gate|up|down)_proj'\n"
        "get_peft_model(demo.load_model()[0], LoraConfig(target_modules=targets)).push_to_hub('me/demo-lora')\n"
    ),
    "me/demo-elastic": 'demo.load_pruner().make_elastic("org/demo").push_to_hub("me/demo-elastic")\n',
}
# Scripts that a page runs for what it needs; the others take minutes and show that they start.
QUICK = {"examples/demo_benchmarks.py"}
COMMAND = "import sys; from hf_lop.cli import main; sys.argv = {words!r}; main()"
SCRIPT = "import runpy, sys; sys.argv = {words!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
# Each step has names of its own, as in a process of its own; imports are shared, which is what takes the time.
SESSION = """
for title, code in {steps!r}:
    try:
        exec(compile(code, title, "exec"), {{"__name__": "__main__"}})
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{{title}} exits with {{end.code}}") from end
"""


def test_every_block_is_of_a_kind_that_is_tested():
    for page, blocks in BLOCKS.items():
        assert {language for language, _ in blocks} <= {"python", "bash", "text", "bibtex"}, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [
        link for link in links if not link.startswith("https://") and not (page.parent / link.split("#")[0]).exists()
    ]
    assert missing == []


def test_the_readme_leads_to_every_guide():
    text = README.read_text(encoding="utf-8")
    assert [guide.name for guide in PAGES[1:] if f"(examples/guides/{guide.name})" not in text] == []


@pytest.fixture
def hub(tmp_path):
    with serve(tmp_path) as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_blocks_run_in_order(page, hub, tmp_path):
    """A page is one session: what one block pushes or saves, a later one loads."""
    steps = [(False, "the Hub", set_up(page))]
    for number, (language, code) in enumerate(BLOCKS[page], start=1):
        title = f"{page.name}, block {number}"
        if language == "python":  # one that does not import hf_lop must run where it is not installed
            steps.append((re.search("^(import|from) hf_lop", code, re.MULTILINE) is None, title, code))
        elif language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                if program := check_shell(shlex.split(line, comments=True)):
                    steps.append((False, f"{title}, {line}", program))
    for alone, group in groupby(steps, itemgetter(0)):
        session = SESSION.format(steps=[step[1:] for step in group])
        run_python(session, hub, home=tmp_path / "home", block=("hf_lop",) if alone else (), cwd=tmp_path)


def set_up(page):
    text = page.read_text(encoding="utf-8")
    return UPLOAD + "".join(code for name, code in PUSHED.items() if page != README and name in text)


def check_shell(words):
    """The program that does what a shell line does; None for a line that was checked here."""
    if not words or words[0] == "pip":  # installation is what `make` does
        return None
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", words[1]], cwd=ROOT, check=True, capture_output=True)
        return None
    if words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
        if words[1] in QUICK:
            return SCRIPT.format(words=[str(ROOT / words[1]), *words[2:]])
        subprocess.run([sys.executable, words[1], "--help"], cwd=ROOT, check=True, capture_output=True)
        return None
    assert words[0] == "hf-lop", words
    return COMMAND.format(words=words)
