"use strict";

// Sorts a table by a column: ascending first, then descending; rows without a value stand last in both.
function sortBy(header) {
  const table = header.closest("table");
  const column = [...header.parentNode.children].indexOf(header);
  const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of header.parentNode.children) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const value = (row) => {
    const text = row.children[column].dataset.value;
    return text ? JSON.parse(text) : null;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });
  const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
  rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : direction * compare(a, b)));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const header = event.target.closest("th");
    if (header) sortBy(header);
  });
}

// Draws every figure in the colors of the stylesheet, again when the reader's scheme changes.
function draw() {
  const style = getComputedStyle(document.documentElement);
  const resolve = (value) =>
    typeof value === "string" && value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
  const colors = (key, value) => {
    if (!/color$/.test(key)) return value;
    return Array.isArray(value) ? value.map(resolve) : resolve(value);
  };
  for (const plot of document.querySelectorAll(".plot")) {
    const { data, layout, config } = JSON.parse(plot.nextElementSibling.textContent, colors);
    const [ink, paper, panel] = ["--ink", "--paper", "--panel"].map(resolve);
    const family = "system-ui, sans-serif";
    const whole = {
      ...layout,
      paper_bgcolor: paper,
      plot_bgcolor: paper,
      font: { family, size: 13, color: ink },
      hoverlabel: { bgcolor: panel, bordercolor: resolve("--rule"), font: { family, color: ink }, namelength: -1 },
      modebar: { bgcolor: paper, color: resolve("--muted"), activecolor: ink },
      hovermode: "closest",
      uirevision: "kept", // zoom and hidden lines outlive a change of colors
    };
    Plotly.react(plot, data, whole, { responsive: true, displaylogo: false, ...config });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
