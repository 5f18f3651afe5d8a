// The plan, what came of it, and when.
function showOverview(main) {
  const plans = data.runs.flatMap((run) => run.plans);
  const total = (f) => entries.reduce((sum, entry) => sum + f(entry), 0);
  const generated = total((entry) => entry.kernels.reduce((sum, kernel) => sum + (kernel.library || kernel.special ? 0 : kernel.times), 0));
  fill(main, el("h1", {}, plans.length ? [...new Set(plans.map((plan) => plan.model_cls))].join(", ") : "Compiled graphs"),
    el("div", { class: "facts" }, fact(String(new Set(entries.map((e) => e.component)).size), "components compiled"), fact(String(entries.length), entries.length === 1 ? "graph" : "graphs"),
      fact(total((e) => e.ops.length).toLocaleString("en"), "operations captured"), fact(total((e) => e.kernelCalls).toLocaleString("en"), `kernel calls, ${generated.toLocaleString("en")} generated`),
      fact(seconds(total((e) => e.seconds || 0)), "to compile")),
    data.notes.map((note) => el("p", { class: "notice" }, note)),
    el("h2", {}, "Plan"), planTable(plans), [...new Set(plans.flatMap((plan) => plan.notes || []))].map((note) => el("p", { class: "soft" }, note)),
    el("h2", {}, "Graphs"), graphTable());
  if (data.runs.some(happened)) add(main, [el("h2", {}, "Time line"), data.runs.filter(happened).map((run) => timeline(run))]);
  if (data.tlparse) add(main, [el("h2", {}, "More"), el("p", {}, el("a", { href: data.tlparse }, "tlparse's report"), " of the same compilation")]);
}

const happened = (run) => run.calls.length || run.events.length;

function planTable(plans) {
  const events = data.runs.flatMap((run) => run.events);
  const rows = plans.flatMap((plan) => plan.components);
  if (!rows.length) {
    for (const entry of entries) {
      const role = entry.component.split(" ");
      if (!rows.some((row) => row.name === entry.component)) rows.push({ name: entry.component, role: role[0], qualname: role.slice(1).join(" "), cls: entry.cls, decision: "compile", reason: "" });
    }
  }
  return table(["!component", "!class", "decision", "because", "#graphs", "#runs timed"], rows.map((row) => {
    const name = `${row.role} ${row.qualname}`.trim();
    const mine = entries.filter((entry) => entry.component === name);
    const fell = events.filter((event) => event.component === name && ["fallback", "budget", "sentinel"].includes(event.kind)).pop();
    return [[el("div", {}, row.role), el("code", { class: "soft" }, row.qualname)], el("code", {}, row.cls),
      fell ? chip("runs eager", "warn") : chip(row.decision, row.decision === "compile" ? "good" : ""),
      [row.reason, fell ? el("p", { class: "soft" }, fell.message, fell.data?.remedy ? ` ${fell.data.remedy}` : "") : row.remedy ? el("p", { class: "soft" }, row.remedy) : null], mine.length ? String(mine.length) : "", callsSaid(name)];
  }));
}

function callsSaid(component) {
  const timed = data.runs.map((run) => run.timed[component]).filter(Boolean);
  if (!timed.length) return "";
  const [calls, middle] = timed[timed.length - 1];
  return [calls.toLocaleString("en"), el("div", { class: "soft" }, `median ${seconds(middle)}`)];
}

function graphTable() {
  return table(["!graph", "dynamic dims", "#operations", "#kernel calls", "#estimate", "#compiled in"], entries.map((entry) => {
    const labels = [...new Set(entry.arguments.flatMap(([, , dims]) => dims.filter((dim) => typeof dim === "string")))];
    return [[el("a", { href: `#e${entry.number}/graph` }, entry.id), el("div", { class: "soft" }, entry.cls)], labels.length ? labels.map((label) => [chip(label), " "]) : el("span", { class: "soft" }, "none"),
      entry.ops.length.toLocaleString("en"), entry.kernelCalls ? entry.kernelCalls.toLocaleString("en") : "", entry.flops ? short(entry.flops, "FLOP") : "", seconds(entry.seconds)];
  }));
}

const KINDS = [["compile", "compile", /^compile_end$/], ["hit", "loaded from the store", /cache|load/], ["call", "call", /^call/], ["bad", "eager, or a problem", /fallback|budget|sentinel|skipped|failed|eager/], ["other", "something else", /./]];
const kindOf = (event) => KINDS.find(([, , pattern]) => pattern.test(event.kind))[0];

