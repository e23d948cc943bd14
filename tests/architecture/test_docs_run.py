"""The documentation is true: its Python blocks run, its links lead somewhere, the make targets it names exist."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch

from qkernels.core.recipe import TensorRecipe, make_recipe
from qkernels.core.verify import LayerCheck, VerifyReport

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """The line number and the text of each ```python block."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch, threads_restored):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "docs"}  # the blocks of a page continue one another
    for line, code in python_blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(
        re.findall(r"\bmake ([a-z-]+)", "\n".join(re.findall(r"`[^`]+`|^    .*$", page.read_text(), re.MULTILINE)))
    )
    assert named <= targets


def test_every_option_of_a_recipe_is_in_the_list():
    text = (ROOT / "docs" / "ptq.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    options = [name for name, p in inspect.signature(make_recipe).parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert not set(options) - listed
    named = re.findall(r"`(\w+)`", text.split("`Recipe(activation", 1)[1].split("\n\n", 1)[0])
    assert {field.name for field in dataclasses.fields(TensorRecipe)} <= set(named)


def test_every_field_of_a_verify_report_is_in_the_list():
    text = (ROOT / "docs" / "ptq.md").read_text()
    names = [*VerifyReport.__annotations__, *LayerCheck.__annotations__]
    names += [name for name, value in vars(VerifyReport).items() if isinstance(value, property)]
    assert not [name for name in names if f"`{name}`" not in text]


def test_messages_of_the_troubleshooting_page_are_in_the_source():
    """In its tables the left column quotes what is said word for word."""
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 20
    files = [*ROOT.glob("qkernels/**/*.py"), *ROOT.glob("build_backend/*.py"), ROOT / "setup.py"]
    source = "\n".join(re.sub(r'"\s+f?"', "", file.read_text()) for file in files)
    assert not [text for text in quoted if text not in source]


def test_quick_start_is_short():
    section = (ROOT / "README.md").read_text().split("## Quick start", 1)[1].split("\n## ", 1)[0]
    [code] = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
