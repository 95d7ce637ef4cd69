"use strict";
// Sort, filter and choose columns of the table of scans.
(() => {
  const table = document.getElementById("scans");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const element = (name) => document.getElementById(name);

  function sortBy(heading) {
    const descending = heading.getAttribute("aria-sort") === "ascending";
    const column = heading.cellIndex;
    const value = (row) => row.cells[column].dataset.value;
    const sign = descending ? -1 : 1;
    rows.sort((a, b) => {
      const [left, right] = [value(a), value(b)];
      if (left === "" || right === "") return (left === "") - (right === ""); // no value: last
      const difference = Number(left) - Number(right);
      return sign * (Number.isNaN(difference) ? left.localeCompare(right, undefined, { numeric: true }) : difference);
    });
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...rows);
  }

  function isWanted(row, which) {
    const outlying = "outlying" in row.dataset;
    if (which === "outlying") return outlying;
    if (which === "look") return outlying || row.dataset.quality !== "pass";
    return !which || row.dataset.quality === which;
  }

  function filter() {
    const words = element("find").value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const text = [...row.cells].slice(1, 4).map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !(isWanted(row, element("which").value) && text.includes(words));
      shown += !row.hidden;
    }
    element("shown").textContent = `${shown} of ${rows.length} scans`;
  }

  for (const heading of table.querySelectorAll("th[data-sort]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sortBy(heading));
    heading.append(button);
  }
  for (const box of document.querySelectorAll(".columns input"))
    box.addEventListener("change", () => {
      for (const cell of table.querySelectorAll(`[data-structure="${box.value}"]`)) cell.hidden = !box.checked;
    });
  element("find").addEventListener("input", filter);
  element("which").addEventListener("change", filter);
  element("pictures").addEventListener("change", () => table.classList.toggle("plain", !element("pictures").checked));
  for (const controls of document.querySelectorAll(".controls, .controls-columns")) controls.hidden = false;
  filter();
})();
