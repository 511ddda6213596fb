"use strict";
// Draws the page from its data. Text from runs is only ever set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const agents = new Map(data.agents.map((agent) => [agent.name, agent]));
const tasks = new Map(data.tasks.map((task) => [task.name, task]));
const shown = { task: data.all, agents: new Set(agents.keys()), everyRun: false, setting: data.settings[0], time: false };
const timed = data.settings[0].rows.some((row) => row.seconds !== null && row.seconds !== undefined);
const FEW_RUNS = 20;
const STATES = ["failed", "unknown", "stopped", "running", "finished"]; // what needs attention comes first

// ---- small tools ----

function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "rect", "text", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function swatch(name) {
  const node = element("span", { class: "swatch", "data-dash": agents.get(name).dash });
  node.style.setProperty("--agent", colour(name));
  return node;
}

const colour = (name) => agents.get(name).colour ?? "var(--ink)";
const dash = (name) => ["none", "6 3", "2 3"][agents.get(name).dash];
// a spread as arguments, as in Math.max(...values), fails from some hundred thousand values on
const largest = (values, atLeast) => values.reduce((a, b) => Math.max(a, b), atLeast);
const smallest = (values, atMost) => values.reduce((a, b) => Math.min(a, b), atMost);
const isNumber = (value) => typeof value === "number";
const number = (value, digits) => (isNumber(value) ? value.toFixed(digits) : "–");
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const shortTask = (name) => name.replace(/^dm_control\//, "").replace(/-v\d+$/, "");
const compact = (step) => new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(step);

const shorten = (name) => (name.length > 14 ? `${name.slice(0, 13)}…` : name);

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 60) return `${seconds.toFixed(0)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

const inSeconds = (seconds) => `${Math.round(seconds).toLocaleString("en")} s`;

/** Digits after the point for scores up to `top`. */
const digitsFor = (top) => (top <= 2 ? 3 : top <= 20 ? 2 : top <= 200 ? 1 : 0);

function niceTicks(low, high, count) {
  const raw = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k++) ticks.push(+(k * step).toPrecision(12));
  return ticks;
}

/** Pixels for a drawing in a figure; a window that is being resized may have none for a moment. */
function innerWidthOf(figure) {
  const style = getComputedStyle(figure);
  return Math.max(200, figure.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight));
}

const visible = (name) => shown.agents.has(name);
const inSetting = () => (data.settings.length > 1 ? `, evaluated in ${shown.setting.name}` : "");
const shownTasks = () => (shown.task === data.all ? [...tasks.keys()] : [shown.task]);

// ---- tooltip ----

const tooltip = byId("tooltip");

function showTooltip(title, lines, x, y) {
  const rows = lines.map(([name, value, range]) =>
    element("div", {}, swatch(name), element("span", {}, name), element("span", {}, value, element("i", {}, range))));
  tooltip.replaceChildren(element("b", {}, title), ...rows);
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth - 8 ? x - width - 16 : x + 16;
  tooltip.style.left = `${Math.max(8, left)}px`;
  tooltip.style.top = `${Math.min(Math.max(8, y - height / 2), innerHeight - height - 8)}px`;
}

const hideTooltip = () => { tooltip.hidden = true; };

// ---- leaderboard ----

function drawLeaderboard() {
  const rows = shown.setting.rows.filter((row) => row.task === shown.task && visible(row.agent));
  const whole = shown.task === data.all;
  const task = tasks.get(shown.task);
  const scale = whole ? "normalised scores (0 to 1)" : task.unit;
  byId("leaderboard").querySelector(".hint").textContent =
    `${whole ? "All tasks" : shown.task}, ${scale}, at the end of the budget${inSetting()}; intervals are 95% stratified bootstrap.`;
  const body = byId("leaderboard").querySelector(".body");
  if (!rows.some((row) => isNumber(row.iqm))) {
    const why = whole && !data.tasks.some((task) => task.bounds)
      ? "No task's best return is known, so there is no average over tasks: choose a task."
      : "Nothing to rank yet: no run has reached the end of its budget here.";
    body.replaceChildren(element("p", { class: "empty" }, why));
    return;
  }
  const tops = rows.flatMap((row) => [row.iqm, row.iqm_high, row.mean]).filter(isNumber);
  const top = largest(tops, 1e-9);
  const digits = digitsFor(top);
  const success = rows.some((row) => isNumber(row.success_rate));
  const columns = [
    ["", "rank", (row, index) => [String(index + 1)]],
    ["Agent", "agent", (row) => [swatch(row.agent), guidedName(row.agent)]],
    ["IQM and interval", "plot", (row) => [intervalPlot(row, smallest(tops, 0), top)]],
    ["IQM", "number", (row) => [element("strong", {}, number(row.iqm, digits)), range(row, "iqm", digits)]],
    ["Mean ± std", "number", (row) => [`${number(row.mean, digits)} ± ${number(row.std, digits)}`]],
    ["Median", "number", (row) => [number(row.median, digits)]],
    ["Optimality gap", "number", (row) => [number(row.optimality_gap, 3), range(row, "optimality_gap", 3)]],
  ];
  if (data.baseline !== null)
    columns.push([`P(> ${data.baseline})`, "number", (row) => [number(row.p_improvement, 2), range(row, "p_improvement", 2)]]);
  if (success) columns.push(["Success", "number", (row) => [number(row.success_rate, 2)]]);
  if (rows.some((row) => isNumber(row.seconds))) columns.push(["Time per run", "number", timeCell]);
  columns.push(["Seeds", "wide", (row) => seedTags(row, whole)]);
  body.replaceChildren(makeTable(columns, rows));
}

function range(row, name, digits) {
  const low = row[`${name}_low`];
  return isNumber(low) ? element("span", { class: "range" }, `${number(low, digits)} – ${number(row[`${name}_high`], digits)}`) : null;
}

/** Seconds of a run; and what share of the baseline's it takes to be where that one ends. */
function timeCell(row) {
  if (!isNumber(row.seconds)) return ["–"];
  if (data.baseline === null || row.agent === data.baseline || row.time_share === null) return [inSeconds(row.seconds)];
  const high = row.time_share_high === "never" ? "∞" : number(row.time_share_high, 2);
  const share = row.time_share === "never" ? "never" : number(row.time_share, 2);
  const title = `Time until the first evaluation with at least ${data.baseline}'s final IQM, as a share of ${data.baseline}'s whole time`;
  const ends = row.time_share_low === null ? null : element("span", { class: "range" }, `${number(row.time_share_low, 2)} – ${high}`);
  return [inSeconds(row.seconds), element("span", { class: "range", title }, `to ${shorten(data.baseline)}'s IQM: ${share}`), ends];
}

