"""The house as DESIGN has it: few rooms, few modules in each, no circle, no arrow back up; shipped code that can be read."""

from pathlib import Path

import grimp
import pytest

import hf_lop
from hf_lop.units.ship import remote_code

ROOT = Path(hf_lop.__file__).parent
SPECIAL = {"__init__", "__main__", "version", "errors"}


@pytest.fixture(scope="module")
def graph():
    """All imports of all files, those for type checkers included."""
    return grimp.build_graph("hf_lop", exclude_type_checking_imports=False, cache_dir=None)


def modules(folder):
    names = {path.stem for path in folder.glob("*.py")}
    return names | {path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))}


def test_at_most_ten_rooms():
    assert len(modules(ROOT) - SPECIAL) <= 10


def test_at_most_twelve_modules_in_a_folder():
    for folder in (path.parent for path in ROOT.rglob("__init__.py")):
        files = {path.stem for path in folder.glob("*.py")} - SPECIAL
        assert len(files) <= 12, f"{folder.relative_to(ROOT)} has {len(files)} modules"


def test_no_circle_among_files(graph):
    files = {name for name in graph.modules if (ROOT.parent / (name.replace(".", "/") + ".py")).is_file()}
    waiting = {name: graph.find_modules_directly_imported_by(name) & files - {name} for name in files}
    while free := {name for name, imports in waiting.items() if not imports & waiting.keys()}:
        waiting = {name: imports for name, imports in waiting.items() if name not in free}
    assert not waiting, f"these import each other in a circle: {sorted(waiting)}"


def test_nothing_below_the_pruner_knows_it(graph):
    above = ("hf_lop.cli", "hf_lop.demo", "hf_lop.evaluation", "hf_lop.pruner.sizes")
    known = graph.find_modules_that_directly_import("hf_lop.pruner.pruner")
    assert {name for name in known if not name.startswith(above)} <= {"hf_lop"}


def test_shipped_files_are_short_and_import_each_other_only():
    code = remote_code()
    assert {"modeling_lop.py", "lop_unit.py", "lop_neurons.py", "lop_errors.py"} <= code.keys()
    for name, text in code.items():
        assert len(text.splitlines()) <= 400, name
        assert b"hf_lop.units" not in text, name
        assert b"from hf_lop" not in text, name


def test_sources_are_files_of_one_idea():
    long = {path.name: n for path in ROOT.rglob("*.py") if (n := len(path.read_text().splitlines())) > 320}
    assert set(long) <= {"pruner.py"}, long  # half of it are docstrings
