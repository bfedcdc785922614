"""What documentation holds besides prose: fenced blocks, commands, links and keys, found by a Markdown parser."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent.parent
_REASON = re.compile(r"<!--\s*not run:\s*(\S.*?)\s*-->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason` says why no test runs it, from an HTML comment right above."""

    file: str
    line: int
    language: str
    text: str
    reason: str | None


@dataclass(frozen=True)
class Command:
    """One command of a shell block, as a shell would split it."""

    block: Block
    words: tuple[str, ...]
    output: str | None = None
    """Where ``>`` sends what it prints."""

    @property
    def program(self) -> str:
        """Its first word, without the folder of the virtual environment."""
        return self.words[0].removeprefix(".venv/bin/")

    @property
    def where(self) -> str:
        return f"{self.block.file}: {shlex.join(self.words)}"


def pages() -> list[str]:
    """README and every page of docs, relative to the repository."""
    return ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


@cache
def tokens(text: str) -> tuple[Token, ...]:
    return tuple(MarkdownIt("commonmark").enable("table").parse(text))


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, text: str | None = None) -> list[Block]:
    """All fenced blocks of a page."""
    found, reason = [], None
    for token in tokens(text_of(page) if text is None else text):
        if token.type == "html_block":
            match = _REASON.search(token.content)
            reason = match[1] if match else None
        elif token.type == "fence":
            assert token.map is not None
            language = token.info.split()[0] if token.info else ""
            found.append(Block(page, token.map[0] + 1, language, token.content, reason))
            reason = None
        elif token.level == 0:
            reason = None
    return found


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block: continued lines joined, comments gone, ``a && b`` taken apart."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="><|&;")
        lexer.whitespace_split = True
        words: list[str] = []
        output: str | None = None
        for word in lexer:
            if word in ("&&", ";"):
                yield Command(block, tuple(words), output)
                words, output = [], None
            elif word == ">":
                output = lexer.get_token()
            else:
                assert not re.fullmatch(r"[><|&;]+", word), f"{block.file}:{block.line}: {word} is not understood"
                words.append(word)
        if words:
            yield Command(block, tuple(words), output)


def shell(page: str) -> list[Command]:
    """All commands of a page's ``sh`` blocks."""
    return [command for block in blocks(page) if block.language == "sh" for command in commands(block)]


def inline_code(page: str) -> Iterator[str]:
    """Code between single backticks, in prose and tables."""
    for token in tokens(text_of(page)):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def links(page: str) -> Iterator[str]:
    """Targets of links and pictures."""
    for token in tokens(text_of(page)):
        for child in token.children or ():
            target = child.attrGet("href" if child.type == "link_open" else "src")
            if child.type in ("link_open", "image") and isinstance(target, str):
                yield target


def anchors(text: str) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    found, headings = set[str](), tokens(text)
    for token, inside in zip(headings, headings[1:], strict=False):
        if token.type == "heading_open":
            plain = "".join(child.content for child in inside.children or () if child.type in ("text", "code_inline"))
            found.add(re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-"))
    return found