/** An agent's name, with what guides it below and who trained that in a tooltip. */
function guidedName(agent) {
  const guidances = [...new Set(data.runs.filter((run) => run.agent === agent).map((run) => run.guidance))].filter((name) => name && name !== "none");
  if (!guidances.length) return element("span", {}, agent);
  const trained = guidances.map((name) => (name in data.guidance ? `${name}: ${data.guidance[name]}` : name)).join("\n");
  return element("span", { class: "guided", "data-guidance": `guided by ${guidances.join(", ")}`, title: trained }, agent);
}

function seedTags(row, whole) {
  const seeds = row.seeds_low === row.seeds_high ? `${row.seeds_low}` : `${row.seeds_low}–${row.seeds_high}`;
  const tags = [element("span", { class: "seeds" }, whole ? `${seeds} × ${plural(row.tasks, "task")}` : seeds)];
  if (row.tasks < row.tasks_expected)
    tags.push(element("span", { class: "tag bad" }, whole ? `${row.tasks} of ${row.tasks_expected} tasks` : "no score"));
  for (const [kind, style] of [["failed", "bad"], ["missing", "bad"], ["unfinished", "wait"], ["extra", "wait"]])
    if (row[kind]) tags.push(element("span", { class: `tag ${style}` }, `${row[kind]} ${kind}`));
  return tags;
}

