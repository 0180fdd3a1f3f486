// The heads: a grid, a table that sorts and filters, and one head in detail.
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const { layers: LAYERS, heads: HEADS } = DATA.model;
const byId = (id) => document.getElementById(id);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const MAPS = bytes(DATA.maps);
const state = { metric: DATA.start.metric, head: DATA.start.head, sort: DATA.start.metric, down: true };

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  return made;
}

function figure(value) {
  if (value === null) return "—";
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return value.toFixed(size < 1 ? 3 : size < 100 ? 2 : 0);
}

const metric = (name) => DATA.metrics.find((m) => m.name === name);
const nameOf = ([layer, head]) => `layer ${layer}, head ${head}`;
const inkOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- the grid ----
function sizes(m) {
  const flat = m.values.flat().filter((v) => v !== null).map(Math.abs);
  const top = Math.max(...flat, 1e-12);
  return m.values.map((row) => row.map((v) => (v === null ? 0 : Math.sqrt(Math.abs(v) / top))));
}

function buildGrid() {
  const grid = byId("grid");
  grid.style.gridTemplateColumns = `max-content repeat(${LAYERS}, max-content)`;
  const top = element("div", null, { class: "row", role: "row" });
  top.append(element("span", "head", { class: "axis", role: "columnheader" }));
  for (let layer = 0; layer < LAYERS; layer += 1) {
    top.append(element("span", layer, { class: "axis", role: "columnheader", "aria-label": `layer ${layer}` }));
  }
  grid.append(top);
  for (let head = 0; head < HEADS; head += 1) {
    const row = element("div", null, { class: "row", role: "row" });
    row.append(element("span", head, { class: "axis", role: "rowheader" }));
    for (let layer = 0; layer < LAYERS; layer += 1) {
      const cell = element("button", null, { type: "button", role: "gridcell", tabindex: "-1" });
      cell.dataset.at = `${layer},${head}`;
      cell.append(document.createElement("i"));
      row.append(cell);
    }
    grid.append(row);
  }
  const said = (event) => {
    const cell = event.target.closest("button");
    if (cell) byId("grid-says").textContent = cell.getAttribute("aria-label");
  };
  grid.addEventListener("mouseover", said);
  grid.addEventListener("focusin", said);
  grid.addEventListener("click", (event) => {
    const cell = event.target.closest("button");
    if (cell) pickHead(cell.dataset.at.split(",").map(Number));
  });
  grid.addEventListener("keydown", moveInGrid);
}

function moveInGrid(event) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const cell = event.target.closest("button");
  if (!cell || !steps[event.key]) return;
  event.preventDefault();
  const at = cell.dataset.at.split(",").map(Number);
  const layer = Math.min(Math.max(at[0] + steps[event.key][0], 0), LAYERS - 1);
  const head = Math.min(Math.max(at[1] + steps[event.key][1], 0), HEADS - 1);
  cellOf([layer, head]).focus();
}

const cellOf = (at) => document.querySelector(`#grid [data-at="${at.join(",")}"]`);

function drawGrid() {
  const m = metric(state.metric);
  const size = sizes(m);
  byId("metric-what").textContent = `${m.what} The larger the square, the larger the figure.`;
  document.querySelectorAll("#grid button").forEach((cell) => {
    const [layer, head] = cell.dataset.at.split(",").map(Number);
    const side = `${Math.round(size[layer][head] * 86)}%`;
    cell.firstChild.style.width = side;
    cell.firstChild.style.height = side;
    const chosen = layer === state.head[0] && head === state.head[1];
    cell.setAttribute("aria-selected", chosen);
    cell.tabIndex = chosen ? 0 : -1;
    cell.setAttribute("aria-label", `${nameOf([layer, head])}: ${m.title} ${figure(m.values[layer][head])}`);
  });
}

// ---- the table ----
function buildTable() {
  const row = element("tr");
  row.append(element("th", "Head", { scope: "col", class: "name" }));
  DATA.metrics.forEach((m) => {
    const header = element("th", null, { scope: "col", "aria-sort": "none" });
    const button = element("button", m.title, { type: "button", title: m.what });
    button.addEventListener("click", () => {
      state.down = state.sort === m.name ? !state.down : true;
      state.sort = m.name;
      drawTable();
    });
    header.dataset.name = m.name;
    header.append(button);
    row.append(header);
  });
  document.querySelector("#table thead").append(row);
}

