// A click on a column's title sorts by it; totals stay where they are: at the end.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.tabIndex = 0;
    const value = row => { const c = row.cells[column], text = c.dataset.value ?? c.textContent; const n = parseFloat(text); return isNaN(n) ? text : n; };
    const sort = () => {
      const down = cell.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const fixed = [...body.rows].filter(r => r.className), free = [...body.rows].filter(r => !r.className);
      free.sort((a, b) => { const x = value(a), y = value(b); return (x > y ? 1 : x < y ? -1 : 0) * (down ? -1 : 1); });
      body.append(...free, ...fixed);
    };
    cell.addEventListener("click", sort);
    cell.addEventListener("keydown", e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); sort(); } });
  });
}
