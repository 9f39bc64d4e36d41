"""Every example of README.md and docs/ is run as a reader would run it.

    ```python     stands on its own, and is run as a program in a directory of its page; must end well
    ```output     what the program above it prints
    ```console    lines after `$ ` are run by bash in that directory; what follows them is what they print

In what is printed, `...` stands for anything. Comments before a block change that:

    <!-- file: lab.py -->      the program is also kept under this name, for what follows on the page
    <!-- continues -->         the program goes on where the one above it ended
    <!-- status: 124 -->       the last command, or the program, ends with this status
    <!-- needs pyats -->       it is run where pyATS is installed: by `.ci/run pyats`
    <!-- run by .ci/run -->    it is: see test_the_commands_to_set_up_are_those_that_ci_runs
"""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import coheld
from coheld.testing.support import delays
from tools import optional

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN, SHOWN = {"python", "console"}, {"output", "text", "diff"}
SET_ASIDE = {"run by .ci/run"} if optional.PYATS else {"run by .ci/run", "needs pyats"}

FENCE = re.compile(
    r"(?P<comments>(?:^<!-- [^\n]+ -->\n)*)^```(?P<language>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMENT = re.compile(r"<!-- (?P<key>[\w ./]+?)(?:: (?P<value>.+?))? -->")


class WrongExample(AssertionError):
    """An example that does not do what its page says."""


def check(right: bool, complaint: str) -> None:
    """Raises: WrongExample: if it is not right."""
    if not right:
        raise WrongExample(complaint)


@dataclass
class Block:
    """A fenced block of a page, with the comments right before it."""

    line: int
    language: str
    body: str
    options: dict[str, str] = field(default_factory=dict)
    expected: str | None = None  # of a python block: the output block after it


def blocks_of(text: str) -> list[Block]:
    """The blocks that are to be run, in order."""
    found: list[Block] = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        options = {one["key"]: one["value"] or "" for one in COMMENT.finditer(match["comments"])}
        if match["language"] in RUN and not SET_ASIDE & options.keys():
            found.append(Block(line, match["language"], match["body"], options))
        elif match["language"] == "output" and not SET_ASIDE & options.keys():
            found[-1].expected = match["body"]
    return found


def matches(printed: str, expected: str) -> bool:
    """Is this what was printed? `...` stands for anything."""
    pattern = ".*?".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


class Page:
    """One page's examples, in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.program = ""  # what a block that continues goes on from
        scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": scripts, "PYTHONWARNINGS": "error"}

    def run(self, block: Block) -> None:
        """Run it, and check what it prints and how it ends."""
        if block.language == "python":
            self._run_program(block)
        else:
            self._run_commands(block)

    def _run_program(self, block: Block) -> None:
        before = self.program if "continues" in block.options else ""
        self.program = before + block.body
        path = self.directory / block.options.get("file", "example.py")
        path.write_text(self.program)
        printed = self._printed([sys.executable, str(path)], int(block.options.get("status", 0)))
        if block.expected is not None:
            check(matches(printed, block.expected), f"printed:\n{printed}\nnot:\n{block.expected}")

    def _run_commands(self, block: Block) -> None:
        sessions = re.split(r"^\$ ", block.body, flags=re.MULTILINE)
        check(sessions[0] == "", "a console block begins with a command")
        for number, session in enumerate(sessions[1:], 1):
            command, _, expected = session.partition("\n")
            status = int(block.options.get("status", 0)) if number == len(sessions) - 1 else 0
            printed = self._printed(["bash", "-c", command], status)
            right = not expected or matches(printed, expected)
            check(right, f"{command}\nprinted:\n{printed}\nnot:\n{expected}")

    def _printed(self, command: list[str], status: int) -> str:
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=delays.LONG * 2,
            check=False,
        )
        printed = done.stdout.decode()
        check(done.returncode == status, f"{command} ended with {done.returncode}:\n{printed}")
        return printed


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples(path: Path, tmp_path: Path) -> None:
    page = Page(tmp_path)
    for block in blocks_of(path.read_text()):
        try:
            page.run(block)
        except WrongExample as error:
            pytest.fail(f"{path.name}, line {block.line}: {error}", pytrace=False)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_block_is_overlooked(path: Path) -> None:
    text = path.read_text()
    languages = [match["language"] for match in FENCE.finditer(text)]
    assert len(re.findall(r"^ *(```|~~~)", text, re.MULTILINE)) == 2 * len(languages), "a fence that we do not see"
    unknown = [one for one in languages if one not in RUN | SHOWN and not one.startswith("{")]
    assert not unknown, f"neither run nor known to be shown only: {unknown}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    local = [target for target in targets if not re.match(r"\w+:", target)]
    assert not [target for target in local if not (path.parent / target).exists()]


@pytest.mark.parametrize("name", coheld.__all__)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    assert re.search(rf"^\.\. (auto\w+|data):: {name}$", text, re.MULTILINE)
    assert name == "__version__" or getattr(coheld, name).__doc__


PICTURES = runpy.run_path(str(ROOT / "docs" / "pictures" / "draw.py"))["PICTURES"]


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.__name__)
def test_a_picture_is_the_one_that_its_script_draws(picture: Callable[[], Any]) -> None:
    kept, drawn = (ROOT / "docs" / "pictures" / f"{picture.__name__}.svg").read_text(), picture().svg()
    assert words_in(kept) == words_in(drawn)
    assert kept == drawn or picture.__name__ == "top"  # how textual draws the words changes with its version


def words_in(svg: str) -> list[str]:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg)).replace("&#160;", " ").split()


def test_pages_show_every_picture_and_say_what_it_shows() -> None:
    shown = [found for path in PAGES for found in re.findall(r"!\[([^]]+)\]\(([^)]+\.svg)\)", path.read_text())]
    assert sorted(Path(target).name for _, target in shown) == sorted(f"{one.__name__}.svg" for one in PICTURES)
    assert all(len(words.split()) > 20 for words, _ in shown)


@pytest.mark.source_tree
def test_the_commands_to_set_up_are_those_that_ci_runs() -> None:
    marked = [m["body"] for m in FENCE.finditer((ROOT / "README.md").read_text()) if ".ci/run" in m["comments"]]
    listed = subprocess.run([ROOT / ".ci" / "setup-commands"], stdout=subprocess.PIPE, check=True).stdout.decode()
    assert [body.removeprefix("$ ") for body in marked] == listed.splitlines(keepends=True)
    assert [command.split("/")[-1] for command in listed.split("\n")] == ["coheld demo", "python -m pytest", ""]


# ---- the checker can fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```python\nraise ValueError('why')\n```", "ValueError: why"),
        ("```python\nprint(1)\n```\n```output\n2\n```", "printed:\n1\n"),
        ("```console\n$ echo one\ntwo\n```", "printed:\none\n"),
        ("```console\n$ false\n```", "ended with 1"),
        ("<!-- status: 3 -->\n```console\n$ true\n```", "ended with 0"),
        ("```console\nls\n```", "begins with a command"),
    ],
)
def test_a_wrong_example_is_seen(tmp_path: Path, text: str, complaint: str) -> None:
    page = Page(tmp_path)
    with pytest.raises(WrongExample) as failure:
        for block in blocks_of(text):
            page.run(block)
    assert complaint in str(failure.value)


def test_a_right_page_passes(tmp_path: Path) -> None:
    text = (
        "<!-- file: lab.py -->\n```python\nx = 1\n```\n<!-- continues -->\n```python\nprint(x, 'and more')\n```\n"
        "```output\n1 ... more\n```\n<!-- status: 3 -->\n```console\n$ cat lab.py\nx = 1\n$ exit 3\n```\n"
    )
    page, blocks = Page(tmp_path), blocks_of(text)
    assert [block.line for block in blocks] == [2, 6, 13]
    for block in blocks:
        page.run(block)
