"""Write tables of results into the pages that show them: `python docs/tools/tables.py`.

In a page, `<!-- table: KIND FILE -->` stands before each of these tables. FILE is a CSV, relative to the page.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

DOCS = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"(?P<marker><!-- table: (?P<kind>\S+) (?P<file>\S+) -->\n)\n(\|.*\n)*\n?")


def main() -> None:
    for page in DOCS.glob("**/*.md"):
        before = page.read_text(encoding="utf-8")
        after = with_tables(before, page.parent)
        if after != before:
            print(f"writing {page}")
            page.write_text(after, encoding="utf-8")


def with_tables(text: str, folder: Path) -> str:
    """The text of a page in `folder` with each marked table as its CSV says."""

    def table(match: re.Match[str]) -> str:
        rows = pd.read_csv(folder / match["file"], dtype={"row": str, "method": str, "rule": str})
        return match["marker"] + "\n" + _as_markdown(_KINDS[match["kind"]](rows)) + "\n"

    return _TABLE.sub(table, text)


def _asynchronous(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each number of trainings, a column for each method."""
    cells = rows["time"].astype(str)
    for scans in ("sites", "unseen"):
        likelihood, dice = rows[f"nll {scans}"].map("{:.4f}".format), (100 * rows[f"dice {scans}"]).map("{:.1f}".format)
        cells += "; " + likelihood + ", " + dice
    wide = rows.assign(cell=cells).pivot(index="trainings", columns="method", values="cell")
    start = wide.pop("start")
    return wide[rows["method"].unique()[1:]].apply(lambda column: column.fillna(start)).reset_index()


def _rounds(rows: pd.DataFrame) -> pd.DataFrame:
    """The first, middle and last round of each method; Dice and calibration error in %."""
    last = rows["round"].max()
    shown = rows[rows["round"].isin([0, 1, last // 2, last])]
    table = shown[["method", "round"]].rename(columns={"method": "rule"})
    values = shown.columns.drop(["S", "method", "round"])
    for column in [name for name in values if not name.startswith(("seconds", "MB", "total"))]:
        scale, decimals = (1, 4) if column.startswith("nll ") else (100, 1)
        if column.startswith("ece "):
            decimals = 2
        table[column] = (scale * shown[column]).map(f"{{:.{decimals}f}}".format)
    table["MB"] = shown["total MB"].map("{:.2f}".format)
    table["min"] = (shown["total seconds"] / 60).map("{:.1f}".format)
    table["rule"] = table["rule"].where(table["rule"] != table["rule"].shift(), "")
    return table


def _study(rows: pd.DataFrame) -> pd.DataFrame:
    """All rows of a study beyond the paper; Dice in %."""
    formats = {"S": "d", "lambda": ".3g", "log_likelihood": ".4f", "weight": ".2f", "seconds": ".2f", "chosen": ".2f"}
    table = rows.drop(columns="sigma_ratio", errors="ignore")
    for name in table.select_dtypes("number"):
        scale, how = (1, formats[name]) if name in formats else (100, ".1f")
        table[name] = [format(scale * value, how) if pd.notna(value) else "" for value in table[name]]
    return table.fillna("")


def _classes(volumes: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice in % of each class on the sites: the start, then the first and last round of two rules."""
    n_sites, last = (volumes["row"].str.split(", ").str[k].dropna().astype(int).max() for k in (0, 2))
    rows = {"start": "0"} | {
        f"{rule} {number}": f"{n_sites}, {rule}, {number}" for rule in ("tempered", "factors") for number in (1, last)
    }
    on_sites = volumes[volumes["column"] == "sites"].groupby("row")[list(volumes.filter(like="dice of "))].mean()
    table = (100 * on_sites.loc[list(rows.values())]).T.map("{:.1f}".format).set_axis(list(rows), axis="columns")
    return table.rename(lambda name: name.removeprefix("dice of ")).rename_axis("class").reset_index()


def _numbers(rows: pd.DataFrame) -> pd.DataFrame:
    """All rows and columns, with two digits."""
    return rows.map(lambda value: f"{value:.2g}")


def _gpu(rows: pd.DataFrame) -> pd.DataFrame:
    """A layer's milliseconds of a forward, a backward and both, and its peak memory: ours and the composition's."""
    table = pd.DataFrame(index=rows["layer"].unique())
    cells = rows.set_index(["layer", "contender", "phase"])
    for phase in ("forward", "backward", "step"):
        for contender, name in (("ours", "ours"), ("compiled", "composition")):
            table[f"{phase}: {name}"] = cells["median_ms"].loc[:, contender, phase].map("{:.2f}".format)
    table["step: means alone"] = cells["median_ms"].loc[:, "mean", "step"].map("{:.2f}".format)
    for contender, name in (("ours", "ours"), ("compiled", "composition")):
        table[f"MB: {name}"] = cells["peak_mb"].loc[:, contender, "step"].map("{:.0f}".format)
    return table.rename_axis("layer").reset_index()


_KINDS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "asynchronous": _asynchronous,
    "classes": _classes,
    "gpu": _gpu,
    "numbers": _numbers,
    "rounds": _rounds,
    "study": _study,
}


def _as_markdown(table: pd.DataFrame) -> str:
    lines = [list(table), ["---"] * len(table.columns), *table.astype(str).itertuples(index=False)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
