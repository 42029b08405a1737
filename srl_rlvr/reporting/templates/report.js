"use strict";
// Draws the curves and the rollout viewer from the JSON in #data. Texts of rollouts are untrusted: they reach the
// page through textContent only.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const { metrics, stages } = data;
  const { pieces, strings, groups } = data.rollouts;
  const svgNamespace = document.querySelector("svg").namespaceURI;
  const LOGPROB_SCALE = 1000;
  const SMOOTH_FROM = 12;

  const stageColor = (index) => `var(--stage-${index % 5})`;
  const STACK_COLORS = {
    scored: "var(--scored)", invalid: "var(--invalid)", failed: "var(--failed)",
    sample_s: "var(--part-0)", verify_s: "var(--part-1)", update_s: "var(--part-2)", handover_s: "var(--part-3)",
  };

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "text") node.textContent = value;
      else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }
  function draw(tag, attributes, parent) {
    const node = document.createElementNS(svgNamespace, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    parent.append(node);
    return node;
  }

  // Numbers as people read them.
  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 10000) return Math.round(value).toLocaleString("en");
    if (size >= 100) return value.toFixed(0);
    if (size !== 0 && size < 0.001) return value.toExponential(1).replace(".0", "").replaceAll("-", "−");
    return String(+value.toPrecision(3)).replace("-", "−");
  }
  const written = {
    number,
    count: number,
    percent: (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`),
    seconds: (value) => (value === null || value === undefined ? "–" : `${number(value)} s`),
  };
  const clock = (seconds) => {
    if (seconds < 60) return `${Math.round(seconds)} s`;
    const minutes = Math.round(seconds / 60);
    return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  };
  const signed = (value) => (value > 0 ? "+" : "") + value.toFixed(2).replace("-", "−");

  // Steps that have rollouts, in the order of the run.
  const steps = [];
  const stepAt = new Map();
  for (const group of groups) {
    const key = `${group.stage}:${group.step}`;
    if (!stepAt.has(key)) stepAt.set(key, steps.push({ stage: group.stage, step: group.step, groups: [], row: -1 }) - 1);
    steps[stepAt.get(key)].groups.push(group);
  }
  steps.sort((a, b) => a.stage - b.stage || a.step - b.step);
  stepAt.clear();
  steps.forEach((step, index) => stepAt.set(`${step.stage}:${step.step}`, index));
  metrics.stage.forEach((stage, row) => {
    const index = stepAt.get(`${stage}:${metrics.step[row]}`);
    if (index !== undefined) steps[index].row = row;
  });

  // ---------------------------------------------------------------- curves
  const HEIGHT = 150;
  const MARGIN = { left: 50, right: 10, top: 8, bottom: 22 };
  let axis = "time";
  let selectedRow = -1;
  const charts = [];

  const abscissa = (row) => (axis === "time" ? metrics.seconds[row] : metrics.update[row]);

  function bands() {
    const found = [];
    metrics.stage.forEach((stage, row) => {
      const last = found[found.length - 1];
      if (last && last.stage === stage) last.to = abscissa(row);
      else found.push({ stage, from: abscissa(row), to: abscissa(row) });
    });
    for (let i = 1; i < found.length; i++) {
      found[i].from = found[i - 1].to = (found[i - 1].to + found[i].from) / 2;
    }
    if (found.length) found[0].from = axis === "time" ? 0 : metrics.update[0];
    return found;
  }

  function ticks(low, high, count) {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough) * power;
    const found = [];
    for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) {
      found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
    }
    return found;
  }
  function timeTicks(high, count) {
    const unit = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400]
      .find((seconds) => high / seconds <= count) || 86400 * Math.ceil(high / 86400 / count);
    return Array.from({ length: Math.floor(high / unit) + 1 }, (_, i) => i * unit);
  }

  function smooth(values) {
    // Centered mean over about a tenth of the stage, narrower at its ends, so that it neither lags nor bends.
    const reach = Math.max(1, Math.round(values.length / 20));
    return values.map((_, i) => {
      const half = Math.min(reach, i, values.length - 1 - i);
      const near = values.slice(i - half, i + half + 1);
      return near.reduce((sum, value) => sum + value, 0) / near.length;
    });
  }

  class Plot {
    constructor(spec) {
      this.spec = spec;
      this.columns = spec.columns.filter((name) => metrics.columns[name]);
      this.value = make("output", { class: "value" });
      this.svg = document.createElementNS(svgNamespace, "svg");
      this.svg.setAttribute("role", "img");
      this.svg.setAttribute("aria-label", `${spec.title}: ${this.summary()}`);
      const title = make("header", {}, make("h3", { text: spec.title }), this.value);
      this.element = make("div", { class: "chart" }, title, make("p", { class: "hint", text: spec.hint }));
      if (spec.labels.length) this.element.append(this.names());
      this.element.append(this.svg);
      this.svg.addEventListener("pointermove", (event) => hover(this.rowNear(event)));
      this.svg.addEventListener("pointerleave", () => hover(-1));
      this.svg.addEventListener("click", (event) => selectRow(this.rowNear(event)));
    }
    column(name) { return metrics.columns[name] || []; }
    label(name) { return this.spec.labels[this.spec.columns.indexOf(name)] || ""; }
    rows() {
      return metrics.stage.map((_, row) => row).filter((row) => this.columns.some((name) => this.column(name)[row] !== null));
    }
    summary() {
      const rows = this.rows();
      const write = (row) => this.columns.map((name) => `${this.label(name)} ${written[this.spec.unit](this.column(name)[row])}`.trim()).join(", ");
      return rows.length ? `${write(rows[0])} at first, ${write(rows[rows.length - 1])} at last` : "no values";
    }
    names() {
      const list = make("p", { class: "names" });
      for (const name of this.columns) {
        const mark = make("i");
        mark.style.background = STACK_COLORS[name] || "var(--dim)";
        if (this.spec.kind === "line") mark.style.opacity = name === this.columns[0] ? 1 : 0.5;
        list.append(make("span", {}, mark, this.label(name)));
      }
      return list;
    }
    range(rows) {
      let low = Infinity;
      let high = -Infinity;
      for (const row of rows) {
        const values = this.columns.map((name) => this.column(name)[row]).filter((value) => value !== null);
        if (this.spec.kind === "stack") {
          low = 0;
          high = Math.max(high, values.reduce((sum, value) => sum + value, 0));
        } else {
          low = Math.min(low, ...values);
          high = Math.max(high, ...values);
          const spread = this.column(this.spec.spread)[row];
          if (spread) [low, high] = [Math.min(low, values[0] - spread), Math.max(high, values[0] + spread)];
        }
      }
      if (this.spec.unit === "percent" || (low > 0 && low < 0.6 * high)) low = Math.min(low, 0);
      if (low === high) high = low + (Math.abs(low) || 1);
      return [low, high + 0.04 * (high - low)];
    }
    render() {
      const width = this.svg.clientWidth || 340;
      this.svg.replaceChildren();
      this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      const rows = this.rows();
      const stageBands = bands();
      const end = stageBands.length ? stageBands[stageBands.length - 1].to : 1;
      const start = stageBands.length ? stageBands[0].from : 0;
      const [low, high] = this.range(rows);
      this.x = (value) => MARGIN.left + ((value - start) / (end - start || 1)) * (width - MARGIN.left - MARGIN.right);
      this.y = (value) => HEIGHT - MARGIN.bottom - ((value - low) / (high - low)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
      this.renderFrame(width, stageBands, start, end, low, high);
      for (const band of stageBands) {
        const own = rows.filter((row) => metrics.stage[row] === band.stage && abscissa(row) >= band.from && abscissa(row) <= band.to);
        if (this.spec.kind === "stack") this.renderStack(own);
        else this.columns.forEach((name, index) => this.renderLine(name, index, own, band.stage));
      }
      this.mark = draw("line", { class: "selected", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }, this.svg);
      this.cross = draw("line", { class: "cross", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" }, this.svg);
      this.showSelected();
      this.showHover(-1);
    }
    renderFrame(width, stageBands, start, end, low, high) {
      const bottom = HEIGHT - MARGIN.bottom;
      for (const band of stageBands) {
        const from = this.x(band.from);
        draw("rect", { class: "band", x: from, y: MARGIN.top, width: Math.max(0, this.x(band.to) - from), height: bottom - MARGIN.top, fill: stageColor(band.stage) }, this.svg);
        if (band !== stageBands[0]) draw("line", { class: "cut", x1: from, x2: from, y1: MARGIN.top, y2: bottom }, this.svg);
      }
      for (const value of ticks(low, high, 3)) {
        draw("line", { class: "gridline", x1: MARGIN.left, x2: width - MARGIN.right, y1: this.y(value), y2: this.y(value) }, this.svg);
        const text = this.spec.unit === "percent" ? `${Math.round(100 * value)} %` : number(value);
        draw("text", { x: MARGIN.left - 6, y: this.y(value) + 4, "text-anchor": "end" }, this.svg).textContent = text;
      }
      const marks = axis === "time" ? timeTicks(end, width / 75) : ticks(start, end, width / 75).filter(Number.isInteger);
      for (const value of marks) {
        const text = axis === "time" ? (value ? clock(value) : "0") : value;
        draw("text", { x: this.x(value), y: HEIGHT - 6, "text-anchor": value === start ? "start" : this.x(value) > width - 30 ? "end" : "middle" }, this.svg).textContent = text;
      }
    }
    path(points, attributes) {
      const text = points.map(([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("");
      return draw("path", { d: text, ...attributes }, this.svg);
    }
    renderLine(name, index, rows, stage) {
      const own = rows.filter((row) => this.column(name)[row] !== null);
      if (!own.length) return;
      const color = stageColor(stage);
      const values = own.map((row) => this.column(name)[row]);
      const points = own.map((row, i) => [abscissa(row), values[i]]);
      const spread = metrics.columns[this.spec.spread];
      if (spread && index === 0) {
        const upper = own.map((row, i) => [abscissa(row), values[i] + (spread[row] || 0)]);
        const lower = own.map((row, i) => [abscissa(row), values[i] - (spread[row] || 0)]);
        this.path([...upper, ...lower.reverse()], { class: "spread", style: `fill:${color}` });
      }
      if (own.length === 1) {
        draw("circle", { cx: this.x(points[0][0]), cy: this.y(points[0][1]), r: 2.5, fill: color }, this.svg);
      }
      const bold = own.length >= SMOOTH_FROM && index === 0;
      this.path(points, { class: index ? "second" : "", style: `stroke:${color};opacity:${bold ? 0.38 : index ? 0.6 : 1}` });
      if (bold) this.path(smooth(values).map((value, i) => [points[i][0], value]), { class: "bold", style: `stroke:${color}` });
    }
    renderStack(rows) {
      if (!rows.length) return;
      let floor = rows.map(() => 0);
      // A single update has no width of its own: give it a sliver.
      const xs = rows.length > 1 ? rows.map(abscissa) : [abscissa(rows[0]) * 0.99, abscissa(rows[0])];
      for (const name of this.columns) {
        const top = rows.map((row, i) => floor[i] + (this.column(name)[row] || 0));
        const at = (values) => xs.map((x, i) => [x, values[Math.min(i, values.length - 1)]]);
        this.path([...at(top), ...at(floor).reverse()], { class: "area", style: `fill:${STACK_COLORS[name] || "var(--base)"}` });
        floor = top;
      }
    }
    rowNear(event) {
      const box = this.svg.getBoundingClientRect();
      const position = event.clientX - box.left;
      let nearest = -1;
      let distance = Infinity;
      for (let row = 0; row < metrics.stage.length; row++) {
        const away = Math.abs(this.x(abscissa(row)) - position);
        if (away < distance) [nearest, distance] = [row, away];
      }
      return nearest;
    }
    showSelected() {
      this.mark.setAttribute("visibility", selectedRow < 0 ? "hidden" : "visible");
      if (selectedRow >= 0) place(this.mark, this.x(abscissa(selectedRow)));
    }
    showHover(row) {
      this.cross.setAttribute("visibility", row < 0 ? "hidden" : "visible");
      if (row >= 0) place(this.cross, this.x(abscissa(row)));
      const shown = row >= 0 ? row : selectedRow;
      this.value.textContent = shown < 0 ? "" : this.columns
        .map((name) => written[this.spec.unit](this.column(name)[shown]))
        .join(this.spec.labels[1] === "drawn" ? " of " : " · ");
    }
  }
  const place = (line, x) => { line.setAttribute("x1", x); line.setAttribute("x2", x); };

  function hover(row) {
    for (const chart of charts) chart.showHover(row);
    const legend = byId("hovered");
    if (legend) legend.textContent = row < 0 ? "" : `${stages[metrics.stage[row]]}, step ${metrics.step[row] + 1}, after ${clock(metrics.seconds[row])}`;
  }
  function drawCharts() { for (const chart of charts) chart.render(); }

  // ---------------------------------------------------------------- rollouts
  let current = 0;
  let currentGroup = 0;
  let colorBy = "advantage";

  function selectRow(row) {
    if (row < 0) return;
    selectedRow = row;
    if (!steps.length) { for (const chart of charts) { chart.showSelected(); chart.showHover(-1); } return; }
    const wanted = metrics.stage[row];
    let best = -1;
    steps.forEach((step, index) => {
      const away = Math.abs(step.stage - wanted) * 1e9 + Math.abs(step.step - metrics.step[row]);
      if (best < 0 || away < best.away) best = { index, away };
    });
    select(best.index, 0);
  }

  function select(index, group) {
    current = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[current];
    currentGroup = Math.max(0, Math.min(step.groups.length - 1, group));
    selectedRow = step.row;
    byId("viewer").style.setProperty("--stage", stageColor(step.stage));
    byId("scrubber").value = current;
    byId("scrubber").setAttribute("aria-valuetext", `${stages[step.stage]}, step ${step.step + 1}`);
    const planned = data.steps_planned[stages[step.stage]];
    byId("where").textContent = `${stages[step.stage]} · step ${step.step + 1}${planned ? ` of ${planned}` : ""}`;
    byId("previous").disabled = current === 0;
    byId("next").disabled = current === steps.length - 1;
    for (const tab of byId("stage-tabs").children) tab.setAttribute("aria-pressed", String(+tab.dataset.stage === step.stage));
    showStepMetrics(step);
    showGroups(step);
    showGroup(step.groups[currentGroup]);
    for (const chart of charts) { chart.showSelected(); chart.showHover(-1); }
    try { history.replaceState(null, "", `#${encodeURIComponent(stages[step.stage])}:${step.step}:${currentGroup}`); } catch (_) { /* some viewers forbid it */ }
  }

  function showStepMetrics(step) {
    const list = byId("step-metrics");
    list.replaceChildren();
    if (step.row < 0) return;
    for (const chart of charts) {
      const name = chart.columns[0];
      const value = chart.column(name)[step.row];
      if (chart.spec.kind === "stack" || value === null || list.children.length === 6) continue;
      list.append(make("div", {}, make("dt", { text: chart.spec.title }), make("dd", { text: written[chart.spec.unit](value) })));
    }
  }

  const scale = new Map(); // largest |advantage| of each stage
  for (const group of groups) {
    for (const sample of group.samples) {
      scale.set(group.stage, Math.max(scale.get(group.stage) || 1e-9, Math.abs(sample.advantage || 0)));
    }
  }
  function advantageColor(advantage, stage, strength = 0.62) {
    if (!advantage) return "transparent";
    const alpha = (0.1 + 0.9 * Math.min(1, Math.abs(advantage) / scale.get(stage))) * strength;
    return `rgba(var(${advantage > 0 ? "--good" : "--bad"}), ${alpha.toFixed(3)})`;
  }

  function showGroups(step) {
    const list = byId("groups");
    list.replaceChildren();
    step.groups.forEach((group, index) => {
      const judged = group.samples.filter((sample) => strings[sample.outcome] !== "failed" && sample.reward !== null);
      const mean = judged.reduce((sum, sample) => sum + sample.reward, 0) / (judged.length || 1);
      const dots = make("span", { class: "dots", "aria-hidden": "true" });
      for (const sample of group.samples) {
        const dot = make("i");
        dot.style.background = advantageColor(sample.advantage, group.stage, 1);
        dots.append(dot);
      }
      const lines = strings[group.prompt].split("\n").filter((line) => line.trim());
      const snippet = lines.filter((line) => !line.startsWith("<|")).pop() || lines.pop() || "(empty prompt)";
      const row = make("span", { class: "row" }, dots, make("span", { text: `reward ${judged.length ? number(mean) : "–"}` }));
      const button = make("button", { type: "button", "aria-current": String(index === currentGroup) }, make("span", { class: "snippet", text: snippet }), row);
      button.addEventListener("click", () => { select(current, index); byId("groups").children[index].firstChild.focus({ preventScroll: true }); });
      list.append(make("li", {}, button));
    });
    list.scrollLeft = list.children[currentGroup].offsetLeft - list.offsetLeft - 40; // a row on a phone
  }

  function showGroup(group) {
    byId("prompt-id").textContent = group.id;
    byId("prompt").textContent = strings[group.prompt];
    byId("reference").textContent = strings[group.reference];
    byId("samples-title").textContent = `${group.samples.length} samples`;
    const largest = scale.get(group.stage) || 0;
    byId("key").className = colorBy === "advantage" ? "key" : "key surprise";
    byId("key-low").textContent = colorBy === "advantage" ? `advantage ${signed(-largest)}` : "expected";
    byId("key-high").textContent = colorBy === "advantage" ? signed(largest) : "surprising (probability 1 %)";
    byId("samples").replaceChildren(...group.samples.map((sample) => sampleCard(sample, group.stage)));
  }

  function sampleCard(sample, stage) {
    const outcome = strings[sample.outcome];
    const known = sample.logprobs.filter((value) => value !== null);
    const mean = known.reduce((sum, value) => sum + value, 0) / (known.length || 1) / LOGPROB_SCALE;
    const head = make("div", { class: "head" });
    head.append(
      make("b", { class: "reward", text: `reward ${outcome === "failed" ? "–" : number(sample.reward)}` }),
      make("span", { text: sample.advantage === null ? "no advantage" : `advantage ${signed(sample.advantage)}` }),
      make("span", { class: `badge ${["scored", "invalid", "failed"].includes(outcome) ? outcome : ""}`, text: outcome }),
      make("span", { text: `${sample.tokens.length} tokens, ${strings[sample.finish] === "length" ? "cut off at the limit" : `finish: ${strings[sample.finish]}`}` }),
      make("span", { text: `mean log-probability ${number(mean)}` }),
    );
    const tokens = make("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": `Tokens of sample ${sample.i}` });
    sample.tokens.forEach((id, index) => tokens.append(token(pieces[id], sample.logprobs[index], sample.advantage, stage)));
    const tail = make("div", { class: "tail" });
    for (const [name, value] of parts(strings[sample.components])) tail.append(make("span", { text: `${name} ${value}` }));
    if (strings[sample.detail]) tail.append(make("span", { text: strings[sample.detail] }));
    const card = make("li", { class: "sample" }, head, tokens);
    if (tail.children.length) card.append(tail);
    card.style.setProperty("--edge", advantageColor(sample.advantage, stage, 1));
    return card;
  }

  function parts(text) {
    try {
      return Object.entries(JSON.parse(text || "{}")).map(([name, value]) => [name, typeof value === "number" ? number(value) : JSON.stringify(value)]);
    } catch (_) {
      return [["components", text]];
    }
  }

  function token(piece, logprob, advantage, stage) {
    const span = make("span");
    if (piece.includes("\n")) {
      piece.split("\n").forEach((line, index) => {
        if (index) span.append(make("i", { class: "break", text: "⏎" }), "\n");
        span.append(line);
      });
    } else span.textContent = piece;
    const surprise = logprob === null ? 1 : Math.min(1, -logprob / LOGPROB_SCALE / Math.log(100));
    span.style.background = colorBy === "advantage" ? advantageColor(advantage, stage) : `rgba(var(--surprise), ${(0.62 * surprise).toFixed(3)})`;
    span.facts = { piece, logprob, advantage };
    return span;
  }

  // ---------------------------------------------------------------- tooltip
  const tip = byId("tip");
  function showTip(span) {
    for (const other of document.querySelectorAll(".tokens .active")) other.classList.remove("active");
    if (!span) { tip.hidden = true; return; }
    const { piece, logprob, advantage } = span.facts;
    const p = logprob === null ? null : logprob / LOGPROB_SCALE;
    tip.replaceChildren(
      make("div", { text: JSON.stringify(piece) }),
      make("div", { text: p === null ? "log-probability −∞" : `log-probability ${p.toFixed(3).replace("-", "−")} (${(100 * Math.exp(p)).toPrecision(3)} %)` }),
      make("div", { text: advantage === null ? "no advantage" : `advantage ${signed(advantage)}` }),
    );
    span.classList.add("active");
    tip.hidden = false;
    const box = span.getClientRects()[0] || span.getBoundingClientRect();
    const left = Math.max(8, Math.min(window.innerWidth - tip.offsetWidth - 8, box.left));
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : box.bottom + 6}px`;
  }
  const tokenOf = (target) => (target instanceof Element ? target.closest(".tokens > span") : null);
  byId("samples").addEventListener("pointerover", (event) => showTip(tokenOf(event.target)));
  byId("samples").addEventListener("pointerleave", () => showTip(null));
  byId("samples").addEventListener("focusout", () => showTip(null));
  window.addEventListener("scroll", () => { if (!tip.hidden && !document.activeElement.matches(".tokens")) showTip(null); }, { passive: true });

  // ---------------------------------------------------------------- keys
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const { target, key } = event;
    if (key === "Escape") { showTip(null); return; }
    const move = { ArrowLeft: -1, ArrowRight: 1 }[key];
    if (target.matches(".tokens") && move) {
      const spans = [...target.children];
      const at = spans.findIndex((span) => span.classList.contains("active"));
      showTip(spans[Math.max(0, Math.min(spans.length - 1, at < 0 ? 0 : at + move))]);
      event.preventDefault();
    } else if (target.closest("#groups") && (key === "ArrowUp" || key === "ArrowDown")) {
      select(current, currentGroup + (key === "ArrowDown" ? 1 : -1));
      byId("groups").children[currentGroup].firstChild.focus({ preventScroll: true });
      event.preventDefault();
    } else if (move && steps.length && !target.matches("input, select, textarea, summary, pre")) {
      const inGroups = target.closest("#groups");
      select(current + move, currentGroup);
      if (inGroups) byId("groups").children[currentGroup].firstChild.focus({ preventScroll: true });
      event.preventDefault();
    }
  });

  // ---------------------------------------------------------------- start
  for (const row of document.querySelectorAll("tr[data-stage]")) {
    const index = stages.indexOf(row.dataset.stage);
    if (index >= 0) row.style.setProperty("--stage", stageColor(index));
  }
  const legend = byId("stage-legend");
  stages.forEach((stage, index) => {
    const mark = make("i");
    mark.style.background = stageColor(index);
    legend.append(make("span", {}, mark, stage));
  });
  legend.append(make("span", { id: "hovered", class: "dim" }));
  byId("curves-section").hidden = data.charts.length === 0;
  for (const spec of data.charts) charts.push(new Plot(spec));
  byId("charts").replaceChildren(...charts.map((chart) => chart.element));
  new ResizeObserver(drawCharts).observe(byId("charts"));
  drawCharts();
  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.addEventListener("change", () => { axis = input.value; drawCharts(); });
  }
  for (const input of document.querySelectorAll("input[name=color]")) {
    input.addEventListener("change", () => { colorBy = input.value; showGroup(steps[current].groups[currentGroup]); });
  }

  byId("no-rollouts").hidden = steps.length > 0;
  byId("viewer-body").hidden = steps.length === 0;
  if (!steps.length) return;
  for (const stage of new Set(steps.map((step) => step.stage))) {
    const tab = make("button", { type: "button", "data-stage": stage, text: stages[stage] });
    tab.style.setProperty("--stage", stageColor(stage));
    tab.addEventListener("click", () => select(steps.findIndex((step) => step.stage === stage), 0));
    byId("stage-tabs").append(tab);
  }
  byId("scrubber").max = steps.length - 1;
  byId("scrubber").addEventListener("input", (event) => select(+event.target.value, currentGroup));
  byId("previous").addEventListener("click", () => select(current - 1, currentGroup));
  byId("next").addEventListener("click", () => select(current + 1, currentGroup));
  let [stage, step, group] = ["", "", "0"];
  try { [stage, step, group] = location.hash.slice(1).split(":").map(decodeURIComponent); } catch (_) { /* not our hash */ }
  const linked = stepAt.get(`${stages.indexOf(stage)}:${step}`);
  select(linked === undefined ? steps.length - 1 : linked, +group || 0);
})();
