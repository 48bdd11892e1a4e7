"""The picture at the top of the README: metric against length, each seed's from its one run.

    PYTHONPATH=src python benchmarks/lengths/picture.py

Draws docs/images/lengths.png and lengths-dark.png from the kept results of docs/studies/text, which
`make study-docs` made; nothing is trained.
"""

from pathlib import Path

from polyak.study import Study
from polyak.study._plots import DARK, LIGHT, lengths_alone, png

DOCS = Path(__file__).parents[2] / "docs"


def main(images: Path = DOCS / "images") -> None:
    """Draw it for light and for dark pages into the folder `images`."""
    findings = Study.load(DOCS / "studies" / "text").findings
    images.mkdir(exist_ok=True)
    for name, theme in (("lengths.png", LIGHT), ("lengths-dark.png", DARK)):
        (images / name).write_bytes(png(lengths_alone, findings, theme))


if __name__ == "__main__":
    main()
