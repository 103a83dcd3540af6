// What a host had over time: a chart for each kind of figure, and the same as a table. A gap is time of which nothing is known.
import uPlot from "./vendor/uplot.js";

const REFRESH_MS = 60_000;
const ROWS = 24;
const HEIGHT = 180;

const section = document.getElementById("charts");
const said = JSON.parse(section.querySelector("script").textContent);
const drawn = document.getElementById("drawn");
const language = document.documentElement.lang;
const decimals = new Intl.NumberFormat(language, { maximumFractionDigits: 1 });
const short = {
  hour: new Intl.DateTimeFormat(language, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" }),
  day: new Intl.DateTimeFormat(language, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" }),
  month: new Intl.DateTimeFormat(language, { day: "numeric", month: "short" }),
};
const whole = new Intl.DateTimeFormat(language, { dateStyle: "short", timeStyle: "short", hourCycle: "h23" });
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

let span = "hour";
let plots = [];
let told = "";

const shown = (value) => (value == null ? said.unknown : decimals.format(value));

function column(line, figures) {
  const scale = line.scale ?? 1;
  return figures[line.figure].map((value, at) => {
    if (value === null) return null;
    return (value - (line.less ? figures[line.less][at] : 0)) / scale;
  });
}

function options(chart) {
  const muted = color("--pico-muted-color");
  const strokes = [color("--pico-primary"), color("--chart-second")];
  const axis = { stroke: muted, grid: { stroke: color("--pico-muted-border-color"), width: 1 }, ticks: { show: false } };
  return {
    width: widthOf(),
    height: HEIGHT,
    // From nought, so that a small change does not look like a great one.
    scales: { y: { range: (_, __, most) => [0, Math.max(1, most * 1.05)] } },
    axes: [
      { ...axis, values: (_, splits) => splits.map((at) => short[span].format(at * 1000)), space: 60 },
      { ...axis, values: (_, splits) => splits.map((value) => decimals.format(value)), size: 48 },
    ],
    series: [
      // Without a pointer on the chart the legend tells the newest figures.
      { label: said.time, value: (plot, at) => whole.format((at ?? plot.data[0].at(-1)) * 1000) },
      ...chart.lines.map((line, number) => ({
        label: line.label,
        stroke: line.limit ? muted : strokes[number],
        fill: line.limit || number ? undefined : `${strokes[0]}22`,
        dash: line.limit ? [6, 4] : undefined,
        width: line.limit ? 1 : 2,
        points: { show: false },
        value: (plot, value, which, at) => shown(at == null ? plot.data[which].at(-1) : value),
      })),
    ],
  };
}

function widthOf() {
  const first = drawn.firstElementChild;
  return first ? first.clientWidth : drawn.clientWidth;
}

function draw(series) {
  for (const plot of plots) plot.destroy();
  drawn.replaceChildren();
  plots = [];
  for (const chart of said.charts) {
    const lines = chart.lines.filter((line) => series.figures[line.figure].some((value) => value));
    if (!lines.length) continue;
    const figure = document.createElement("figure");
    figure.append(Object.assign(document.createElement("figcaption"), { textContent: chart.title }));
    drawn.append(figure);
    plots.push(new uPlot(options({ lines }), [series.times, ...lines.map((line) => column(line, series.figures))], figure));
  }
}

function cells(row, kind, texts) {
  row.replaceChildren(...texts.map((text) => Object.assign(document.createElement(kind), { textContent: text })));
  return row;
}

// The last known value of each part of the time, newest first: what a reader wants to hear, not 1,440 rows.
function tabulate(series) {
  const table = document.getElementById("figures");
  const columns = said.charts.flatMap((chart) => chart.lines.map((line) => [`${chart.title}: ${line.label}`, column(line, series.figures)]));
  table.tHead.replaceChildren(cells(document.createElement("tr"), "th", [said.time, ...columns.map(([label]) => label)]));
  for (const cell of table.tHead.querySelectorAll("th")) cell.scope = "col";
  const each = Math.max(1, Math.ceil(series.times.length / ROWS));
  const rows = [];
  for (let last = series.times.length - 1; last >= 0; last -= each) {
    rows.push(cells(document.createElement("tr"), "td", [whole.format(series.times[last] * 1000), ...columns.map(([, values]) => shown(values[last]))]));
  }
  table.tBodies[0].replaceChildren(...rows);
}

async function refresh() {
  const asked = span;
  let text;
  try {
    const response = await fetch(`${section.dataset.history}?span=${asked}`, { headers: { "X-Deskfleet-Unattended": "yes" } });
    if (!response.ok) throw new Error(response.statusText);
    text = await response.text();
  } catch {
    document.getElementById("offline").hidden = false;
    return;
  }
  document.getElementById("offline").hidden = true;
  if (asked !== span || text === told) return;
  told = text;
  const series = JSON.parse(text);
  document.getElementById("no-figures").hidden = series.figures.cpus.some((value) => value !== null);
  draw(series);
  tabulate(series);
}

section.addEventListener("click", (event) => {
  const button = event.target.closest("[data-span]");
  if (!button) return;
  span = button.dataset.span;
  for (const each of section.querySelectorAll("[data-span]")) each.setAttribute("aria-pressed", each === button);
  refresh();
});

new ResizeObserver(() => {
  for (const plot of plots) plot.setSize({ width: widthOf(), height: HEIGHT });
}).observe(drawn);

// The colours are the page's, and change with it.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (told) draw(JSON.parse(told));
});

setInterval(() => document.visibilityState === "visible" && refresh(), REFRESH_MS);
refresh();
