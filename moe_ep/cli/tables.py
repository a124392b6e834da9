"""Tables on the terminal, with rich where it is installed, and in Markdown."""

import importlib.util
import shutil
import sys
import textwrap
from collections.abc import Sequence

STYLES = {"ok": "green", "absent": "yellow", "broken": "bold red", "met": "green", "missed": "bold red"}


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to stdout; a cell that is a key of ``STYLES`` gets its colour when rich is there."""
    if importlib.util.find_spec("rich") is not None and sys.stdout.isatty():
        _print_rich(title, columns, rows)
    else:
        print(plain_table(title, columns, rows))


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """The table as text; the last column is wrapped to what ``width`` (the terminal's when None) leaves."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    total = shutil.get_terminal_size((120, 24)).columns if width is None else width
    widths[-1] = min(widths[-1], max(24, total - sum(widths[:-1]) - 2 * (len(widths) - 1)))
    lines = [title]
    for number, row in enumerate(cells):
        wrapped = textwrap.wrap(row[-1], widths[-1]) or [""]
        head = "  ".join(cell.ljust(size) for cell, size in zip(row[:-1], widths, strict=False))
        lines.append(f"{head}  {wrapped[0]}".rstrip())
        lines += [" " * (len(head) + 2) + line for line in wrapped[1:]]
        if number == 0:
            lines.append("  ".join("-" * size for size in widths))
    return "\n".join(lines) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _print_rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    Console().print(table)
