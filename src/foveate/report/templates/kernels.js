// The plots of the kernels page; tokens, axes and layout are those of plots.js.
"use strict";

// --- rates under their roofs ------------------------------------------------------------------

// What a machine can do at most at an arithmetic intensity, from the first to the last one drawn.
function roofLine(roof, [low, high], alone) {
  const ridge = roof.GEMM / roof.copy;
  const xs = [low, ...(ridge > low && ridge < high ? [ridge] : []), high];
  return {
    type: "scatter", mode: "lines", hoverinfo: "skip", x: xs,
    y: xs.map((x) => Math.min(roof.GEMM, roof.copy * x)),
    line: { color: token("--muted"), width: alone ? 1.5 : 2, dash: alone ? "dash" : "solid" },
  };
}

function roofLabel(roof, high) {
  const threads = roof.threads === 1 ? "1 thread" : `${roof.threads} threads`;
  return {
    x: Math.log10(high), y: Math.log10(roof.GEMM), xanchor: "right", yanchor: "bottom",
    text: `matrix product, ${threads}: ${Math.round(roof.GEMM)} GFLOP/s`, showarrow: false,
    font: { size: 12, color: token("--muted") },
  };
}

function drawRoofline() {
  const box = document.getElementById("roofline");
  if (!data.points.length) return noData(box, "Nothing has been measured yet.");
  const xs = data.points.map((p) => p.x);
  const span = [Math.min(...xs) / 2, Math.max(...xs) * 2];
  const most = Math.max(...data.roofs.map((roof) => roof.threads));
  const alone = (threads) => threads < most;
  const traces = data.roofs.map((roof) => roofLine(roof, span, alone(roof.threads)));
  for (const point of data.points) {
    const hollow = alone(point.threads);
    traces.push({
      type: "scatter", mode: "markers", x: [point.x], y: [point.y],
      marker: {
        symbol: point.symbol, size: 10, color: hollow ? token("--surface") : colour(point), opacity: 0.85,
        line: { color: hollow ? colour(point) : token("--surface"), width: hollow ? 2 : 1 },
      },
      hovertemplate: `<b>${plain(point.name)}</b><br>${point.hover.map(plain).join("<br>")}<extra></extra>`,
    });
  }
  const powers = { dtick: 1, exponentformat: "none", minor: { showgrid: false } };
  Plotly.react(box, traces, layout({
    height: 440, margin: { l: 66, r: 16, t: 16, b: 54 },
    xaxis: axis("Arithmetic intensity (FLOP per byte)", { type: "log", range: span.map(Math.log10), ...powers }),
    yaxis: axis("Rate (GFLOP/s)", { type: "log", ...powers }),
    annotations: data.roofs.map((roof) => roofLabel(roof, span[1])),
  }), CONFIG);
}

// --- bars with their goals --------------------------------------------------------------------

const BAR = 15; // height of a bar, in pixels
const GAP = 34; // between the groups of two lines: room for the label above the bars

// Every line is a label above its bars; y counts pixels from the top.
function placeBars(lines, key) {
  const bars = [], labels = [];
  let y = 0;
  for (const line of lines) {
    if (!line[key].length) continue;
    labels.push({ text: line.label, y: y + GAP / 2 + 3 });
    y += GAP;
    for (const bar of line[key]) {
      bars.push({ ...bar, label: line.label, y: y + BAR / 2 });
      y += BAR;
    }
  }
  return { bars, labels, height: y };
}

function barTrace(name, bars, number, base, show) {
  return {
    type: "bar", orientation: "h", name: plain(name), showlegend: true, base,
    x: bars.map((b) => b.median - base), y: bars.map((b) => b.y), width: BAR - 4,
    marker: { color: token(`--c${number}`), opacity: 0.75 },
    error_x: {
      type: "data", symmetric: false, array: bars.map((b) => b.max - b.median),
      arrayminus: bars.map((b) => b.median - b.min), color: token("--ink"), thickness: 1, width: 0,
    },
    text: bars.map((b) => show(b)), textposition: "none",
    hovertemplate: bars.map((b) => `<b>${plain(b.label)}</b><br>${plain(name)}: ${show(b)}<extra></extra>`),
  };
}

function goalTrace(bars, show) {
  const held = bars.filter((b) => b.goal !== null);
  return {
    type: "scatter", mode: "markers", name: "goal", showlegend: held.length > 0,
    x: held.map((b) => b.goal), y: held.map((b) => b.y),
    marker: { symbol: "line-ns", size: BAR - 2, color: token("--ink"), line: { color: token("--ink"), width: 2.5 } },
    hovertemplate: held.map((b) => `goal: ${show({ median: b.goal })}<extra></extra>`),
  };
}

function drawBars(id, key, { base, type, title, show, name, nothing }) {
  const box = document.getElementById(id);
  const { bars, labels, height } = placeBars(data.bars[currentBench()] || [], key);
  if (!bars.length) return noData(box, nothing);
  const names = [...new Set(bars.map((b) => b.name))];
  const traces = names.map((n, i) => barTrace(name(n), bars.filter((b) => b.name === n), 1 + i % 8, base, show));
  const ends = bars.flatMap((b) => [b.min, b.max, b.goal ?? b.median, 1]);
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const range = type === "log" ? [Math.log10(low) - 0.05, Math.log10(high) + 0.05] : [0, high * 1.03];
  const left = type === "log" ? range[0] : 0;
  Plotly.react(box, [...traces, goalTrace(bars, show)], layout({
    height: height + 108, margin: { l: 4, r: 12, t: 44, b: 54 }, barmode: "overlay", showlegend: true,
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", font: { size: 12 }, itemclick: false, itemdoubleclick: false },
    xaxis: axis(title, { type, range, ...(type === "log" ? { dtick: "D2", ticksuffix: "×" } : { tickformat: ".0%" }) }),
    yaxis: axis("", { range: [height + 4, 0], showticklabels: false, showgrid: false }),
    shapes: [{
      type: "line", layer: "below", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper",
      line: { color: token("--muted"), width: 1, dash: "dot" },
    }],
    annotations: labels.map((l) => ({
      x: left, y: l.y, text: plain(l.text), showarrow: false, xanchor: "left", yanchor: "middle",
      font: { size: 12, color: token("--ink") },
    })),
  }), CONFIG);
}

function currentBench() {
  return document.querySelector("input[name=bench]:checked")?.value;
}

function drawBench() {
  drawBars("ratios", "ratios", {
    base: 1, type: "log", title: "times as fast (log scale; 1 is as fast)", name: (n) => n,
    show: (b) => `${b.median.toFixed(2)}×`, nothing: "No rival has run in this bench.",
  });
  drawBars("shares", "shares", {
    base: 0, type: "linear", title: "share of the limit", name: (n) => data.limits[n],
    show: (b) => `${(100 * b.median).toFixed(1)} %`, nothing: "Nothing has been measured yet.",
  });
}

function drawAll() {
  drawRoofline();
  drawBench();
}

document.getElementById("bench").addEventListener("change", drawBench);
setTheme(wantedTheme());
