"""A study as one page: text, tables and pictures in a single file that needs nothing else."""

import base64
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from ._findings import Findings
from ._plots import DARK, pictures, png
from ._tables import tables

_TEMPLATE = "report.html.j2"


def page(study: Findings, *, light: dict[str, bytes]) -> str:
    """The report as HTML.

    Args:
        study: what was measured.
        light: PNG of every picture for a light page; those for a dark page are drawn here.
    """
    # Cells and names come from the task, which may hold anything: everything is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    figures = [
        {
            "name": name,
            "says": says,
            "light": _embedded(light[name]),
            "dark": _embedded(png(picture, study, DARK)),
        }
        for name, (picture, says) in pictures(study).items()
    ]
    return environment.from_string(source).render(
        task=study.task,
        verdict=study.verdict,
        seeds=len(study.seeds),
        tables=tables(study),
        figures={figure["name"]: figure for figure in figures},
        rows=study.data,
        versions=study.versions,
        command=study.command,
        minutes=study.seconds / 60.0,
        jobs=study.jobs,
    )


def _embedded(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")
