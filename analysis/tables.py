"""Tables as text, Markdown, LaTeX and HTML, all from the same cells."""

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

_COLUMNS = 100
"""Width of the terminal that text is wrapped for."""


@dataclass(frozen=True)
class Table:
    """Cells ready to be read.

    Attributes:
        caption: one line above the table.
        header: names of the columns.
        rows: the cells, row by row.
        notes: sentences below the table.
        words: number of columns from the left that hold words; these are set to the left, numbers to the right.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    words: int = 1

    def text(self) -> str:
        """Aligned columns for the terminal."""
        widths = [max(len(line[i]) for line in (self.header, *self.rows)) for i in range(len(self.header))]
        lines = [
            *textwrap.wrap(self.caption, _COLUMNS),
            self._padded(self.header, widths),
            "  ".join("-" * w for w in widths),
        ]
        lines += [self._padded(row, widths) for row in self.rows]
        notes = [textwrap.fill(note, _COLUMNS, initial_indent="  ", subsequent_indent="  ") for note in self.notes]
        return "\n".join([*lines, *notes])

    def markdown(self) -> str:
        """A GitHub table."""
        lines = [
            f"**{self.caption}**",
            "",
            _bars(self.header),
            _bars(["---"] * self.words + ["---:"] * (len(self.header) - self.words)),
        ]
        lines += [_bars([cell.replace("|", "\\|") for cell in row]) for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def latex(self) -> str:
        """A `table` for the packages booktabs and graphicx, shrunk where it is wider than the line."""
        lines = [
            r"\begin{table}",
            r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{_tex(self.caption)}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{'l' * self.words}{'r' * (len(self.header) - self.words)}}}",
            r"\toprule",
            " & ".join(_tex(cell) for cell in self.header) + r" \\",
            r"\midrule",
            *(" & ".join(_tex(cell) for cell in row) + r" \\" for row in self.rows),
            r"\bottomrule",
            r"\end{tabular}}",
        ]
        if self.notes:
            lines += [r"\par\smallskip\raggedright\scriptsize", *(_tex(note) for note in self.notes)]
        return "\n".join([*lines, r"\end{table}"]) + "\n"

    def html(self) -> str:
        """A `figure` with a table and its notes."""
        head = self._html_row("th", self.header)
        body = "\n".join(self._html_row("td", row) for row in self.rows)
        notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<figure class='table'><figcaption>{html.escape(self.caption)}</figcaption>\n"
            f"<div class='scroll'><table><thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>{notes}</figure>"
        )

    def _padded(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = zip(cells, widths, strict=True)
        return "  ".join(c.ljust(w) if i < self.words else c.rjust(w) for i, (c, w) in enumerate(padded)).rstrip()

    def _html_row(self, tag: str, cells: Sequence[str]) -> str:
        inner = [
            f"<{tag}{' class=word' if i < self.words else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(inner)}</tr>"


def write(out: Path, name: str, values: pd.DataFrame, tables: Sequence[Table]) -> None:
    """Writes `name.csv` with the full values and `name.md`, `name.tex` with the tables to read."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / f"{name}.csv", values)
    (out / f"{name}.md").write_text("\n".join(table.markdown() for table in tables))
    (out / f"{name}.tex").write_text("\n".join(table.latex() for table in tables))


def write_csv(path: Path, values: pd.DataFrame) -> None:
    """Writes full values, floats in the shortest form that reads back the same bits, truth values as true and false."""
    plain = values.copy()
    for column in plain.select_dtypes(bool).columns:
        plain[column] = plain[column].map({True: "true", False: "false"})
    path.parent.mkdir(parents=True, exist_ok=True)
    plain.to_csv(path, index=False)


def number(value: float, digits: int = 3) -> str:
    """Shortest readable form with `digits` significant digits; `-` where there is no value."""
    if value is None or not np.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    size = abs(value)
    if 1e-4 <= size < 1e5:
        # The exponent of the rounded value: 9.9999 becomes 10.0.
        decimals = max(0, digits - 1 - int(f"{size:.{digits - 1}e}".split("e")[1]))
        return f"{value:.{decimals}f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(value: float, decimals: int = 1) -> str:
    """A signed percentage; `-` where there is no value."""
    return "-" if value is None or not np.isfinite(value) else f"{value:+.{decimals}f} %"


def span(low: float, high: float, decimals: int = 1) -> str:
    """An interval of percentages, `[-1.2, +0.3]`; `-` where there is none."""
    if low is None or not (np.isfinite(low) and np.isfinite(high)):
        return "-"
    return f"[{low:+.{decimals}f}, {high:+.{decimals}f}]"


def _bars(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tex(text: str) -> str:
    for plain, escaped in (
        ("\\", r"\textbackslash "), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#"), ("$", r"\$"),
        ("{", r"\{"), ("}", r"\}"), ("±", r"$\pm$"), ("×", r"$\times$"), ("|", r"$|$"), ("<", r"$<$"), (">", r"$>$"),
        ("^", r"\textasciicircum "), ("~", r"\textasciitilde "),
    ):  # fmt: skip
        text = text.replace(plain, escaped)
    return text.replace("--", "-{}-")  # two hyphens, not a dash
