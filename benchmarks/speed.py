"""Which tables of the speed of updates follow from the results?

    python benchmarks/speed.py            writes those of docs/speed.md and README.md anew

Reads `results/updates.json`, and `results/updates-cuda.json` if there is one; both are written by
`benchmarks/updates.py`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from costs import in_bytes, in_time, table
from promises import GUARDED, Times, shown

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "speed.md", ROOT / "README.md")
RESULTS = Path(__file__).parent / "results"

LIMIT = "the limit"
USES = {
    "block": "the average in the live model, and out again",
    "export": "a safetensors file for inference",
    "save": "a checkpoint of the average",
    "resume": "read it, and go on from it",
    "step": "a training step",
}


def promised(found: Mapping[str, Any]) -> str:
    """Every promise, what was measured, and whether it was kept."""
    head = ["promise", "measured", "at most", "kept"]
    rows = []
    for name, said in found["promises"].items():
        kept = "yes" if said["kept"] else "**no**"
        rows.append([name, shown(said["measured"]), shown(said["at most"]), kept])
    return table(head, rows)


def updates(found: Mapping[str, Any]) -> str:
    """One table for each model and live dtype, the fastest with one average first."""
    times = Times(found)
    parts = []
    for model in times.models:
        size = found["models"][model]
        for live in dict.fromkeys(row["live"] for row in found["updates"]):
            parts.append(
                f"### {model}, {live}: {size['tensors']:,} tensors, {size['elements']:,} elements"
            )
            parts.append(_case(times, model, live))
    return "\n\n".join(parts)


def _case(times: Times, model: str, live: str) -> str:
    head = ["", "one average", "quartiles", "of the limit", "two", "four", "holds", "answer"]
    ones = [
        row
        for row in times.found["updates"]
        if (row["model"], row["live"], row["averages"]) == (model, live, 1)
    ]
    rows = []
    for one in sorted(ones, key=lambda row: float(row["seconds"])):
        who = one["who"]
        rows.append(
            [
                f"**{who}**" if who in times.ours else who,
                in_time(one["seconds"]),
                f"{in_time(one['low'])} to {in_time(one['high'])}",
                _ratio(one["of_limit"]),
                _several(times, model, live, 2, who),
                _several(times, model, live, 4, who),
                "" if who == LIMIT else in_bytes(one["bytes"]),
                "" if who == LIMIT else "right" if (who, live) in times.right else "**wrong**",
            ]
        )
    return table(head, rows)


def _several(times: Times, model: str, live: str, averages: int, who: str) -> str:
    row = times.of(model, live, averages, who)
    return f"{in_time(row['seconds'])} ({_ratio(row['of_limit'])})" if row else ""


def _ratio(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:,.0f}"


def uses(found: Mapping[str, Any]) -> str:
    """Blocks, files, and the share of a training step."""
    head = ["", "", "time", "quartiles", "extra memory"]
    rows = []
    for row in found["uses"]:
        extra = row.get("extra")
        what = USES[row["what"]]
        if "tokens" in row:
            what = f"{what} of {row['tokens']:,} tokens"
        elif "share" in row:
            what = f"the update after it: {_percent(row['share'])}"
        rows.append(
            [
                what,
                f"**{row['who']}**" if row["who"] == GUARDED else row["who"],
                in_time(row["seconds"]),
                f"{in_time(row['low'])} to {in_time(row['high'])}",
                "" if extra is None else in_bytes(extra),
            ]
        )
    return table(head, rows)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def made(found: Mapping[str, Any]) -> str:
    """When, where and by which command."""
    machine = found["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    return (
        f"Made on {found['date']} by `{found['command']}`: {where}, {machine['threads']} threads, "
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}."
    )


def how(found: Mapping[str, Any]) -> str:
    """How each is driven, how far from the oracle it ends, and who could not be asked."""
    lines = []
    for who, said in found["how"].items():
        ends = [
            f"{one['error']:.0e} ({one['live']})" for one in found["answers"] if one["who"] == who
        ]
        if ends:
            lines.append(f"- **{who}**: {said} Off by {', '.join(ends)}.")
    lines += [f"- Not run: **{who}**: {why}" for who, why in found["absent"].items()]
    known = [f"{name} {number}" for name, number in found["versions"].items() if number]
    return "\n".join([*lines, "", f"Versions: {', '.join(known)}."])


def gpu(found: Mapping[str, Any] | None) -> str:
    """The same on a GPU, or that it was never measured there."""
    if found is None:
        return (
            "**Not measured on a GPU yet.** `python benchmarks/updates.py --device cuda` does it, "
            "with the speed of a large copy on the device as the limit."
        )
    return "\n\n".join([made(found), promised(found), updates(found), uses(found)])


def short(found: Mapping[str, Any]) -> str:
    """The table of the README: polyak, the fastest peer that is right, and the limit."""
    times = Times(found)
    head = [
        "an update of",
        "polyak",
        "the fastest other that is right",
        "one `lerp_` of as many elements",
    ]
    rows = []
    for model in times.models:
        for live in dict.fromkeys(row["live"] for row in found["updates"]):
            ours, limit = (times.of(model, live, 1, who) for who in (GUARDED, LIMIT))
            theirs = times.fastest(model, live)
            assert ours is not None
            assert limit is not None
            rows.append(
                [
                    f"{model}, {found['models'][model]['tensors']:,} tensors, {live}",
                    in_time(ours["seconds"]),
                    f"{in_time(theirs['seconds'])} ({theirs['who']})" if theirs else "",
                    in_time(limit["seconds"]),
                ]
            )
    return table(head, rows)


def written(page: str, found: Mapping[str, Any], on_gpu: Mapping[str, Any] | None) -> str:
    """The page with what stands between marks made anew; what it has no marks for is left out."""
    if found["quick"]:
        raise SystemExit("results must be of a whole run, got one of --quick. Run `make bench`.")
    parts = {
        "speed-made": made(found),
        "speed-promises": promised(found),
        "speed-updates": updates(found),
        "speed-uses": uses(found),
        "speed-how": how(found),
        "speed-gpu": gpu(on_gpu),
        "speed-short": short(found),
    }
    for name, text in parts.items():
        begin, end = f"<!-- {name}: benchmarks/speed.py -->\n", f"<!-- end of {name} -->"
        head, opened, rest = page.partition(begin)
        _, closed, tail = rest.partition(end)
        if bool(opened) != bool(closed):
            raise SystemExit(f"a page must have both {begin.strip()} and {end}, or neither.")
        if opened:
            page = f"{head}{begin}\n{text}\n\n{end}{tail}"
    return page


def results() -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What was measured on the CPU, and on a GPU if it was."""
    gpu_file = RESULTS / "updates-cuda.json"
    found: dict[str, Any] = json.loads((RESULTS / "updates.json").read_text())
    return found, json.loads(gpu_file.read_text()) if gpu_file.exists() else None


def main() -> None:
    """Write the tables into the pages."""
    found, on_gpu = results()
    for page in PAGES:
        before = page.read_text()
        after = written(before, found, on_gpu)
        if after != before:
            page.write_text(after)
            print(f"written: {page}")


if __name__ == "__main__":
    main()
