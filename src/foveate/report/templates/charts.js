// Small multiples: one figure each, against the length of the prompt.
"use strict";

function valueAxis(chart, scale) {
  if (scale) return axis("", { type: "log", range: scale.range, tickvals: scale.tickvals, ticktext: scale.ticktext });
  return axis("", { rangemode: chart.axis === "zero" ? "tozero" : "normal", tickformat: chart.ticks, nticks: 5 });
}

function drawChart(box, chart) {
  const values = chart.lines.flatMap((line) => line.values).filter((y) => y !== null);
  if (!values.length) return noData(box, "Not measured yet.");
  const scale = chart.axis === "log" ? klScale(values) : null;
  const traces = chart.lines.map(({ values, texts }, i) => {
    const m = data.mechanisms[i];
    return {
      type: "scatter", mode: "lines+markers", connectgaps: true,
      x: data.lengths, y: scale ? values.map((y) => y === null ? y : Math.max(y, scale.floor)) : values,
      line: { color: colour(m), width: 1.5 },
      // Open symbols: those of lines that lie on each other show through.
      marker: { color: colour(m), symbol: `${m.symbol}-open`, size: 10, line: { width: 1.5 } },
      text: texts, hovertemplate: `<b>${plain(m.spec)}</b><br>%{x:,} tokens: %{text}<extra></extra>`,
    };
  });
  Plotly.react(box, traces, layout({
    height: 220, margin: { l: 52, r: 14, t: 8, b: 34 },
    xaxis: axis("", {
      type: "log", tickvals: data.lengths, ticktext: data.lengths.map((n) => n.toLocaleString("en")),
    }),
    yaxis: valueAxis(chart, scale),
  }), CONFIG);
}

function drawCharts() {
  document.querySelectorAll(".chart").forEach((box, i) => drawChart(box, data.charts[i]));
}
