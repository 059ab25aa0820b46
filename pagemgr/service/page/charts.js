// Curves over time, by uPlot. The server's points come first, then one for each poll.

const MOST_POINTS = 900;
const HIT_WINDOW = 60; // seconds
const SHORTEST = 60; // seconds that the time axis spans at least
// Bottom to top, with the name of their colour.
const CAUSES = {
  full: "full", pinned: "pinned", open_used: "open", tail_waste: "waste", cached: "cached", fenced: "fenced",
  free: "free", null: "null",
};

class Curves {
  // points: of the server, oldest first; causes: those that the pool tells bytes of
  constructor(points, causes) {
    const known = Object.keys(CAUSES).filter((cause) => causes.includes(cause));
    this.points = points;
    this.told = [...known, ...causes.filter((cause) => !known.includes(cause))];
    this.make();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.make(); this.draw(); });
    for (const [chart, parent] of [["ratios", "ratios"], ["causes", "causes"]]) {
      new ResizeObserver(() => this[chart].setSize(room(document.getElementById(parent)))).observe(document.getElementById(parent));
    }
  }

  make() {
    this.ratios?.destroy();
    this.causes?.destroy();
    this.ratios = plot("ratios", (value) => `${Math.round(100 * value)} %`, [0, 1], [
      line("utilisation", "used", percent), line("hit ratio", "hits", percent),
    ], []);
    const amounts = this.told.map((cause) => area(word(cause), CAUSES[cause] ?? "null", (index) => bytes(this.points[index]?.bytes[cause] ?? 0)));
    const bands = this.told.slice(1).map((_, i) => ({ series: [i + 2, i + 1] }));
    this.causes = plot("causes", bytes, null, amounts, bands);
  }

  add(point) {
    const last = this.points.at(-1);
    if (last && point.time - last.time < 0.9) this.points.pop();
    this.points.push(point);
    if (this.points.length > MOST_POINTS) this.points.shift();
    this.draw();
  }

  draw() {
    const times = this.points.map((point) => point.time);
    set(this.ratios, [times, this.points.map((point) => point.utilization), this.points.map((_, i) => this.hits(i))]);
    const running = times.map(() => 0);
    const stacked = this.told.map((cause) => this.points.map((point, i) => (running[i] += point.bytes[cause] ?? 0)));
    set(this.causes, [times, ...stacked]);
  }

  // Of the tokens asked for within the window before a point; null if none were.
  hits(index) {
    const now = this.points[index];
    let first = index;
    while (first > 0 && now.time - this.points[first - 1].time <= HIT_WINDOW) first -= 1;
    const asked = now.query_tokens - this.points[first].query_tokens;
    return asked > 0 ? (now.hit_tokens - this.points[first].hit_tokens) / asked : null;
  }
}

function set(chart, data) {
  chart.setData(data);
  if (chart.cursor.idx === null || chart.cursor.idx === undefined) chart.setLegend({ idx: data[0].length - 1 });
}

function plot(parent, tick, range, series, bands) {
  const font = "12px system-ui, sans-serif", host = document.getElementById(parent);
  const axis = { stroke: color("muted"), font, grid: { stroke: color("grid"), width: 1 }, ticks: { show: false } };
  const time = (_, splits) => splits.map((value) => clock(value).slice(0, value % 60 ? 8 : 5));
  return new uPlot({
    ...room(host),
    padding: [8, 28, 0, 0],
    cursor: { y: false, points: { size: 6 } },
    scales: {
      x: { range: (_, low, high) => [Math.min(low ?? 0, (high ?? 0) - SHORTEST), high ?? 0] },
      y: { range: (_, low, high) => range ?? [0, high || 1] },
    },
    axes: [
      { ...axis, values: time, space: 70, size: 28, gap: 4 },
      { ...axis, size: 68, values: (_, splits) => splits.map((value) => tick(value)), incrs: range ? undefined : powers() },
    ],
    series: [{ value: (_, value) => value === null ? "–" : clock(value), label: "time" }, ...series],
    bands,
    legend: { markers: { width: 0, fill: (_, index) => series[index - 1].stroke } },
  }, [[], ...series.map(() => [])], host);
}

function line(label, name, format) {
  return { label, stroke: color(name), width: 2, points: { show: false }, value: (_, value) => format(value) };
}

function area(label, name, amount) {
  const shade = color(name);
  return { label, stroke: shade, fill: shade, width: 0, points: { show: false }, value: (_, value, number, index) => index === null ? "–" : amount(index) };
}

// Steps of the axis in bytes: 1, 2, 4 … so that its figures are round in MiB.
function powers() { return Array.from({ length: 50 }, (_, power) => 2 ** power); }

function room(host) { return { width: Math.max(200, host.clientWidth), height: 196 }; }
