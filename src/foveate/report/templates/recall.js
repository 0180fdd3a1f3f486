// The plots of the recall page; tokens, axes and layout are those of plots.js.
"use strict";

function patternTrace(pattern, key) {
  const points = [...pattern.points].sort((a, b) => a[key] - b[key]);
  return {
    type: "scatter", mode: "lines+markers", name: plain(pattern.spec),
    x: points.map((p) => p[key]), y: points.map((p) => p.y),
    line: { color: colour(pattern), width: 1.5 },
    marker: {
      color: colour(pattern), symbol: pattern.symbol, size: 10,
      line: { color: token("--surface"), width: 1 },
    },
    error_y: {
      type: "data", symmetric: false, array: points.map((p) => p.high - p.y),
      arrayminus: points.map((p) => p.y - p.low), color: colour(pattern), thickness: 1, width: 0,
    },
    hovertemplate: points.map((p) =>
      `<b>${plain(pattern.spec)}</b><br>${p.hover.map(plain).join("<br>")}<extra></extra>`),
  };
}

function drawRecall(id, key, title) {
  const box = document.getElementById(id);
  if (!data.patterns.length) return noData(box, "No model is trained yet.");
  Plotly.react(box, data.patterns.map((pattern) => patternTrace(pattern, key)), layout({
    height: 420, margin: { l: 58, r: 14, t: 12, b: 54 },
    xaxis: axis(title, { type: "log", dtick: 1, tickformat: "~s", minor: { showgrid: false } }),
    yaxis: axis("Answers that are right", { range: [-0.02, 1.04], tickformat: ".0%" }),
    shapes: [{
      type: "line", layer: "below", x0: 0, x1: 1, xref: "paper", y0: data.chance, y1: data.chance,
      line: { color: token("--muted"), width: 1, dash: "dot" },
    }],
  }), CONFIG);
}

function drawAll() {
  drawRecall("by-state", "state", "State after a row (bytes)");
  drawRecall("by-parameters", "parameters", "Parameters");
}

setTheme(wantedTheme());
