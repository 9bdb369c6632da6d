"use strict";
// Charts that say their values where one points, legends that switch arms, tables that sort. Drawn by uPlot.
const GROUPS = JSON.parse(document.getElementById("data").textContent);
const DARK = matchMedia("screen and (prefers-color-scheme: dark)");
const HEIGHT = 300, ROWS = 12; // of a chart; of what is said where one points
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const make = (tag, parent, text = "", name = "") => {
  const node = parent.appendChild(document.createElement(tag));
  node.textContent = text;
  node.className = name;
  return node;
};

function shade(colour, opacity = 1) { // as it can be seen on the page's background
  const mix = v => Math.round(DARK.matches ? 0.6 * v + 102 : v);
  const parts = [1, 3, 5].map(i => mix(parseInt(colour.slice(i, i + 2), 16)));
  return `rgba(${parts.join(",")},${opacity})`;
}

function said(v) { // a number in words
  if (v == null) return "";
  const size = Math.abs(v);
  if (size >= 1e4) return v.toLocaleString("en", { maximumFractionDigits: 0 });
  return String(+v.toPrecision(5));
}

function logTicks(low, high) { // five or more of the roundest numbers: no part of the axis goes without one
  for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7], [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8]]) {
    const found = [];
    for (let k = -20; k < 21; k++) found.push(...steps.map(m => m * 10 ** k));
    const inside = found.filter(v => v >= low && v <= high);
    if (inside.length >= 5) return inside;
  }
  let step = 10 ** Math.floor(Math.log10((high - low) / 10));
  step *= [1, 2, 5, 10].find(m => (high - low) / (m * step) <= 10);
  const out = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) out.push(k * step);
  return out;
}

class Panel { // one chart of a group
  constructor(group, chart) {
    Object.assign(this, { group, chart, log: chart.log });
    this.box = make("div", group.panels, "", "panel");
    const head = make("h4", this.box, chart.title);
    if (chart.lines.every(l => l.y.every(v => v > 0))) {
      const button = make("button", head, "");
      const says = () => (button.textContent = this.log.includes("y") ? "linear y" : "log y");
      says();
      button.onclick = () => {
        this.log = this.log.includes("y") ? this.log.replace("y", "") : this.log + "y";
        says();
        this.draw();
      };
    }
    this.at = make("div", this.box);
    this.tip = make("div", this.box, "", "tip");
    this.tip.hidden = true;
    this.draw();
    new ResizeObserver(() => this.plot.setSize({ width: this.at.clientWidth, height: HEIGHT })).observe(this.at);
  }

  draw() {
    if (this.plot) this.plot.destroy();
    const { chart, log } = this, series = [{}], bands = [], tables = [];
    this.lines = [null]; // of each series
    for (const line of chart.lines) {
      const wide = line.low.length > 0, show = !this.group.off.has(line.label), stroke = shade(line.colour);
      tables.push(wide ? [line.x, line.y, line.low, line.high] : [line.x, line.y]);
      const dots = { show: line.dots, size: 6, stroke, fill: stroke };
      const dash = line.dash ? [6, 4] : undefined, paths = line.joined ? undefined : () => null;
      series.push({ show, stroke, width: line.width, dash, paths, points: dots, spanGaps: true });
      this.lines.push(line);
      if (wide) {
        for (let i = 0; i < 2; i++) {
          series.push({ show, stroke: "transparent", width: 0, points: { show: false }, spanGaps: true });
          this.lines.push({ label: line.label });
        }
        bands.push({ series: [series.length - 1, series.length - 2], fill: shade(line.colour, 0.16) });
      }
    }
    const axis = (name, label) => ({
      label, labelSize: 22, size: name === "y" ? 58 : 36, stroke: css("--faint"), labelFont: "12px sans-serif",
      font: "12px sans-serif", grid: { stroke: css("--line"), width: 1 }, ticks: { show: false },
      values: (u, found) => found.map(v => (Math.abs(v) >= 1e4 ? said(v / 1000) + "k" : said(v))),
      ...(log.includes(name) ? { splits: (u, i, low, high) => logTicks(low, high), filter: (u, found) => found } : {}),
    });
    const scale = (name, view) => ({
      time: false, distr: log.includes(name) ? 3 : 1,
      ...(view && !(log.includes(name) && view[0] <= 0) ? { range: () => view }
        : log.includes(name) ? { range: (u, low, high) => [low / 1.05, high * 1.05] } : {}),
    });
    this.plot = new uPlot({
      width: this.at.clientWidth, height: HEIGHT, series, bands, legend: { show: false },
      scales: { x: scale("x"), y: scale("y", chart.view) }, axes: [axis("x", chart.x), axis("y", chart.y)],
      cursor: { dataIdx: (u, s, i) => nearest(u, s, i), drag: { x: true, y: false }, y: false },
      hooks: { setCursor: [() => this.say()], draw: [u => this.mark(u)] },
    }, tables.length ? uPlot.join(tables) : [[]], this.at);
  }

