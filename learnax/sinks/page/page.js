"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.getElementById("page");
  root.textContent = "";

  // ---- small tools

  const NS = "http://www.w3.org/2000/svg";
  const el = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(name, value);
    made.append(...children.filter(child => child !== null && child !== undefined));
    return made;
  };
  const svg = (tag, attributes = {}, text) => {
    const made = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const floats = text => {
    const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  };
  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const count = value => whole.format(value);
  const number = value => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0*e\+?/, "e");
    return String(Number(value.toPrecision(4)));
  };
  const amount = (value, unit) => {
    if (!value) return `0 ${unit}`;
    for (const [prefix, factor] of [["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
      if (value >= factor) return `${Number((value / factor).toPrecision(3))} ${prefix}${unit}`;
    return `${Number(value.toPrecision(3))} ${unit}`;
  };
  const seconds = value => {
    if (!(value > 0)) return "0 s";
    if (value < 1e-3) return `${Number((value * 1e6).toPrecision(3))} µs`;
    if (value < 1) return `${Number((value * 1e3).toPrecision(3))} ms`;
    if (value < 90) return `${Number(value.toPrecision(3))} s`;
    if (value < 5400) return `${Number((value / 60).toPrecision(3))} min`;
    return value < 172800 ? `${Number((value / 3600).toPrecision(3))} h` : `${Number((value / 86400).toPrecision(3))} days`;
  };
  const when = time => new Date(time * 1000).toLocaleString("en-GB", {
    year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit",
  });
  const share = (part, all) => `${Math.round(100 * part / Math.max(all, 1e-12))}%`;
  const color = place => `var(--c${place % 8})`;
  const section = (id, title, lead) => {
    const made = el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title));
    if (lead) made.append(el("p", { class: "lead" }, lead));
    root.append(made);
    return made;
  };
  const table = (heads, rows, foot) => {
    // A head that begins with # is of a column of numbers.
    const cell = (tag, content, place, scope) => {
      const made = el(tag, { class: heads[place].startsWith("#") ? "num" : heads[place].startsWith("|") ? "bar" : null, scope });
      made.append(...[content].flat());
      return made;
    };
    const line = row => el("tr", {}, ...row.map((content, place) => cell(place ? "td" : "th", content, place, place ? null : "row")));
    const made = el("table", {},
      el("thead", {}, el("tr", {}, ...heads.map((head, place) => cell("th", head.replace(/^[#|]/, ""), place, "col")))),
      el("tbody", {}, ...rows.map(line)));
    if (foot) made.append(el("tfoot", {}, line(foot)));
    return el("div", { class: "scroll" }, made);
  };
  const list = pairs => el("dl", {}, ...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));

  // ---- the series of a run: arrays by metric and split

  const series = run => {
    const places = Object.fromEntries(Object.entries(run.x).map(([key, text]) => [key, floats(text)]));
    const all = run.curves.map(curve => {
      const cut = curve.name.indexOf("/");
      const mean = floats(curve.mean);
      return {
        name: curve.name, split: curve.name.slice(0, cut).replace(/_epoch$/, ""), metric: curve.name.slice(cut + 1),
        x: places[curve.x], mean, low: curve.low ? floats(curve.low) : mean, high: curve.high ? floats(curve.high) : mean,
        dense: Boolean(curve.dense), last: curve.last, count: curve.count,
      };
    });
    for (const own of run.own) {
      const mean = Float32Array.from(own.y, value => value === null ? NaN : value);
      all.push({ name: own.name, split: "", metric: own.name, x: Float32Array.from(own.x), mean, low: mean, high: mean, dense: false, last: own.y.at(-1), count: own.y.length, own: true });
    }
    return all;
  };
  const extent = each => {
    let least = Infinity, most = -Infinity;
    for (const { low, high } of each) {
      for (const value of low) if (value < least) least = value;
      for (const value of high) if (value > most) most = value;
    }
    return [least, most];
  };
  const at = (x, step) => { // the column that a step lies in
    let first = 0, last = x.length - 1;
    while (first < last) { const middle = (first + last) >> 1; if (x[middle] < step) first = middle + 1; else last = middle; }
    return first;
  };

  // ---- charts

  const charts = [];
  const point = step => { for (const chart of charts) chart.cursor(step); };
  const ticks = (least, most, wanted) => {
    const rough = (most - least) / wanted, power = 10 ** Math.floor(Math.log10(rough));
    const unit = [1, 2, 2.5, 5, 10].find(factor => factor * power >= rough) * power;
    const found = [];
    for (let tick = Math.ceil(least / unit - 1e-9) * unit; tick <= most + unit * 1e-9; tick += unit) found.push(Math.abs(tick) < unit * 1e-9 ? 0 : tick);
    return found;
  };
  const brief = value => value >= 1e6 ? `${Number((value / 1e6).toPrecision(3))}M` : value >= 1e4 ? `${Number((value / 1e3).toPrecision(3))}k` : count(value);
  // What most of the means span; a few wild values at the start are cut off, and the line is seen to leave.
  const span = each => {
    const means = each.flatMap(one => Array.from(one.mean)).filter(Number.isFinite).sort((a, b) => a - b);
    if (!means.length) return null;
    const quantile = part => means[Math.min(means.length - 1, Math.floor(part * means.length))];
    let [least, most] = [means[0], means.at(-1)];
    const all = [least, most];
    const room = quantile(0.97) - quantile(0.03);
    if (room > 0) { most = Math.min(most, quantile(0.97) + room); least = Math.max(least, quantile(0.03) - room); }
    return Object.assign([least, most], { whole: all });
  };

  // A moving mean of what is noisy, or the median of what has spikes: as wide as a sixtieth of the chart.
  const smoothed = (line, median) => {
    const reach = Math.floor(line.mean.length / 120);
    if (!line.dense || reach < 1) return null;
    return Float32Array.from(line.mean, (_, place) => {
      const near = Array.from(line.mean.slice(Math.max(0, place - reach), place + reach + 1)).filter(Number.isFinite);
      if (!near.length) return NaN;
      if (median) return near.sort((a, b) => a - b)[near.length >> 1];
      return near.reduce((a, b) => a + b, 0) / near.length;
    });
  };

  const draw = (host, { title, lines, xmax, format = number, median = false, marks = [], best = null, wide = false }) => {
    const range = span(lines);
    if (!range) return;
    const key = el("div", { class: "key", "aria-live": "off" });
    const button = el("button", { type: "button" }, "log");
    for (const line of lines) line.smooth = smoothed(line, median);
    const figure = el("figure", { class: wide ? "wide" : null }, el("div", { class: "head" }, el("h3", {}, title), button), key);
    const box = el("div", { tabindex: "0", role: "group", "aria-label": `${title}: the arrow keys move along the steps` });
    figure.append(box);
    host.append(figure);
    const positive = range.whole[0] > 0;
    let log = positive && range.whole[1] / range.whole[0] > 20, step = null, view = null;
    button.hidden = !positive;

    const told = () => {
      key.textContent = "";
      const where = step === null ? null : step;
      if (where !== null) key.append(el("span", {}, `step ${count(where)}`));
      for (const line of lines) {
        if (!line.x.length) continue;
        const value = where === null ? line.last : line.mean[at(line.x, where)];
        key.append(el("span", {}, el("i", { style: `background:${line.color}` }), `${line.label} `, el("b", {}, format(value))));
      }
    };
    const cursor = next => {
      step = next;
      told();
      if (!view) return;
      view.cursor.setAttribute("visibility", next === null ? "hidden" : "visible");
      if (next !== null) { const place = view.x(next); view.cursor.setAttribute("x1", place); view.cursor.setAttribute("x2", place); }
    };

    const render = () => {
      const width = Math.max(box.clientWidth, 240), height = wide ? Math.min(340, Math.max(220, width * 0.34)) : 200;
      const named = width > 420 && lines.length > 1;
      const top = 8, bottom = 24, left = 48, right = named ? 74 : 14;
      let [least, most] = range;
      if (log) [least, most] = range.whole;
      else {
        const [low, high] = extent(lines), room = most - least || Math.abs(most) || 1;
        least = Math.max(low, least - 0.25 * room); most = Math.min(high, most + 0.25 * room);
        if (least > 0 && least < 0.3 * most) least = 0;
      }
      if (least === most) { const room = Math.abs(most) * 0.1 || 1; least -= room; most += room; if (log) least = most / 1.5; }
      const scale = log ? Math.log10 : value => value;
      const [from, to] = [scale(least), scale(most)];
      const x = value => left + (width - left - right) * value / Math.max(xmax, 1);
      const y = value => top + (height - top - bottom) * (1 - (scale(value) - from) / (to - from));
      const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
      const sizes = lines.filter(line => line.x.length).map(line => `${line.label} from ${format(line.mean[0])} to ${format(line.last)}`);
      picture.append(svg("title", {}, `${title} over ${count(xmax)} steps: ${sizes.join("; ")}`));
      const id = `clip${charts.indexOf(self)}`;
      const clip = svg("clipPath", { id });
      clip.append(svg("rect", { x: left, y: top - 2, width: width - left - right + 1, height: height - top - bottom + 4 }));
      picture.append(clip);

      let levels = log ? [] : ticks(least, most, 4);
      if (log) {
        for (let power = Math.floor(from); power <= Math.ceil(to); power++) for (const factor of [1, 2, 5]) levels.push(factor * 10 ** power);
        levels = levels.filter(level => level >= least * 0.999 && level <= most * 1.001);
        if (levels.length > 6) levels = levels.filter(level => Math.abs(Math.log10(level) - Math.round(Math.log10(level))) < 1e-9);
        while (levels.length > 6) levels = levels.filter((_, place) => place % 2 === 0);
        if (levels.length < 2) levels = [least, most];
      }
      for (const level of levels) {
        picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(level), y2: y(level) }));
        picture.append(svg("text", { x: left - 7, y: y(level) + 4, "text-anchor": "end" }, format(Number(level.toPrecision(4)))));
      }
      picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
      for (const tick of ticks(0, xmax, width / 110)) if (x(tick) < width - right - 44) picture.append(svg("text", { x: x(tick), y: height - 7, "text-anchor": "middle" }, brief(tick)));
      picture.append(svg("text", { x: width - right, y: height - 7, "text-anchor": "end" }, "steps"));
      for (const mark of marks) picture.append(svg("line", { class: "mark", x1: x(mark), x2: x(mark), y1: top, y2: height - bottom }));

      const inside = svg("g", { "clip-path": `url(#${id})` });
      picture.append(inside);
      const ends = [];
      for (const line of lines) {
        const places = Array.from(line.x, (_, place) => place).filter(place => Number.isFinite(line.mean[place]) && (!log || line.mean[place] > 0));
        const path = values => places.map(place => `${x(line.x[place]).toFixed(1)},${y(values[place]).toFixed(1)}`);
        if (line.low !== line.mean && line.band !== false) {
          const floor = log ? Float32Array.from(line.low, value => Math.max(value, least / 10)) : line.low;
          inside.append(svg("polygon", { points: [...path(line.high), ...path(floor).reverse()].join(" "), style: `fill:${line.color}`, opacity: 0.17 }));
        }
        const stroke = (values, thickness, opacity) => inside.append(svg("polyline", {
          points: path(values).join(" "), fill: "none", style: `stroke:${line.color}`, "stroke-width": thickness, "stroke-linejoin": "round", opacity,
        }));
        if (line.smooth && !line.thin) stroke(line.mean, 1, 0.32);
        stroke(line.smooth || line.mean, line.thin ? 1.2 : 1.9, line.thin ? 0.8 : 1);
        if (!line.dense && places.length <= 60)
          for (const place of places) picture.append(svg("circle", { cx: x(line.x[place]), cy: Math.min(Math.max(y(line.mean[place]), top), height - bottom), r: places.length > 30 ? 1.8 : 2.6, style: `fill:${line.color}` }));
        if (places.length) ends.push({ line, y: Math.min(Math.max(y((line.smooth || line.mean)[places.at(-1)]), top + 6), height - bottom - 2), x: x(line.x[places.at(-1)]) });
      }
      if (best) {
        picture.append(svg("circle", { cx: x(best.step), cy: y(best.value), r: 6, fill: "none", style: "stroke:var(--ink)", "stroke-width": 1.5 }));
        const late = x(best.step) > (left + width - right) / 2;
        picture.append(svg("text", { class: "label", x: x(best.step) + (late ? -10 : 10), y: y(best.value) < top + 24 ? y(best.value) + 20 : y(best.value) - 10, "text-anchor": late ? "end" : "start", style: "fill:var(--ink)" }, `best ${format(best.value)}`));
      }
      if (named) {
        ends.sort((a, b) => a.y - b.y);
        for (let place = 1; place < ends.length; place++) ends[place].y = Math.max(ends[place].y, ends[place - 1].y + 14);
        const over = ends.length ? ends.at(-1).y - (height - bottom) : 0;
        if (over > 0) for (const end of ends) end.y -= over;
        for (const end of ends) picture.append(svg("text", { class: "label", x: width - right + 8, y: end.y + 4, style: `fill:${end.line.color}` }, end.line.label.length > 11 ? `${end.line.label.slice(0, 10)}…` : end.line.label));
      }
      const pointer = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
      picture.append(pointer);
      box.replaceChildren(picture);
      view = { x, cursor: pointer, left, right, width };
      cursor(step);
    };
    const self = { cursor, render };
    charts.push(self);
    const find = event => {
      const bounds = box.getBoundingClientRect(), place = (event.clientX - bounds.left) * view.width / bounds.width;
      const wanted = (place - view.left) / (view.width - view.left - view.right) * xmax;
      point(Math.round(Math.min(Math.max(wanted, 0), xmax)));
    };
    box.addEventListener("pointermove", find);
    box.addEventListener("pointerdown", find);
    box.addEventListener("pointerleave", () => point(null));
    box.addEventListener("keydown", event => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      point(Math.round(Math.min(Math.max((step === null ? xmax : step) + move * Math.max(xmax / 60, 1), 0), xmax)));
    });
    box.addEventListener("blur", () => point(null));
    button.addEventListener("click", () => { log = !log; button.setAttribute("aria-pressed", log); render(); });
    button.setAttribute("aria-pressed", log);
    render();
  };

  const CONSTANT = 1e-9;
  const isFlat = line => { const [least, most] = extent([line]); return !(most - least > CONSTANT * Math.max(Math.abs(most), Math.abs(least))); };
  const HOW = ["learning_rate", "gradient norm", "has_nan", "nan_data", "overflow", "loss scale", "scale"];
  const groups = ["What is trained", "How it is trained", "Speed", "Logged by the script"];
  const groupOf = line => line.own ? 3 : line.metric === "update_time" ? 2 : HOW.includes(line.metric) ? 1 : 0;
  const TITLES = { update_time: "time of a step", has_nan: "dropped updates", nan_data: "data whose loss is NaN", overflow: "overflows of the scaled loss", learning_rate: "learning rate" };
  const titled = metric => TITLES[metric] || metric;
  const rank = metric => metric === "loss" ? 0 : 1;

  // ---- the page of one run

  const ended = { running: "running", complete: "complete", stopped: "stopped before its end", paused: "paused" };

  const header = run => {
    const total = run.num_epochs * run.epoch_steps;
    const meta = el("div", { class: "meta" },
      el("span", { class: `state ${run.state}` }, ended[run.state] || run.state),
      el("span", {}, `step ${count(run.step)} of ${count(total)}`),
      el("span", {}, `epoch ${count(Math.min(run.epoch + (run.state === "complete" ? 0 : 1), run.num_epochs))} of ${count(run.num_epochs)}`),
      el("span", {}, `began ${when(run.events.length ? run.events[0].time : run.began)}`),
      el("span", {}, `written ${when(run.written)}`));
    return el("header", {}, el("h1", {}, run.title), meta);
  };
  const bestOf = (run, each) => {
    const line = run.best_metric && each.find(one => one.name === run.best_metric);
    if (!line) return null;
    let found = null;
    line.mean.forEach((value, place) => {
      if (Number.isFinite(value) && (!found || (run.minimize ? value < found.value : value > found.value))) found = { value, step: line.x[place], name: line.name };
    });
    return found;
  };
  const speed = run => run.ledger.steps / Math.max(run.ledger.training, 1e-9);
  const tiles = (run, each, best) => {
    const made = el("div", { class: "tiles" });
    const add = (value, name) => made.append(el("div", { class: "tile" }, el("b", {}, value), el("span", {}, name)));
    const last = name => each.find(one => one.name === name);
    const loss = last("train/loss");
    if (loss) add(number(loss.mean.at(-1)), "training loss at the end");
    for (const line of each.filter(one => one.metric === "loss" && one.split !== "train" && !one.own).slice(0, 2)) add(number(line.last), `${line.split} loss at the end`);
    if (best && best.name !== "val/loss" || best) add(number(best.value), `best ${best.name}, at step ${count(best.step)}`);
    if (run.ledger.steps) add(`${number(Number(speed(run).toPrecision(3)))}/s`, "training steps");
    add(seconds(run.seconds_before + run.ledger.wall), run.seconds_before ? "in all, over several starts" : "in all");
    add(amount(run.parameters, "").trim(), "parameters");
    return made;
  };

  const curves = (run, each, best) => {
    const host = section("curves", "Curves", "Behind each line of training stand the steps themselves, the least and the largest of as many as share a pixel. Point at a chart for its values.");
    const xmax = Math.max(run.step, 1, ...each.map(one => one.x.length ? one.x.at(-1) : 0));
    const marks = run.events.filter(event => event.what === "resumed" && event.step > 0).map(event => event.step);
    groups.forEach((title, group) => {
      const metrics = [...new Set(each.filter(one => groupOf(one) === group && one.count).map(one => one.metric))].sort((a, b) => rank(a) - rank(b));
      const flat = [], shown = [];
      for (const metric of metrics) {
        const lines = each.filter(one => one.metric === metric && groupOf(one) === group && one.count);
        (group === 1 && lines.every(isFlat) ? flat : shown).push([metric, lines]);
      }
      if (!shown.length && !flat.length) return;
      host.append(el("p", { class: "group" }, title));
      const grid = el("div", { class: "charts" });
      host.append(grid);
      shown.forEach(([metric, lines], place) => {
        const splits = [...new Set(lines.map(one => one.split))];
        const odd = shown.length % 2 === 1;
        draw(grid, {
          title: titled(metric), xmax, marks, wide: odd && place === 0,
          format: metric === "update_time" ? seconds : number, median: metric === "update_time",
          best: best && lines.some(one => one.name === best.name) ? best : null,
          lines: lines.map(one => ({ ...one, label: one.own ? one.metric : one.split === "train" ? "training" : one.split, color: color(one.split === "train" || one.own ? 0 : splits.filter(split => split !== "train").indexOf(one.split) + 1) })),
        });
      });
      if (flat.length) host.append(el("p", { class: "soft", style: "margin-top:10px" }, "The same throughout: " + flat.map(([metric, lines]) => `${titled(metric)} ${number(lines[0].last)}`).join(", ") + "."));
    });
    if (!each.length) host.append(el("p", { class: "soft" }, "No step has been logged yet."));
  };

  const WHAT = { started: "started", resumed: "resumed from a checkpoint", stopped: "stopped", ended: "ended" };
  const timeline = run => {
    const host = section("timeline", "Time line");
    const xmax = Math.max(run.step, 1, ...run.events.map(event => event.step));
    const lives = [];
    for (const event of run.events) {
      if (event.what === "started" || event.what === "resumed") lives.push({ from: event.step, to: null, bad: false });
      else if (lives.length) Object.assign(lives.at(-1), { to: event.step, bad: event.what === "stopped" || Boolean(event.text) });
    }
    if (lives.length && lives.at(-1).to === null) lives.at(-1).to = run.step;
    const lanes = [];
    const card = el("div", { class: "card" });
    host.append(card);
    const render = () => {
      const width = Math.max(card.clientWidth - 32, 240), left = width < 420 ? 64 : 92, right = 14;
      const x = step => left + (width - left - right) * step / xmax;
      const shown = lives.slice(-8), row = 11;
      const saveTop = 10 + Math.max(shown.length, 1) * row + 10;
      const height = saveTop + 26 + (run.dropped.count ? 24 : 0) + 22;
      const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
      picture.append(svg("title", {}, `${run.events.length} events over ${count(xmax)} steps; ${run.saves.length} checkpoints; ${run.dropped.count} dropped updates`));
      const name = (text, y) => picture.append(svg("text", { x: 0, y }, text));
      name("trained", 18);
      shown.forEach((life, place) => {
        const y = 9 + place * row;
        picture.append(svg("rect", { x: x(life.from), y, width: Math.max(x(life.to) - x(life.from), 3), height: 7, rx: 3, style: "fill:var(--c0)", opacity: place === shown.length - 1 ? 1 : 0.5 }));
        if (life.bad) picture.append(svg("circle", { cx: x(life.to), cy: y + 3.5, r: 4, style: "fill:var(--bad)" }));
      });
      name("saved", saveTop + 13);
      picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: saveTop + 9, y2: saveTop + 9 }));
      for (const save of run.saves) {
        const tall = save.numbered || save.name ? 7 : 4;
        picture.append(svg("line", { x1: x(save.step), x2: x(save.step), y1: saveTop + 9 - tall, y2: saveTop + 9 + tall, style: "stroke:var(--ink)", "stroke-width": 1.5, opacity: save.there ? 1 : 0.35 }));
        if (save.best) picture.append(svg("circle", { cx: x(save.step), cy: saveTop + 9, r: 6, style: "fill:var(--card);stroke:var(--good)", "stroke-width": 2.5 }));
      }
      let y = saveTop + 26;
      if (run.dropped.count) {
        name("dropped", y + 13);
        for (const step of run.dropped.steps) picture.append(svg("line", { x1: x(step), x2: x(step), y1: y + 3, y2: y + 15, style: "stroke:var(--bad)", "stroke-width": 1.5 }));
        y += 24;
      }
      picture.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y + 2, y2: y + 2 }));
      for (const tick of ticks(0, xmax, width / 120)) picture.append(svg("text", { x: x(tick), y: y + 16, "text-anchor": "middle" }, brief(tick)));
      card.replaceChildren(picture);
    };
    charts.push({ render, cursor: () => {} });
    render();
    host.append(el("p", { class: "soft", style: "margin-top:8px;font-size:13px" },
      `A long tick is a numbered checkpoint${run.saves.some(save => save.best) ? ", the ring is the best" : ""}; a faint one has been removed since. ` +
      (run.dropped.count ? `${count(run.dropped.count)} updates were dropped, as they would have put NaN into the parameters.` : "No update was dropped.")));
    host.append(el("ol", { class: "events" }, ...[...run.events].reverse().slice(0, 50).map(event => el("li", {},
      el("span", { class: "soft" }, when(event.time)), el("span", {}, `step ${count(event.step)}`),
      el("span", { class: event.what === "stopped" || event.text ? "bad" : null }, WHAT[event.what] || event.what, event.text ? ` ${event.what === "stopped" ? "by " : ""}${event.text}` : "")))));
  };

  const ledger = run => {
    const before = run.seconds_before ? ` This is the last start; those before took ${seconds(run.seconds_before)}.` : "";
    const host = section("time", "Where the time went", `${run.ledger.verdict[0].toUpperCase()}${run.ledger.verdict.slice(1)}.${before}`);
    const most = Math.max(...run.ledger.rows.map(row => row.seconds), 1e-9);
    host.append(table(["part", "#seconds", "#share", "| "],
      run.ledger.rows.filter(row => row.seconds > 5e-4 * run.ledger.wall).map(row => [row.name, seconds(row.seconds), share(row.seconds, run.ledger.wall), el("i", { class: row.start ? "start" : "", style: `width:${100 * row.seconds / most}%` })]),
      ["in all", seconds(run.ledger.wall), "", `${count(run.ledger.steps)} steps`]));
    if (run.ledger.flops_per_second) host.append(el("p", { class: "soft", style: "margin-top:10px" },
      `While training, each device makes ${amount(run.ledger.flops_per_second, "FLOP/s")}` + (run.ledger.utilisation ? `, ${(100 * run.ledger.utilisation).toFixed(1)}% of its peak.` : ".")));
  };

  const gradients = run => {
    const host = section("gradients", "Norms of the gradients");
    if (!run.norms) { host.append(el("p", { class: "soft" }, "None are known: no step was made by this process yet.")); return; }
    const rows = run.norms.values.map(floats), x = floats(run.norms.x), names = run.norms.names;
    let least = Infinity, most = 0;
    for (const row of rows) for (const value of row) if (Number.isFinite(value) && value > 0) { least = Math.min(least, value); most = Math.max(most, value); }
    if (!(most > 0)) { least = 1; most = 1; }
    least = Math.max(least, most * 1e-8);
    const card = el("div", { class: "card" }), key = el("div", { class: "key" });
    const grouped = names.length < run.norms.parameters ? `, ${run.norms.parameters} of them in ${names.length} groups` : "";
    host.append(el("p", { class: "lead" }, `A row for each parameter${grouped}, stronger where the norm is larger, over the steps from left to right. Red is not finite.`), card);
    const canvas = el("canvas", { role: "img", tabindex: "0", "aria-label": `norms of the gradients of ${names.join(", ")} over the steps, from ${number(least)} to ${number(most)}` });
    const grid = el("div", { class: "heat" }, el("ol", {}, ...names.map(name => el("li", { class: "mono", title: name }, el("bdi", {}, name)))), canvas);
    card.append(key, grid);
    const rest = () => key.replaceChildren(el("span", {}, number(least), el("span", { class: "ramp" }), number(most)));
    rest();
    const render = () => {
      const width = Math.max(Math.round(canvas.clientWidth || 300), 60), height = 18 * rows.length, ratio = window.devicePixelRatio || 1;
      canvas.width = width * ratio; canvas.height = height * ratio; canvas.style.height = `${height}px`;
      const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
      const ink = style.getPropertyValue("--heat").trim(), bad = style.getPropertyValue("--bad").trim();
      pen.scale(ratio, ratio);
      rows.forEach((row, place) => row.forEach((value, column) => {
        const from = Math.floor(width * column / row.length), to = Math.ceil(width * (column + 1) / row.length);
        if (!Number.isFinite(value)) pen.fillStyle = bad;
        else {
          const part = value <= 0 ? 0 : most === least ? 0.5 : Math.max(Math.log(value / least) / Math.log(most / least), 0);
          pen.fillStyle = `rgba(${ink}, ${0.06 + 0.94 * part})`;
        }
        pen.clearRect(from, place * 18 + 1, to - from, 16);
        pen.fillRect(from, place * 18 + 1, to - from, 16);
      }));
    };
    canvas.addEventListener("pointermove", event => {
      const bounds = canvas.getBoundingClientRect();
      const row = Math.min(rows.length - 1, Math.max(0, Math.floor((event.clientY - bounds.top) / 18)));
      const column = Math.min(x.length - 1, Math.max(0, Math.floor((event.clientX - bounds.left) / bounds.width * x.length)));
      key.replaceChildren(el("span", {}, `${names[row]} at step ${count(x[column])}: `, el("b", {}, number(rows[row][column]))));
    });
    canvas.addEventListener("pointerleave", rest);
    charts.push({ render, cursor: () => {} });
    render();
  };

  const programs = run => {
    const host = section("programs", "Programs", `${run.plan[0].toUpperCase()}${run.plan.slice(1)}.`);
    host.append(table(["program", "#calls", "#work of a batch", "#read and written", "#memory", "#updated in place", "#compiled in"],
      run.programs.map(one => [one.kind, count(one.calls), amount(one.flops, "FLOP"), amount(one.bytes, "B"), amount(one.memory, "B"), amount(one.reused, "B"), seconds(Object.values(one.seconds).reduce((a, b) => a + b, 0))])));
    host.append(el("p", { class: "soft", style: "margin-top:8px;font-size:13px" }, "By the compiler's count, for one device; what is updated in place is donated memory."));
  };

  const checkpoints = run => {
    const host = section("checkpoints", "Checkpoints");
    if (!run.checkpoints) { host.append(el("p", { class: "soft" }, "The run has no registry, and keeps none.")); return; }
    host.append(el("p", { class: "lead mono", style: "overflow-wrap:anywhere" }, run.checkpoints));
    const there = run.saves.filter(save => save.there).reverse();
    if (!there.length) { host.append(el("p", { class: "soft" }, "None yet.")); return; }
    host.append(table(["step", "what it is", "#judged by", "#written"], there.map((save, place) => [count(save.step),
      [[place === 0 ? "latest" : null, save.numbered ? "numbered" : null, save.name, place && !save.numbered && !save.name && !save.best ? "the one before" : null].filter(Boolean).join(", "), save.best ? el("span", { class: "yes" }, (place === 0 || save.numbered || save.name ? ", " : "") + "best") : ""],
      save.value === null || save.value === undefined ? "" : `${save.metric || ""} ${number(save.value)}`, when(save.time)])));
  };

  const details = run => {
    const host = section("arguments", "Arguments", "What the trainer was given, and what it takes by default; without what is None or False.");
    const pairs = Object.entries(run.arguments), half = Math.ceil(pairs.length / 2);
    host.append(el("div", { class: "two" }, list(pairs.slice(0, half)), list(pairs.slice(half))));
    const machine = section("versions", "Versions and devices");
    machine.append(el("div", { class: "two" }, list(Object.entries(run.versions)), list([["devices", run.devices.join(", ")], ["machine", run.machine], ["processes", String(run.processes)], ["parameters", `${count(run.parameters)}, ${amount(run.parameter_bytes, "B")}`]])));
  };

  const onePage = run => {
    const each = series(run), best = bestOf(run, each), head = header(run);
    root.append(head);
    head.append(tiles(run, each, best), el("nav", { "aria-label": "sections" }, ...[["curves", "Curves"], ["timeline", "Time line"], ["time", "Time"], ["gradients", "Gradients"], ["programs", "Programs"], ["checkpoints", "Checkpoints"], ["arguments", "Arguments"], ["versions", "Versions"]].map(([id, title]) => el("a", { href: `#${id}` }, title))));
    curves(run, each, best);
    timeline(run);
    ledger(run);
    gradients(run);
    programs(run);
    checkpoints(run);
    details(run);
  };

  // ---- the page of several runs

  const comparison = runs => {
    const named = runs.map((run, place) => [el("span", { class: "swatch", style: `background:${color(place)}` }), run.label]);
    const copy = place => named[place].map(part => typeof part === "string" ? part : part.cloneNode());
    root.append(el("header", {}, el("h1", {}, data.title)));
    const all = runs.map(series);
    const summary = section("runs", "Runs");
    const best = runs.map((run, place) => bestOf(run, all[place]));
    const lastOf = (place, name) => { const line = all[place].find(one => one.name === name); return line ? line : null; };
    summary.append(table(["run", "state", "#steps", "#training loss", "#val loss", "#best", "#steps/s", "#in all"], runs.map((run, place) => [copy(place), ended[run.state] || run.state, count(run.step),
      number(lastOf(place, "train/loss") && lastOf(place, "train/loss").mean.at(-1)), number(lastOf(place, "val/loss") && lastOf(place, "val/loss").last),
      best[place] ? `${best[place].name} ${number(best[place].value)}` : "–", number(Number(speed(run).toPrecision(3))), seconds(run.seconds_before + run.ledger.wall)])));

    const host = section("curves", "Curves", "A colour for each run; thin is training, and thick with dots is validation.");
    const xmax = Math.max(1, ...all.flat().map(one => one.x.length ? one.x.at(-1) : 0));
    groups.forEach((title, group) => {
      const metrics = [...new Set(all.flat().filter(one => groupOf(one) === group && one.count).map(one => one.metric))].sort((a, b) => rank(a) - rank(b));
      const grid = el("div", { class: "charts" }), head = el("p", { class: "group" }, title);
      host.append(head, grid); // first: a chart asks how wide it is
      const linesOf = metric => all.flatMap((each, place) => each.filter(one => one.metric === metric && groupOf(one) === group && one.count).map(one => ({
        ...one, color: color(place), thin: one.split === "train", band: false,
        label: one.own || one.split === "train" ? runs[place].label : `${runs[place].label}, ${one.split}`,
      })));
      const alike = lines => group === 1 && lines.every(isFlat) && new Set(lines.map(line => line.last)).size === 1;
      const shown = metrics.map(metric => [metric, linesOf(metric)]).filter(([, lines]) => !alike(lines));
      shown.forEach(([metric, lines], place) => draw(grid, {
        title: titled(metric), lines, xmax, wide: shown.length % 2 === 1 && place === 0,
        format: metric === "update_time" ? seconds : number, median: metric === "update_time",
      }));
      if (!grid.children.length) { head.remove(); grid.remove(); }
    });

    const given = section("arguments", "Arguments that differ");
    const names = [...new Set(runs.flatMap(run => Object.keys(run.arguments)))];
    const differ = names.filter(name => new Set(runs.map(run => run.arguments[name])).size > 1);
    const heads = first => [first, ...runs.map(run => run.label)];
    if (differ.length) given.append(table(heads("argument"), differ.map(name => [name, ...runs.map(run => run.arguments[name] ?? "–")])));
    else given.append(el("p", { class: "soft" }, "None."));
    const versions = [...new Set(runs.flatMap(run => Object.keys(run.versions)))].filter(name => new Set(runs.map(run => run.versions[name])).size > 1);
    const rows = versions.map(name => [name, ...runs.map(run => run.versions[name] ?? "–")]);
    if (new Set(runs.map(run => run.devices.join())).size > 1) rows.push(["devices", ...runs.map(run => run.devices.join(", "))]);
    if (rows.length) given.append(table(heads("versions and devices"), rows));

    const fast = section("speed", "Speed");
    const numbers = first => [first, ...runs.map(run => `#${run.label}`)];
    const cost = (run, kind) => run.programs.find(one => one.kind === kind);
    fast.append(table(numbers(""), [
      ["steps/s while training", ...runs.map(run => number(Number(speed(run).toPrecision(3))))],
      ["data/s while training", ...runs.map(run => number(Number((speed(run) * run.batch_size).toPrecision(3))))],
      ["FLOP/s of a device", ...runs.map(run => amount(run.ledger.flops_per_second, "FLOP/s"))],
      ["parameters", ...runs.map(run => amount(run.parameters, "").trim())],
      ["memory of a training step", ...runs.map(run => cost(run, "train") ? amount(cost(run, "train").memory, "B") : "–")],
    ]));
    const spent = section("time", "Where the time went");
    const parts = [...new Set(runs.flatMap(run => run.ledger.rows.map(row => row.name)))];
    spent.append(table(numbers("part"), parts.map(name => [name, ...runs.map(run => {
      const row = run.ledger.rows.find(one => one.name === name);
      return row ? `${seconds(row.seconds)} (${share(row.seconds, run.ledger.wall)})` : "–";
    })]), ["in all", ...runs.map(run => seconds(run.ledger.wall))]));
  };

  if (data.runs) comparison(data.runs); else onePage(data);
  root.append(el("footer", {}, "Written by learnax. Times are this browser's."));

  // ---- other widths, other colours, paper

  let wide = window.innerWidth;
  const again = () => { for (const chart of charts) chart.render(); };
  window.addEventListener("resize", () => { if (window.innerWidth !== wide) { wide = window.innerWidth; again(); } });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  window.matchMedia("print").addEventListener("change", again);
})();
