"""`hf-lop` as a module, for launchers that start modules: `torchrun -m tests.run_cli evaluate ...`."""

from hf_lop.cli import main

if __name__ == "__main__":
    main()