  mark(u) { // levels across the chart
    for (const [y, label] of this.chart.marks) {
      const at = u.valToPos(y, "y", true), { left, top, width, height } = u.bbox;
      if (at < top || at > top + height) continue;
      u.ctx.save();
      Object.assign(u.ctx, { strokeStyle: css("--faint"), fillStyle: css("--faint"), textAlign: "left" });
      u.ctx.font = `${11 * devicePixelRatio}px sans-serif`;
      u.ctx.setLineDash([4, 4]);
      u.ctx.beginPath();
      u.ctx.moveTo(left, at);
      u.ctx.lineTo(left + width, at);
      u.ctx.stroke();
      u.ctx.fillText(label, left + 4, at - 4);
      u.ctx.restore();
    }
  }

  say() { // the values where one points
    const u = this.plot, { left, top, idxs } = u ? u.cursor : {};
    this.tip.hidden = !(left >= 0);
    if (this.tip.hidden) return;
    const rows = [];
    this.lines.forEach((line, s) => {
      const i = idxs[s];
      if (!line || !line.x || !u.series[s].show || i == null || u.data[s][i] == null) return;
      const x = u.data[0][i], y = u.data[s][i], note = line.notes[line.x.indexOf(x)];
      const range = s + 1 < this.lines.length && this.lines[s + 1] && !this.lines[s + 1].x
        ? ` [${said(u.data[s + 1][i])}, ${said(u.data[s + 2][i])}]` : "";
      const text = `${line.label}: ${said(y)}${range} at ${said(x)}${note ? ` (${note})` : ""}`;
      const far = Math.hypot(u.valToPos(y, "y") - top, u.valToPos(x, "x") - left);
      rows.push({ text, far, colour: line.colour });
    });
    rows.sort((a, b) => a.far - b.far);
    this.tip.textContent = "";
    for (const row of rows.slice(0, ROWS)) {
      const line = make("div", this.tip);
      make("span", line, "", "swatch").style.background = shade(row.colour);
      line.append(row.text);
    }
    if (rows.length > ROWS) make("div", this.tip, `and ${rows.length - ROWS} more`);
    const room = this.box.clientWidth - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(left + 70, room))}px`;
    this.tip.style.top = `${top + 50}px`;
  }

  toggle(label) {
    this.plot.batch(() => this.lines.forEach((line, s) => {
      if (line && line.label === label) this.plot.setSeries(s, { show: !this.group.off.has(label) });
    }));
  }
}

function nearest(u, series, i) { // the point of a line that is nearest to the place
  const ys = u.data[series], xs = u.data[0], at = u.posToVal(u.cursor.left, "x");
  if (!series) return i;
  let a = i, b = i;
  while (a >= 0 && ys[a] == null) a--;
  while (b < ys.length && ys[b] == null) b++;
  if (a < 0 || b >= ys.length) return a >= 0 ? a : b < ys.length ? b : null;
  return at - xs[a] <= xs[b] - at ? a : b;
}

const PANELS = [];
for (const figure of document.querySelectorAll(".charts")) {
  const { legend, charts } = GROUPS[figure.dataset.name];
  const group = { off: new Set(legend.filter(l => l.off).map(l => l.label)) };
  group.panels = figure.querySelector(".panels");
  const mine = charts.map(chart => new Panel(group, chart));
  PANELS.push(...mine);
  for (const { label, colour } of legend) {
    const button = make("button", figure.querySelector(".legend"));
    make("span", button, "", "swatch").style.setProperty("--c", colour);
    button.append(label);
    button.setAttribute("aria-pressed", String(!group.off.has(label)));
    button.onclick = () => {
      group.off.has(label) ? group.off.delete(label) : group.off.add(label);
      button.setAttribute("aria-pressed", String(!group.off.has(label)));
      mine.forEach(panel => panel.toggle(label));
    };
  }
}
DARK.addEventListener("change", () => PANELS.forEach(panel => panel.draw()));

function key(row, column) { // what a cell is sorted by: its first number, else its words; a dash last
  const text = row.cells[column].firstChild ? row.cells[column].innerText.split("\n")[0].trim() : "";
  const number = parseFloat(text.replace(/,/g, ""));
  return { number, text, none: text === "-" || text === "" };
}

for (const table of document.querySelectorAll("table.data")) {
  const body = table.tBodies[0], first = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.tabIndex = 0;
    head.onkeydown = e => e.key === "Enter" && head.click();
    head.onclick = () => {
      const was = head.getAttribute("aria-sort");
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      const now = { null: "ascending", ascending: "descending" }[was];
      const rows = first.map(row => [key(row, column), row]);
      const words = rows.some(([k]) => !k.none && isNaN(k.number)), sign = now === "descending" ? -1 : 1;
      if (now) {
        head.setAttribute("aria-sort", now);
        rows.sort(([a], [b]) => a.none - b.none || sign * (words ? a.text.localeCompare(b.text) : a.number - b.number));
      }
      body.append(...rows.map(([, row]) => row)); // a third click: as it was
    };
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(fold => { fold.open = true; }));
document.documentElement.dataset.ready = "yes";