function chosenHeads() {
  const [from, to] = [Number(byId("from").value), Number(byId("to").value)];
  const least = byId("least").value === "" ? -Infinity : Number(byId("least").value);
  const values = metric(state.sort).values;
  const found = [];
  for (let layer = Math.max(from, 0); layer <= Math.min(to, LAYERS - 1); layer += 1) {
    for (let head = 0; head < HEADS; head += 1) {
      const value = values[layer][head];
      if (value !== null && value >= least) found.push([layer, head, value]);
    }
  }
  return found.sort((a, b) => (state.down ? b[2] - a[2] : a[2] - b[2]));
}

function drawTable() {
  document.querySelectorAll("#table th[aria-sort]").forEach((header) => {
    const sorted = state.down ? "descending" : "ascending";
    header.setAttribute("aria-sort", header.dataset.name === state.sort ? sorted : "none");
  });
  const found = chosenHeads();
  const shown = found.slice(0, Number(byId("count").value));
  const rows = shown.map(([layer, head]) => {
    const chosen = layer === state.head[0] && head === state.head[1];
    const row = element("tr", null, { "aria-selected": chosen });
    const name = element("th", null, { scope: "row", class: "name" });
    name.append(element("button", nameOf([layer, head]), { type: "button" }));
    row.append(name, ...DATA.metrics.map((m) => element("td", figure(m.values[layer][head]))));
    row.addEventListener("click", () => pickHead([layer, head], true));
    return row;
  });
  document.querySelector("#table tbody").replaceChildren(...rows);
  byId("table-says").textContent = `${shown.length} of ${found.length} heads, by ${metric(state.sort).title}.`;
}

// ---- one head ----
function drawMap() {
  const n = DATA.cells;
  const [layer, head] = state.head;
  const start = (layer * HEADS + head) * n * n;
  const canvas = byId("map");
  const context = canvas.getContext("2d");
  const side = canvas.width / n;
  context.fillStyle = inkOf("--page");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = inkOf("--all");
  for (let i = 0; i < n; i += 1) {
    for (let j = 0; j < n; j += 1) {
      context.globalAlpha = Math.sqrt(MAPS[start + i * n + j] / 255);
      context.fillRect(j * side, i * side, Math.ceil(side), Math.ceil(side));
    }
  }
  context.globalAlpha = 1;
  canvas.setAttribute("aria-label", `Map of ${nameOf(state.head)}: ${n} by ${n} parts of the text`);
}

function drawProfile() {
  const values = DATA.profiles[state.head[0]][state.head[1]];
  const top = Math.max(...values, 1e-9);
  byId("profile").replaceChildren(...values.flatMap((value, i) => {
    const bar = document.createElement("i");
    bar.style.width = `${(100 * value) / top}%`;
    const track = document.createElement("span");
    track.append(bar);
    return [element("span", DATA.distances[i]), track, element("span", `${(100 * value).toFixed(1)} %`)];
  }));
}

const word = (i) => DATA.tokens[i].replace(/\n/g, "⏎");
function inContext(i, weight) {
  const item = document.createElement("li");
  const before = DATA.tokens.slice(Math.max(i - 5, 0), i).join("").replace(/\n/g, " ");
  const after = DATA.tokens.slice(i + 1, i + 4).join("").replace(/\n/g, " ");
  item.append(`${before}`, element("mark", word(i)), `${after} `);
  item.append(element("small", `token ${i}, ${(100 * weight).toFixed(1)} %`));
  return item;
}

function drawHead() {
  const [layer, head] = state.head;
  const name = nameOf(state.head);
  byId("head-title").textContent = name[0].toUpperCase() + name.slice(1);
  byId("head-says").textContent = DATA.metrics
    .map((m) => `${m.title} ${figure(m.values[layer][head])}`).join(" · ");
  drawMap();
  drawProfile();
  byId("tokens").replaceChildren(...DATA.top_tokens[layer][head].map(([i, w]) => inContext(i, w)));
}

function pickHead(at, scroll = false) {
  state.head = at;
  drawGrid();
  drawTable();
  drawHead();
  document.dispatchEvent(new CustomEvent("head"));
  if (scroll) byId("head-title").focus();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  drawMap();
}

byId("theme").addEventListener("click", () => {
  chosenTheme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("foveate-theme", chosenTheme); } catch { /* a private window */ }
  setTheme(chosenTheme);
});
systemDark.addEventListener("change", () => setTheme(wantedTheme()));
byId("metric").append(...DATA.metrics.map((m) => element("option", m.title, { value: m.name })));
byId("metric").value = state.metric;
byId("metric").addEventListener("change", (event) => {
  Object.assign(state, { metric: event.target.value, sort: event.target.value, down: true });
  drawGrid();
  drawTable();
});
["from", "to", "least", "count"].forEach((id) => byId(id).addEventListener("input", drawTable));
buildGrid();
buildTable();
