// The text: where a token looks, who looks at it, and what the whole pass makes of every token.
"use strict";
const KEPT = DATA.looks.kept;
const KEYS = new Uint16Array(bytes(DATA.looks.keys).buffer);
const WEIGHTS = bytes(DATA.looks.weights);
const LENGTH = DATA.tokens.length;
const reading = { overlay: "", at: 0 };
const spans = DATA.tokens.map((token, i) => {
  const span = element("span", token.replace(/\n/g, "⏎\n"), { role: "option", id: `token-${i}` });
  span.dataset.i = i;
  return span;
});

const looksOf = (overlay) => Number(overlay.slice(5));
const isLook = () => reading.overlay.startsWith("look ");

function outgoing(i) {
  const start = (looksOf(reading.overlay) * LENGTH + i) * KEPT;
  return [...Array(KEPT).keys()].map((n) => [KEYS[start + n], WEIGHTS[start + n] / 255]);
}

function incoming(i) {
  const start = looksOf(reading.overlay) * LENGTH * KEPT;
  const found = [];
  for (let n = 0; n < LENGTH * KEPT; n += 1) {
    if (KEYS[start + n] === i && WEIGHTS[start + n] > 2) {
      found.push([Math.floor(n / KEPT), WEIGHTS[start + n] / 255]);
    }
  }
  return found.sort((a, b) => b[1] - a[1]);
}

function under(i, share, against = false) {
  spans[i].style.borderBottomWidth = `${Math.round(7 * Math.min(Math.abs(share), 1))}px`;
  spans[i].classList.toggle("against", against);
}

function drawText() {
  spans.forEach((span, i) => {
    under(i, 0);
    span.classList.toggle("here", i === reading.at);
    span.setAttribute("aria-selected", i === reading.at);
  });
  byId("text").setAttribute("aria-activedescendant", `token-${reading.at}`);
  if (isLook()) {
    outgoing(reading.at).forEach(([j, weight]) => under(j, weight));
  } else {
    const { values } = DATA.overlays.find((o) => o.name === reading.overlay);
    const top = Math.max(...values.map(Math.abs), 1e-12);
    values.forEach((value, i) => under(i, Math.sqrt(Math.abs(value) / top), value < 0));
  }
  drawReading();
}

function list(title, pairs) {
  const items = document.createElement("ol");
  pairs.slice(0, 8).forEach(([i, weight]) => {
    const item = element("li");
    item.append(element("mark", word(i)), ` token ${i}, ${(100 * weight).toFixed(1)} %`);
    items.append(item);
  });
  const none = element("p", "none among the keys that were kept");
  return [element("h4", title), pairs.length ? items : none];
}

function drawReading() {
  const parts = [element("h3", `Token ${reading.at}: “${word(reading.at)}”`)];
  if (isLook()) {
    const come = incoming(reading.at);
    parts.push(...list("It looks at", outgoing(reading.at).filter(([, w]) => w > 0)));
    parts.push(...list(`It is looked at by${come.length > 8 ? ` ${come.length} tokens, most by` : ""}`, come));
  }
  DATA.overlays.forEach((o) => parts.push(element("p", `${o.title}: ${figure(o.values[reading.at])}`)));
  byId("reading").replaceChildren(...parts);
}

function goTo(i) {
  reading.at = Math.min(Math.max(i, 0), LENGTH - 1);
  drawText();
}

byId("text").append(...spans);
// Text that scrolls under a pointer at rest, as by the keyboard, is not pointed at.
let pointer = "";
byId("text").addEventListener("mouseover", (event) => {
  const place = `${event.clientX},${event.clientY}`;
  if (place === pointer) return;
  pointer = place;
  const span = event.target.closest("span");
  if (span) goTo(Number(span.dataset.i));
});
byId("text").addEventListener("click", (event) => {
  const span = event.target.closest("span");
  if (span) goTo(Number(span.dataset.i));
});
byId("text").addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -LENGTH, End: LENGTH };
  if (steps[event.key] === undefined) return;
  event.preventDefault();
  goTo(reading.at + steps[event.key]);
  spans[reading.at].scrollIntoView({ block: "nearest" });
});

// ---- what is shown in the text ----
function buildOverlays() {
  const select = byId("overlay");
  const whole = element("optgroup", null, { label: "Of the whole pass" });
  whole.append(...DATA.overlays.map((o) => element("option", o.title, { value: o.name })));
  const heads = element("optgroup", null, { label: "Where a head looks" });
  heads.append(...DATA.looks.heads.map((h, i) => element("option", `${nameOf(h)}: ${DATA.looks.why[i]}`, { value: `look ${i}` })));
  select.append(heads, whole);
  select.addEventListener("change", () => showOverlay(select.value));
  document.addEventListener("head", () => {
    const at = DATA.looks.heads.findIndex((h) => h.join() === state.head.join());
    if (at >= 0) {
      select.value = `look ${at}`;
      showOverlay(select.value);
    }
  });
}

function showOverlay(name) {
  reading.overlay = name;
  const overlay = DATA.overlays.find((o) => o.name === name);
  byId("overlay-what").textContent = overlay
    ? `${overlay.what} The thicker the bar under a token, the more; dotted is against.`
    : `Point at a token, or move with the arrow keys: a bar under another token says how much of it the head reads. The ${KEPT} largest weights of every token are kept.`;
  drawText();
}

// ---- layers ----
function chart(series) {
  const [w, h, left, foot] = [320, 130, 40, 18];
  const top = Math.max(...series.values, 1e-12);
  const scale = (v) => h - foot - (v / top) * (h - foot - 8);
  const x = (i) => left + (i * (w - left - 8)) / Math.max(series.values.length - 1, 1);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${series.title}: from ${figure(series.values[0])} to ${figure(series.values.at(-1))}, at most ${figure(top)}`);
  const add = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.entries(attributes).forEach(([k, v]) => made.setAttribute(k, v));
    if (text !== undefined) made.textContent = text;
    svg.append(made);
  };
  add("path", { class: "frame", d: `M${left} 6V${h - foot}H${w - 6}` });
  add("path", { d: series.values.map((v, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${scale(v).toFixed(1)}`).join("") });
  add("text", { x: left - 4, y: 14, "text-anchor": "end" }, figure(top));
  add("text", { x: left - 4, y: h - foot, "text-anchor": "end" }, "0");
  add("text", { x: left, y: h - 4 }, "layer 0");
  add("text", { x: w - 8, y: h - 4, "text-anchor": "end" }, `${series.values.length - 1}`);
  const box = element("div", null, { class: "chart" });
  box.append(element("h3", series.title), svg, element("small", series.what));
  return box;
}

function buildLayers() {
  byId("layers").append(...DATA.layers.map(chart));
  const head = element("tr");
  head.append(element("th", "Layer", { scope: "col", class: "name" }), ...DATA.layers.map((s) => element("th", s.title, { scope: "col" })));
  document.querySelector("#layer-table thead").append(head);
  const count = Math.max(...DATA.layers.map((s) => s.values.length));
  for (let i = 0; i < count; i += 1) {
    const row = element("tr");
    row.append(element("th", i, { scope: "row", class: "name" }), ...DATA.layers.map((s) => element("td", s.values[i] === undefined ? "—" : figure(s.values[i]))));
    document.querySelector("#layer-table tbody").append(row);
  }
}

buildOverlays();
buildLayers();
showOverlay(byId("overlay").value);
pickHead(state.head);
setTheme(wantedTheme());
