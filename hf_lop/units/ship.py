"""The remote code that every repository of a pruned model carries: the sources that load it, as flat files beside its weights.

Transformers follows relative imports from the file that `auto_map` names, in a folder and on the Hub. The sources are shipped
as they are, but for the lines that import each other.
"""

import re
from pathlib import Path

from hf_lop import errors
from hf_lop.units import checks, configs, decoder, kinds, modeling_lop, unit
from hf_lop.units.kinds import neurons

ENTRY = "modeling_lop.py"
_SOURCES = {
    "lop_" + module.__name__.rpartition(".")[2] + ".py": module for module in (errors, unit, decoder, checks, configs)
}
_SOURCES |= {"lop_kinds.py": kinds, "lop_neurons.py": neurons, ENTRY: modeling_lop}
_IMPORT = re.compile(r"^from hf_lop\.(?:\w+\.)*(\w+) import ", re.MULTILINE)


def remote_code() -> dict[str, bytes]:
    """Return the files of the remote code, by name: `modeling_lop.py`, and those that it imports."""
    texts = {name: Path(str(module.__file__)).read_text(encoding="utf-8") for name, module in _SOURCES.items()}
    return {name: _IMPORT.sub(r"from .lop_\1 import ", text).encode() for name, text in texts.items()}
