"""One HTML page that needs nothing beside itself."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template

from ddpkit.analysis.claims import Claim
from ddpkit.analysis.tables import Table


@dataclass(frozen=True)
class Picture:
    """A PNG file with its caption, how to read it, and what it shows, for those who cannot see it."""

    path: Path
    caption: str
    note: str
    alternative: str


@dataclass(frozen=True)
class Section:
    """A part of the page: what was run and can be told apart, then verdicts, then what they rest on."""

    heading: str
    facts: Sequence[Table] = ()
    claims: Sequence[Claim] = ()
    parts: Sequence[Table | Picture] = field(default_factory=list)


def write(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Writes the page; figures are embedded, styles are inline, nothing is loaded."""
    template = Template(files("ddpkit.analysis").joinpath("report.html").read_text())
    body = "\n".join(_section(section) for section in sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.substitute(title=html.escape(title), lead=html.escape(lead), body=body))


def _section(section: Section) -> str:
    lines = [f"<h2>{html.escape(section.heading)}</h2>"]
    lines += [table.html() for table in section.facts]
    if section.claims:
        lines += ["<ul class='claims'>", *(_claim(claim) for claim in section.claims), "</ul>"]
    lines += [part.html() if isinstance(part, Table) else _picture(part) for part in section.parts]
    return "\n".join(lines)


def _claim(claim: Claim) -> str:
    reason = f"{claim.reason[:1].upper()}{claim.reason[1:]}."
    return (
        f"<li class='{claim.kind}'><p class='claim'>{html.escape(claim.claim)}</p>"
        f"<p class='verdict'>{html.escape(claim.verdict[:1].upper() + claim.verdict[1:])}.</p>"
        f"<p class='reason'>{html.escape(reason)} Paper: {html.escape(claim.published)}.</p></li>"
    )


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f"<figure><figcaption>{html.escape(picture.caption)}</figcaption>"
        f"<img alt='{html.escape(picture.alternative, quote=True)}' src='data:image/png;base64,{data}'>"
        f"<p class='note'>{html.escape(picture.note)}</p></figure>"
    )
