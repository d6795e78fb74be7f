"""The command line as a module, the form in which launchers start it: `python -m hf_lop`."""

from hf_lop.cli import main

main()
