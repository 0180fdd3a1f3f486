// The plots and block maps: everything whose colours the page itself cannot restyle.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const NARROW = 480;
const GLYPH = 7.4; // width of one character of the plots' monospace labels, in pixels
const CONFIG = { displayModeBar: false, responsive: true };

function token(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Plotly reads a little HTML in labels; a spec is plain text.
function plain(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function colour(mechanism) {
  return token(`--c${mechanism.colour}`);
}

function axis(title, more) {
  return {
    title: { text: title, font: { size: 13, color: token("--muted") }, standoff: 12 },
    gridcolor: token("--line"), zeroline: false, linecolor: token("--line"),
    tickfont: { size: 12, color: token("--muted") }, fixedrange: true, ...more,
  };
}

function layout(more) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: token("--sans"), size: 13, color: token("--ink") }, hovermode: "closest",
    hoverlabel: {
      bgcolor: token("--surface"), bordercolor: token("--muted"), align: "left",
      font: { family: token("--sans"), size: 13, color: token("--ink") },
    },
    ...more,
  };
}

function hover(mechanism) {
  return [`<b>${plain(mechanism.spec)}</b>`, ...mechanism.hover.map(plain)].join("<br>");
}

function noData(box, text) {
  Plotly.purge(box);
  box.innerHTML = "";
  const note = document.createElement("p");
  note.className = "nothing";
  note.textContent = text;
  box.append(note);
}

// --- speed against fidelity -------------------------------------------------------------------

const TRADE_TITLES = {
  end_to_end: ["Speed-up over dense, end to end (×)", "KL to dense, the larger of both phases (nats)"],
  prefill: ["Prefill speed-up over dense (×)", "KL to dense in prefill (nats)"],
  decode: ["Decode speed-up over dense (×)", "KL to dense in decode (nats)"],
};

// A log axis has no zero: exact agreement sits on a floor of its own, half a decade below the rest.
function klScale(kls) {
  const positive = kls.filter((kl) => kl > 0);
  const low = positive.length ? Math.log10(Math.min(...positive)) : -4;
  const high = positive.length ? Math.log10(Math.max(...positive)) : -1;
  const floor = Math.floor(low * 2 - 0.5) / 2;
  const decades = [];
  for (let e = Math.ceil(floor + 0.3); e <= Math.ceil(high); e++) decades.push(e);
  return {
    floor: 10 ** floor,
    range: [floor - 0.18, Math.max(high + 0.3, floor + 1)],
    tickvals: [10 ** floor, ...decades.map((e) => 10 ** e)],
    ticktext: ["0", ...decades.map((e) => (e < -4 ? `1e−${-e}` : String(Number((10 ** e).toPrecision(1)))))],
  };
}

// Each label goes to the first free side of its point; where none is free, hovering must do.
function placeLabels(points, toPixels, width) {
  const taken = points.map((p) => {
    const [x, y] = toPixels(p);
    return [x - 8, y - 8, x + 8, y + 8];
  });
  const order = [...points].sort((a, b) => b.important - a.important);
  const labels = [];
  for (const point of order) {
    const [x, y] = toPixels(point);
    const wide = point.spec.length * GLYPH + 4;
    const sides = [
      [0, -17, "center"], [0, 17, "center"], [-6, -17, "left"], [-6, 17, "left"],
      [6, -17, "right"], [6, 17, "right"], [14, 0, "left"], [-14, 0, "right"],
    ];
    for (const [dx, dy, anchor] of sides) {
      const left = x + dx - { left: 0, center: wide / 2, right: wide }[anchor];
      const box = [left, y + dy - 8, left + wide, y + dy + 8];
      const free = box[0] > 0 && box[2] < width &&
        taken.every((t) => box[0] > t[2] || box[2] < t[0] || box[1] > t[3] || box[3] < t[1]);
      if (!free) continue;
      taken.push(box);
      labels.push({
        x: point.x, y: Math.log10(point.y), text: plain(point.spec), showarrow: false,
        xanchor: anchor, xshift: dx, yshift: -dy, bgcolor: `${token("--surface")}cc`, borderpad: 0,
        font: { family: token("--mono"), size: 12, color: token(point.important ? "--ink" : "--muted") },
      });
      break;
    }
  }
  return labels;
}

