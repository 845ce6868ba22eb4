"""The documentation is run: every Python block, every bnn command; every public name and flag is on its page."""

from __future__ import annotations

import inspect
import pkgutil
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import typer

import bnn
from bnn import cli
from bnn.seeding import isolated

ROOT = Path(__file__).parent.parent
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.is_file()]
SKIPPED = ("pip ", "pytest", "bnn demo")  # CI runs these in full
WITHOUT_BLOCKS = ("design", "reference", "choosing")  # pages that only tell
UNSEEN = ("py", "python3", "pycon", "sh", "shell", "console", "zsh")  # fences that would escape this test

FENCE = re.compile(r"^```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    """A fenced block of a page, and the line that its body begins at."""

    language: str
    body: str
    line: int


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(match["language"], match["body"], text.count("\n", 0, match.start("body")) + 1)
        for match in FENCE.finditer(text)
    ]


def command_lines(body: str) -> list[str]:
    """The lines of a bash block, those that end in a backslash joined with the next; no comments."""
    lines = [line.strip() for line in body.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run_commands(snippet: Snippet, where: str) -> None:
    for line in command_lines(snippet.body):
        if line.startswith(SKIPPED):
            continue
        words = shlex.split(line, comments=True)
        assert words[0] == "bnn", f"{where}: only bnn, pip and pytest are run here, not {line!r}"
        with warnings.catch_warnings():
            # The page on imbalanced data shows this warning; any other is an error.
            warnings.filterwarnings("ignore", "fit: rows are not drawn alike")
            assert cli.run(words[1:]) == 0, f"{where}: {line}"


def run_python(snippet: Snippet, page: Path, namespace: dict[str, Any]) -> None:
    # Blank lines before it, so that a traceback names the line of the page.
    source = "\n" * (snippet.line - 1) + snippet.body
    exec(compile(source, str(page), "exec"), namespace)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Snippets are small: on a busy machine threads that wait for each other cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    with isolated(0, "docs"):
        for snippet in snippets(page):
            if snippet.language == "python":
                run_python(snippet, page, namespace)
            elif snippet.language == "bash":
                run_commands(snippet, f"{page_name(page)} line {snippet.line}")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_no_block_escapes(page: Path) -> None:
    """Each fence is seen by the pattern above, and none is in a language that looks run but is not."""
    opened = re.findall(r"^[ \t]*(?:```|~~~)[ \t]*(\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert opened == [snippet.language for snippet in snippets(page)]
    assert not set(opened) & set(UNSEEN)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in WITHOUT_BLOCKS], ids=page_name)
def test_guides_have_blocks_that_run(page: Path) -> None:
    assert {"python", "bash"} & {snippet.language for snippet in snippets(page)}


def test_a_block_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n\nraise ValueError\n```\n\n```bash\nbnn bank info \\\n  none\n```\n")
    python, bash = snippets(page)
    with pytest.raises(ValueError) as caught:
        run_python(python, page, {})
    assert caught.traceback[-1].lineno + 1 == 6
    assert command_lines(bash.body) == ["bnn bank info    none"]
    with pytest.raises(AssertionError, match="bnn bank info"):
        run_commands(bash, "page")
    with pytest.raises(AssertionError, match="rm"):
        run_commands(Snippet("bash", "rm -r banks\n", 1), "page")


def reference_entries() -> set[str]:
    pages = (ROOT / "docs").rglob("reference*.md")
    return {name for page in pages for name in re.findall(r"^::: (bnn[\w.]*)$", page.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("name", bnn.__all__)
def test_public_name_is_in_the_reference(name: str) -> None:
    assert f"bnn.{name}" in reference_entries()


@pytest.mark.parametrize("entry", sorted(reference_entries()))
def test_reference_entry_exists(entry: str) -> None:
    found = pkgutil.resolve_name(entry)
    assert inspect.getdoc(found), f"{entry} has no docstring, so nothing is shown of it"


def public_members(module: ModuleType) -> Iterator[str]:
    """Functions and classes that a module defines, or that its `__all__` hands on."""
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__ or name in getattr(module, "__all__", ())
        if own and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name


MODULES = [name for name in bnn.__all__ if inspect.ismodule(getattr(bnn, name))]


@pytest.mark.parametrize("name", MODULES)
def test_members_of_public_modules_have_docstrings(name: str) -> None:
    """mkdocstrings shows members with a docstring only."""
    module = getattr(bnn, name)
    bare = [member for member in public_members(module) if not getattr(module, member).__doc__]
    assert list(public_members(module))
    assert not bare


def verbs(command: Any, words: tuple[str, ...] = ("bnn",)) -> Iterator[tuple[str, Any]]:
    """Every command below this one, with the words that call it."""
    if hasattr(command, "commands"):  # typer's groups are click's in some versions, its own in others
        for name, child in command.commands.items():
            yield from verbs(child, (*words, name))
    else:
        yield " ".join(words), command


VERBS = dict(verbs(typer.main.get_command(cli.app)))


def cli_section(verb: str) -> str:
    """The text under the heading of a verb in docs/cli.md."""
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    found = re.search(rf"^## `{re.escape(verb)}`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/cli.md has no heading '## `{verb}`'"
    return found[1]


def flags(command: Any) -> set[str]:
    return {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")} - {"--help"}


@pytest.mark.parametrize("verb", VERBS)
def test_flags_of_a_verb_are_documented(verb: str) -> None:
    """Each flag has a row in the table of its verb, and each row is a flag."""
    listed = re.findall(r"^\| `(--[\w-]+)", cli_section(verb), re.MULTILINE)
    assert sorted(listed) == sorted(flags(VERBS[verb]))


def test_defaults_are_documented() -> None:
    """A plain default in the table is the one in the code."""
    wrong = []
    for verb, command in VERBS.items():
        section = cli_section(verb)
        for parameter in command.params:
            shown = re.search(rf"^\| `{parameter.opts[0]}[ `][^|]*\|[^|]*\| `([^`|]*)` \|$", section, re.MULTILINE)
            if shown and shown[1] != str(parameter.default):
                wrong.append(f"{verb} {parameter.opts[0]}: page {shown[1]}, code {parameter.default}")
    assert not wrong


def test_configuration_names_flags_of_fit() -> None:
    """The TOML block of docs/cli.md would be taken by `bnn fit --config`."""
    (block,) = [s for s in snippets(ROOT / "docs" / "cli.md") if s.language == "toml"]
    assert {f"--{key}" for key in tomllib.loads(block.body)} <= flags(VERBS["bnn fit"])


def test_every_verb_is_found() -> None:
    assert {
        "bnn fit",
        "bnn train",
        "bnn evaluate",
        "bnn calibrate",
        "bnn predict",
        "bnn bank info",
        "bnn bank verify",
        "bnn bench",
    } <= set(VERBS)
    assert all(flags(command) for command in VERBS.values())