function showEvents(main) {
  fill(main, el("h1", {}, "Events"), el("p", { class: "soft" }, "What happened, in order, each with its reason."));
  for (const run of data.runs) {
    if (!happened(run)) continue;
    const start = firstMoment(run);
    add(main, [el("h2", {}, `Run ${run.name}`), timeline(run), afterCompiles(run), el("h3", {}, "One by one"), table(["#at", "event", "!component", "what and why"], run.events.map((event) => {
      const kind = kindOf(event);
      return [`${(event.time - start).toFixed(2)} s`, chip(event.kind, kind === "bad" ? "warn" : kind === "compile" ? "accent" : kind === "other" ? "" : "good"), el("code", {}, event.component || "model"), [event.message, details(event)]];
    }))]);
  }
  if (!data.runs.some(happened)) add(main, [el("p", {}, "The dump has no events.")]);
}

// Calls are short beside compiles: those after the last one get a time line of their own.
function afterCompiles(run) {
  const last = Math.max(...run.events.filter((event) => kindOf(event) === "compile").map((event) => event.time));
  const calls = run.calls.filter(([, , time, took]) => time - took >= last);
  return calls.length > 1 && Number.isFinite(last) ? [el("h3", {}, "After the last compile"), timeline({ ...run, calls, events: run.events.filter((event) => event.time > last) })] : null;
}

const began = (event) => event.time - (typeof event.data?.seconds === "number" ? event.data.seconds : 0);

const firstMoment = (run) => Math.min(...run.events.map(began), ...run.calls.map(([, , time, took]) => time - took));

function details(event) {
  const rest = Object.entries(event.data || {}).filter(([name, value]) => value !== "" && !["seconds", "reason", "difference"].includes(name) && !String(event.message).includes(String(value)));
  if (!rest.length) return null;
  return el("div", { class: "soft" }, rest.map(([name, value]) => el("div", {}, `${name}: `, el("span", { class: "code" }, Array.isArray(value) ? value.slice(0, 6).join(", ") + (value.length > 6 ? ` and ${value.length - 6} more` : "") : typeof value === "object" ? JSON.stringify(value) : String(value)))));
}

function timeline(run) {
  const calls = run.calls.map(([component, entry, time, took]) => ({ kind: "call", component, message: `${lastPart(entry)}, ${seconds(took)}`, time, data: { seconds: took } }));
  const events = [...calls, ...run.events.filter((event) => !["compile_start", "attached", "removed"].includes(event.kind))];
  const names = [...new Set(events.map((event) => event.component || "model"))];
  const long = names.filter((name) => !names.some((other) => other !== name && other.startsWith(`${name} `)));
  const laneOf = (name) => Math.max(long.findIndex((other) => other === name || other.startsWith(`${name} `)), 0);
  if (!events.length) return null;
  const start = firstMoment(run);
  const end = Math.max(...events.map((event) => event.time), start + 1e-3);
  const [left, width, lane] = [240, 760, 34];
  const x = (t) => left + (t - start) / (end - start) * (width - 12);
  const picture = svg("svg", { class: "time", viewBox: `0 0 ${left + width} ${long.length * lane + 34}`, role: "img", "aria-label": "time line of compiles and calls" });
  const step = niceStep((end - start) / 6);
  for (let t = 0; t <= end - start + step * 0.01; t += step) {
    add(picture, [svg("line", { class: "grid", x1: x(start + t), x2: x(start + t), y1: 0, y2: long.length * lane + 8 }),
      svg("text", { x: x(start + t), y: long.length * lane + 26, "text-anchor": "middle" }, `${+t.toPrecision(4)} s`)]);
  }
  long.forEach((name, i) => add(picture, [svg("text", { class: "lane", x: left - 14, y: i * lane + 22, "text-anchor": "end" }, name.length > 34 ? `${name.slice(0, 33)}…` : name)]));
  for (const event of events) {
    const kind = kindOf(event);
    const y = laneOf(event.component || "model") * lane + 6;
    const span = event.time - began(event) > 0;
    const shape = span ? svg("rect", { class: kind, x: x(began(event)), y, width: Math.max(x(event.time) - x(began(event)), 2), height: 20, rx: 4 }) : svg("circle", { class: kind, cx: x(event.time), cy: y + 10, r: kind === "bad" ? 5 : 3.5 });
    shape.append(svg("title", {}, `${event.kind}: ${event.message}`));
    picture.append(shape);
  }
  const used = KINDS.filter(([kind]) => events.some((event) => kindOf(event) === kind));
  return el("div", {}, picture, el("div", { class: "legend" }, used.map(([kind, said]) => el("span", {}, el("i", { class: kind }), said))));
}

function niceStep(step) {
  const size = 10 ** Math.floor(Math.log10(step));
  return [1, 2, 5, 10].find((n) => n * size >= step) * size;
}