function drawTrade(view) {
  const box = document.getElementById("trade");
  const drawn = data.mechanisms.filter((m) => m.points[view]);
  if (!drawn.length) return noData(box, "No mechanism has been timed and judged in this phase yet.");
  const scale = klScale(drawn.map((m) => m.points[view].kl));
  const height = (point) => Math.max(point.kl, scale.floor);
  const front = data.fronts[view].map((i) => data.mechanisms[i]);
  const xs = drawn.flatMap((m) => [m.points[view].low, m.points[view].high, m.points[view].x]);
  const pad = Math.max((Math.max(...xs) - Math.min(...xs)) * 0.09, 0.05);
  const range = [Math.min(...xs) - pad, Math.max(...xs) + pad];
  const margin = { l: 66, r: 16, t: 16, b: 54 };
  const size = { width: box.clientWidth - margin.l - margin.r, height: 460 - margin.t - margin.b };

  const traces = [{
    type: "scatter", mode: "lines", hoverinfo: "skip",
    x: front.map((m) => m.points[view].x), y: front.map((m) => height(m.points[view])),
    line: { color: token("--muted"), width: 1.5 }, opacity: 0.7,
  }];
  for (const m of drawn) {
    const point = m.points[view];
    traces.push({
      type: "scatter", mode: "markers", x: [point.x], y: [height(point)],
      error_x: {
        type: "data", symmetric: false, array: [point.high - point.x],
        arrayminus: [point.x - point.low], color: colour(m), thickness: 1, width: 0,
      },
      marker: {
        color: colour(m), symbol: m.symbol, size: m.winner ? 15 : 11,
        line: { color: token("--surface"), width: 1.5 },
      },
      hovertemplate: `${hover(m)}<extra></extra>`,
    });
  }
  const points = drawn.map((m) => ({
    spec: m.spec, x: m.points[view].x, y: height(m.points[view]), important: Number(front.includes(m)),
  }));
  const toPixels = (p) => [
    (p.x - range[0]) / (range[1] - range[0]) * size.width,
    (scale.range[1] - Math.log10(p.y)) / (scale.range[1] - scale.range[0]) * size.height,
  ];
  const line = (more) => ({ type: "line", layer: "below", line: { color: token("--muted"), width: 1, dash: "dot" }, ...more });
  const [xTitle, yTitle] = TRADE_TITLES[view];
  Plotly.react(box, traces, layout({
    height: 460, margin,
    xaxis: axis(xTitle, { range, ticksuffix: "×" }),
    yaxis: axis(yTitle, { type: "log", range: scale.range, tickvals: scale.tickvals, ticktext: scale.ticktext }),
    shapes: [line({ x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper" })],
    annotations: placeLabels(points, toPixels, size.width),
  }), CONFIG);
}

// --- prefill time -----------------------------------------------------------------------------

function drawTimes() {
  const box = document.getElementById("times");
  const timed = data.mechanisms.filter((m) => m.seconds.length);
  if (!timed.length) return noData(box, "No prefill has been timed yet.");
  const narrow = box.clientWidth < NARROW;
  const rows = timed.map((m, i) => ({ ...m, row: -i }));
  const bars = rows.filter((m) => m.median !== null);
  const traces = [{
    type: "bar", orientation: "h", width: 0.52, hoverinfo: "skip",
    x: bars.map((m) => m.median), y: bars.map((m) => m.row),
    marker: { color: bars.map(colour), opacity: 0.32 },
  }];
  for (const m of rows) {
    traces.push({
      type: "scatter", mode: "markers", x: m.seconds, y: m.seconds.map(() => m.row),
      marker: { color: colour(m), size: 7, opacity: 0.9, line: { color: token("--surface"), width: 1 } },
      hovertemplate: `<b>${plain(m.spec)}</b><br>%{x:.3~g} s<extra></extra>`,
    });
  }
  const dense = bars.find((m) => m.spec === "dense");
  const room = Math.min(Math.max(...rows.map((m) => m.spec.length)) * GLYPH + 14, box.clientWidth * 0.42);
  const fits = Math.floor(((narrow ? box.clientWidth - 20 : room) - 10) / GLYPH);
  const names = rows.map((m) => plain(m.spec.length > fits ? `${m.spec.slice(0, fits - 1)}…` : m.spec));
  const label = { family: token("--mono"), size: 12, color: token("--ink") };
  Plotly.react(box, traces, layout({
    height: rows.length * (narrow ? 46 : 34) + 70, bargap: 0,
    margin: { l: narrow ? 8 : room, r: 12, t: 8, b: 50 },
    xaxis: axis("seconds", { rangemode: "tozero" }),
    yaxis: axis("", {
      tickvals: rows.map((m) => m.row), ticktext: narrow ? names.map(() => "") : names,
      tickfont: label, showgrid: false, range: [0.6 - rows.length - 0.1, narrow ? 0.85 : 0.6],
    }),
    shapes: dense ? [{
      type: "line", x0: dense.median, x1: dense.median, y0: 0, y1: 1, yref: "paper",
      line: { color: token("--muted"), width: 1, dash: "dash" },
    }] : [],
    annotations: !narrow ? [] : rows.map((m, i) => ({
      x: 0, y: m.row, text: names[i], showarrow: false, xanchor: "left", yshift: 19, font: label,
    })),
  }), CONFIG);
}

// --- block maps -------------------------------------------------------------------------------

function channels(name) {
  const hex = token(name).slice(1);
  return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function drawMap(canvas) {
  const [skipped, little, all] = ["--skipped", "--little", "--all"].map(channels);
  const image = new ImageData(canvas.width, canvas.height);
  [...canvas.dataset.cells].forEach((cell, i) => {
    if (cell === ".") return;  // not visible: stays transparent, the hatching shows through
    const level = parseInt(cell, 36);
    const share = level / 35;
    const pixel = level === 0 ? skipped : little.map((from, k) => from + (all[k] - from) * share);
    image.data.set([...pixel, 255], 4 * i);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function currentView() {
  return document.querySelector("input[name=view]:checked").value;
}

function drawAll() {
  drawTrade(currentView());
  drawTimes();
  drawCharts();
  document.querySelectorAll("canvas.map").forEach(drawMap);
}