function intervalPlot(row, low, high) {
  const width = 240, height = 22;
  const x = (value) => 6 + ((value - low) / (high - low || 1)) * (width - 12);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  svg.append(element("line", { class: "axis", x1: 6, x2: width - 6, y1: 11, y2: 11 }));
  if (!isNumber(row.iqm)) return svg;
  if (isNumber(row.iqm_low)) {
    const bar = { x: x(row.iqm_low), width: Math.max(2, x(row.iqm_high) - x(row.iqm_low)), y: 3, height: 16, rx: 3 };
    svg.append(element("rect", { ...bar, fill: colour(row.agent), opacity: 0.35 }));
  }
  svg.append(element("circle", { cx: x(row.iqm), cy: 11, r: 3.5, fill: colour(row.agent) }));
  return svg;
}

/** columns: [title, class, function of row and index that returns the cell's children]. */
function makeTable(columns, rows) {
  const header = columns.map(([title, kind]) => element("th", { class: kind, scope: "col" }, title));
  const body = rows.map((row, index) =>
    element("tr", {}, ...columns.map(([title, kind, cell]) => {
      const node = element("td", { class: kind }, ...cell(row, index).filter((child) => child !== null));
      if (title && kind !== "agent" && kind !== "plot") node.dataset.label = title;
      return node;
    })));
  return element("table", { class: "stack" }, element("thead", {}, element("tr", {}, ...header)), element("tbody", {}, ...body));
}

// ---- generalisation ----

function drawGeneralisation() {
  const section = byId("generalisation");
  const summary = data.generalisation;
  const rows = (summary?.rows ?? []).filter((row) => row.task === shown.task && visible(row.agent));
  section.hidden = !rows.length;
  if (!rows.length) return;
  const usual = data.settings[0].name;
  section.querySelector(".hint").textContent = summary.notes.join(". ");
  const digits = digitsFor(largest(rows.flatMap((row) => [row.usual, row.usual_high, row.others]).filter(isNumber), 1e-9));
  const cell = (row, name, places) => [element("strong", {}, number(row[name], places)), range(row, name, places)];
  const columns = [
    ["Agent", "agent", (row) => [swatch(row.agent), row.agent]],
    [usual, "number", (row) => cell(row, "usual", digits)],
    ["Mean of the others", "number", (row) => cell(row, "others", digits)],
    [`Share of ${usual}`, "number", (row) => cell(row, "share", 2)],
    ...summary.others.map((name) => [name, "number", (row) => [number(row[`in ${name}`], digits)]]),
    ["Seeds", "wide", (row) => seedTags(row, shown.task === data.all)],
  ];
  section.querySelector(".body").replaceChildren(makeTable(columns, rows));
}

// ---- curves ----

function drawCurves() {
  const body = byId("curves").querySelector(".body");
  const wanted = shown.task === data.all ? [data.all, ...tasks.keys()] : [shown.task];
  const drawable = wanted.filter((name) => shownCurves(name).some(([, curve]) => curve.steps.length || curve.seeds.length));
  body.classList.toggle("single", drawable.length === 1);
  const figures = drawable.map((name) => {
    const task = tasks.get(name);
    const title = element("h3", { title: name }, task ? shortTask(name) : "All tasks");
    const figure = element("figure", {}, title, element("div", { class: "unit" }, task ? task.unit : "normalised score (IQM over tasks and seeds)"));
    return [figure, name];
  });
  body.replaceChildren(...figures.map(([figure]) => figure));
  if (!figures.length) body.replaceChildren(element("p", { class: "empty" }, "No evaluation yet."));
  for (const [figure, name] of figures) figure.append(curvePlot(name, innerWidthOf(figure)));
}

