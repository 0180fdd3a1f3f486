// What the reader can do: sort, copy, switch the phase.
"use strict";

document.getElementById("view").addEventListener("change", () => {
  document.getElementById("view-note").textContent =
    currentView() === "end_to_end" ? "" : "Only mechanisms that act in this phase are drawn.";
  drawTrade(currentView());
});

// A first click puts the best on top, a second the worst; what was not measured stays at the end.
function sortBy(header) {
  const table = document.getElementById("figures");
  const headers = [...table.querySelectorAll("th[aria-sort]")];
  const column = headers.indexOf(header);
  const bestFirst = header.dataset.best === "high" ? "descending" : "ascending";
  const worstFirst = bestFirst === "ascending" ? "descending" : "ascending";
  const order = header.getAttribute("aria-sort") === bestFirst ? worstFirst : bestFirst;
  headers.forEach((h) => h.setAttribute("aria-sort", h === header ? order : "none"));
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.querySelectorAll("td")[column].dataset.value;
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return sign * (x - y);
  });
  body.append(...rows);
}

document.querySelectorAll("#figures th[aria-sort]").forEach((header) => {
  header.querySelector("button").addEventListener("click", () => sortBy(header));
});

async function copy(button) {
  const text = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(text.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(text);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1600);
}

document.querySelectorAll("button.copy").forEach((button) => {
  button.addEventListener("click", () => copy(button));
});

let drawnWidth = document.body.clientWidth;
window.addEventListener("resize", () => {
  if (document.body.clientWidth === drawnWidth) return;
  drawnWidth = document.body.clientWidth;
  drawAll();
});
setTheme(wantedTheme());