/** Pairs of agent and curve; over time, the points whose time is known, with seconds in the place of env steps. */
function shownCurves(name) {
  const curves = Object.entries(shown.setting.curves[name] ?? {});
  if (!shown.time) return curves;
  const known = ({ seconds = [] }) => seconds.map((_, i) => i).filter((i) => isNumber(seconds[i]));
  const over = (curve, names) => Object.fromEntries(names.map((key) => [key, known(curve).map((i) => curve[key][i])]));
  const seed = (of) => ({ seed: of.seed, steps: over(of, ["seconds"]).seconds, values: over(of, ["values"]).values });
  return curves.map(([agent, curve]) => {
    const { seconds, ...rest } = over(curve, ["seconds", "iqm", "low", "high", "counts"]);
    return [agent, { ...rest, steps: seconds, seeds: curve.seeds.map(seed).filter(({ steps }) => steps.length) }];
  }).filter(([, curve]) => curve.steps.length);
}

function curvePlot(name, width) {
  const task = tasks.get(name);
  const curves = shownCurves(name).filter(([agent]) => visible(agent));
  const margin = { left: 40, right: 10, top: 8, bottom: 24 };
  const height = Math.round(Math.min(360, Math.max(200, width * 0.56)));
  const values = curves.flatMap(([, c]) => [...c.high, ...c.low, ...c.iqm, ...c.seeds.flatMap((s) => s.values)]).filter(isNumber);
  const bottom = smallest(values, 0), top = largest(values, task && task.unit === "success rate" ? 1 : 1e-9);
  const last = task || shown.time ? largest(curves.flatMap(([, c]) => c.steps), shown.time ? 1 : task.budget) : 1;
  const x = (step) => margin.left + (step / last) * (width - margin.left - margin.right);
  const y = (value) => height - margin.bottom - ((value - bottom) / (top - bottom)) * (height - margin.top - margin.bottom);
  const path = (steps, points) => steps.map((step, i) => `${i ? "L" : "M"}${x(step).toFixed(1)},${y(points[i]).toFixed(1)}`).join("");

  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "img", "aria-label": `Learning curves of ${name}` });
  for (const tick of niceTicks(bottom, top, 4)) {
    svg.append(element("line", { class: "axis", x1: margin.left, x2: width - margin.right, y1: y(tick), y2: y(tick) }));
    svg.append(element("text", { x: margin.left - 7, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
  }
  for (const tick of niceTicks(0, last, 4)) {
    const label = shown.time ? inSeconds(tick) : task ? compact(tick) : `${Math.round(tick * 100)}%`;
    svg.append(element("text", { x: x(tick), y: height - 6, "text-anchor": tick === last ? "end" : "middle" }, label));
  }
  for (const [agent, curve] of curves)
    for (const seed of curve.seeds)
      svg.append(element("path", { class: "thin", d: path(seed.steps, seed.values), stroke: colour(agent) }));
  for (const [agent, curve] of curves) {
    const known = curve.steps.map((_, i) => i).filter((i) => isNumber(curve.low[i]));
    const pick = (points, order) => order.map((i) => points[i]);
    if (known.length > 1) {
      const back = known.toReversed();
      const edges = path(pick(curve.steps, known), pick(curve.high, known)) + path(pick(curve.steps, back), pick(curve.low, back)).replace("M", "L");
      svg.append(element("path", { class: "band", d: `${edges}Z`, fill: colour(agent) }));
    }
    svg.append(element("path", { class: "bold", d: path(curve.steps, curve.iqm), stroke: colour(agent), "stroke-dasharray": dash(agent) }));
    if (curve.steps.length === 1)
      svg.append(element("circle", { cx: x(curve.steps[0]), cy: y(curve.iqm[0]), r: 4, fill: colour(agent) }));
  }

  const marks = element("g");
  svg.append(marks);
  const steps = [...new Set(curves.flatMap(([, c]) => c.steps))].sort((a, b) => a - b);
  const digits = digitsFor(top);
  let current = steps.length - 1;
  const read = (index) => {
    current = index;
    const step = steps[index];
    marks.replaceChildren(element("line", { class: "rule", x1: x(step), x2: x(step), y1: margin.top, y2: height - margin.bottom }));
    const lines = [];
    for (const [agent, c] of curves) {
      // agents are evaluated at the same steps, but not at the same times
      const at = shown.time ? c.steps.findLastIndex((moment) => moment <= step) : c.steps.indexOf(step);
      if (at < 0) continue;
      marks.append(element("circle", { class: "dot", cx: x(c.steps[at]), cy: y(c.iqm[at]), r: 4, fill: colour(agent) }));
      const range = isNumber(c.low[at]) ? `  ${number(c.low[at], digits)}–${number(c.high[at], digits)}` : "";
      const fewer = c.counts[at] < largest(c.counts, 0) ? `  ${plural(c.counts[at], task ? "seed" : "run")}` : "";
      lines.push([c.iqm[at], agent, range + fewer]);
    }
    lines.sort((a, b) => b[0] - a[0]);
    const box = svg.getBoundingClientRect();
    const title = shown.time ? `${inSeconds(step)} on one worker` : task ? `${step.toLocaleString("en")} env steps` : `${Math.round(step * 100)}% of the budget`;
    showTooltip(title, lines.map(([value, agent, text]) => [agent, number(value, digits), text]), box.left + x(step), box.top + height / 2);
  };
  const leave = () => { marks.replaceChildren(); hideTooltip(); };
  if (steps.length) {
    svg.addEventListener("pointermove", (event) => {
      const at = event.clientX - svg.getBoundingClientRect().left;
      read(steps.reduce((best, step, i) => (Math.abs(x(step) - at) < Math.abs(x(steps[best]) - at) ? i : best), 0));
    });
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      read(Math.min(steps.length - 1, Math.max(0, current + move)));
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
  }
  return svg;
}

// ---- every seed ----

function drawSeeds() {
  const body = byId("seeds").querySelector(".body");
  const wanted = shownTasks().filter((name) => shown.setting.dots.some(([task]) => task === name));
  body.classList.toggle("single", wanted.length === 1);
  const figures = wanted.map((name) => [element("figure", {}, element("h3", { title: name }, shortTask(name)), element("div", { class: "unit" }, tasks.get(name).unit)), name]);
  body.replaceChildren(...figures.map(([figure]) => figure));
  if (!figures.length) body.replaceChildren(element("p", { class: "empty" }, "No run has reached the end of its budget here yet."));
  for (const [figure, name] of figures) figure.append(seedPlot(name, innerWidthOf(figure)));
}

function seedPlot(name, width) {
  const rows = shown.setting.rows.filter((row) => row.task === name && visible(row.agent));
  const dots = shown.setting.dots.filter(([task, agent]) => task === name && visible(agent));
  const values = dots.map((dot) => dot[3]).filter(isNumber);
  const low = smallest(values, 0), high = largest(values, tasks.get(name).unit === "success rate" ? 1 : 1e-9);
  const gap = 26, label = Math.min(150, width * 0.36), height = rows.length * gap + 24;
  const x = (value) => label + ((value - low) / (high - low)) * (width - label - 10);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Final scores of every seed on ${name}` });
  for (const tick of niceTicks(low, high, 4)) {
    svg.append(element("line", { class: "axis", x1: x(tick), x2: x(tick), y1: 2, y2: height - 20 }));
    svg.append(element("text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, String(tick)));
  }
  rows.forEach((row, index) => {
    const y = index * gap + gap / 2;
    const room = Math.floor(label / 6.6);
    const text = row.agent.length > room ? `${row.agent.slice(0, room - 1)}…` : row.agent;
    svg.append(element("text", { class: "name", x: 0, y: y + 4 }, text));
    if (isNumber(row.iqm_low)) {
      const bar = { x: x(row.iqm_low), width: Math.max(1, x(row.iqm_high) - x(row.iqm_low)), y: y - 8, height: 16, rx: 3 };
      svg.append(element("rect", { ...bar, fill: colour(row.agent), opacity: 0.18 }));
    }
    if (isNumber(row.iqm))
      svg.append(element("line", { x1: x(row.iqm), x2: x(row.iqm), y1: y - 8, y2: y + 8, stroke: colour(row.agent), "stroke-width": 2 }));
    for (const [, agent, seed, score] of dots.filter((dot) => dot[1] === row.agent && isNumber(dot[3]))) {
      const dot = element("circle", { class: "dot", cx: x(score), cy: y, r: 4.5, fill: colour(agent) });
      dot.addEventListener("pointerenter", (event) =>
        showTooltip(`seed ${seed}`, [[agent, number(score, digitsFor(high)), ""]], event.clientX, event.clientY));
      dot.addEventListener("pointerleave", hideTooltip);
      svg.append(dot);
    }
  });
  return svg;
}

// ---- runs ----

function finalScore(run) {
  return shown.setting.dots.find(([task, agent, seed]) => task === run.task && agent === run.agent && seed === run.seed)?.[3];
}

function drawRuns() {
  const runs = data.runs.filter((run) => visible(run.agent) && (shown.task === data.all || run.task === shown.task));
  const place = (run) => Math.max(0, STATES.indexOf(run.state));
  runs.sort((a, b) => place(a) - place(b));
  const section = byId("runs");
  const counts = STATES.map((state) => [state, runs.filter((run) => run.state === state).length]).filter(([, count]) => count);
  section.querySelector(".hint").textContent = runs.length
    ? `${plural(runs.length, "run")}: ${counts.map(([state, count]) => `${count} ${state}`).join(", ")}.`
    : "No run to show.";
  const few = shown.everyRun || runs.length <= FEW_RUNS + 5 ? runs : runs.slice(0, FEW_RUNS);
  const table = makeTable([
    ["Agent", "agent", (run) => [swatch(run.agent), run.agent]],
    ["Task", "task wide", (run) => [shortTask(run.task)]],
    ["Seed", "number", (run) => [String(run.seed)]],
    ["State", "status", (run) => [element("span", { class: `state ${STATES.includes(run.state) ? run.state : ""}` }, run.state)]],
    ["Env steps", "number", (run) => [run.env_step.toLocaleString("en"), run.env_step < run.total_env_steps ? element("span", { class: "range" }, `of ${run.total_env_steps.toLocaleString("en")}`) : null]],
    ["Final score", "number", (run) => [number(finalScore(run), tasks.get(run.task).unit === "success rate" ? 2 : 1)]],
    ["Wall-clock", "number", (run) => [duration(run.wall_seconds)]],
    ["Guidance", "guidance", (run) => [element("span", { title: data.guidance[run.guidance] ?? "" }, run.guidance ?? "–")]],
    ["", "wide buttons", runButtons],
  ], few);
  const more = element("button", { type: "button" }, `Show all ${runs.length} runs`);
  more.addEventListener("click", () => { shown.everyRun = true; drawRuns(); });
  section.querySelector(".body").replaceChildren(...(runs.length ? [table] : []), ...(few.length < runs.length ? [more] : []));
}

function runButtons(run) {
  const settings = element("button", { type: "button", class: "small", "aria-expanded": "false" }, "Settings");
  settings.addEventListener("click", () => {
    const row = settings.closest("tr");
    const open = settings.getAttribute("aria-expanded") === "true";
    settings.setAttribute("aria-expanded", String(!open));
    if (open) row.nextElementSibling.remove();
    else row.after(element("tr", { class: "more" }, element("td", { class: "wide", colspan: row.children.length }, ...runDetails(run))));
  });
  if (!run.video) return [settings];
  if (run.video.link) {
    const link = element("a", { href: run.video.link, title: run.video.name }, "Video");
    return [settings, " ", link];
  }
  const play = element("button", { type: "button", class: "small", title: run.video.name }, "▶ Video");
  play.addEventListener("click", () => {
    const player = byId("player");
    player.querySelector("p").textContent = `${run.agent} on ${shortTask(run.task)}, seed ${run.seed}: ${run.video.name}`;
    player.querySelector("video").src = run.video.source;
    player.showModal();
  });
  return [settings, " ", play];
}

function runDetails(run) {
  const error = run.error ? element("p", { class: "error" }, run.error) : null;
  const entries = Object.entries({ ...agents.get(run.agent).settings, ...run.settings }).sort(([a], [b]) => (a < b ? -1 : 1));
  return [error, settingsList(entries)].filter((node) => node !== null);
}

function settingsList(entries) {
  return element("dl", { class: "settings" }, ...entries.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, typeof value === "string" ? value : JSON.stringify(value)))));
}

// ---- the rest ----

function drawDetails() {
  const cards = [];
  const notes = shown.setting.notes;
  if (notes.length)
    cards.push(element("div", { class: "card" }, element("h3", {}, "What to know about these numbers"), element("ul", {}, ...notes.map((note) => element("li", {}, note)))));
  const guided = Object.entries(data.guidance).map(([name, trained]) => {
    const named = [...agents.keys()].filter((agent) => data.runs.some((run) => run.agent === agent && run.guidance === name));
    return element("li", {}, element("b", {}, name), `: ${trained} (${named.join(", ")})`);
  });
  if (guided.length)
    cards.push(element("div", { class: "card" }, element("h3", {}, "Who trained what guides the agents"), element("ul", {}, ...guided)));
  data.environments.forEach((environment, index) => {
    const count = data.runs.filter((run) => run.environment === index).length;
    const hardware = Object.entries(environment.hardware ?? {});
    const versions = Object.entries(environment.versions ?? {});
    cards.push(element("div", { class: "card" }, element("h3", {}, `${plural(count, "run")} with commit ${String(environment.commit ?? "unknown").slice(0, 12)}`),
      settingsList([...hardware, ...versions])));
  });
  byId("details").querySelector(".body").replaceChildren(...cards);
}

function draw() {
  hideTooltip();
  drawLeaderboard();
  drawGeneralisation();
  drawCurves();
  drawSeeds();
  drawRuns();
  drawDetails();
}

function begin() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (theme) => { document.documentElement.dataset.theme = theme; };
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

  byId("title").textContent = data.title;
  const seeds = new Set(data.runs.map((run) => run.seed)).size;
  const seconds = data.runs.reduce((sum, run) => sum + (run.wall_seconds ?? 0), 0);
  const parts = [plural(agents.size, "agent"), plural(tasks.size, "task"), plural(seeds, "seed"), plural(data.runs.length, "run")];
  byId("summary").textContent = [...parts, `${duration(seconds)} of training`].join(" · ");

  const select = byId("task");
  select.append(element("option", { value: data.all }, "All tasks"), ...[...tasks.keys()].map((name) => element("option", { value: name }, name)));
  select.addEventListener("change", () => { shown.task = select.value; draw(); });
  const settings = byId("setting");
  settings.append(...data.settings.map(({ name }, index) => element("option", { value: index }, name)));
  settings.addEventListener("change", () => { shown.setting = data.settings[settings.value]; draw(); });
  settings.parentElement.hidden = data.settings.length < 2;
  const axis = byId("axis");
  axis.addEventListener("change", () => { shown.time = axis.value === "time"; draw(); });
  axis.parentElement.hidden = !timed;
  for (const name of agents.keys()) {
    const button = element("button", { type: "button", "aria-pressed": "true" }, swatch(name), name);
    button.addEventListener("click", () => {
      if (!shown.agents.delete(name)) shown.agents.add(name);
      button.setAttribute("aria-pressed", String(visible(name)));
      draw();
    });
    byId("agents").append(button);
  }
  byId("player").addEventListener("close", () => byId("player").querySelector("video").pause());
  draw();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  addEventListener("scroll", hideTooltip, { passive: true });
}

begin();
