// One entry: its graph, kernels, inputs, guards and texts.
const TABS = [["graph", "Graph"], ["kernels", "Kernels"], ["inputs", "Inputs"], ["guards", "Guards"], ["code", "Bytecode"]];
const states = new Map(); // what is open in an entry stays open

function showEntry(main, number, tab, target) {
  const entry = entries[number];
  main.classList.add("wide");
  const at = `#e${number}`;
  const head = el("div", { class: "entryhead" },
    el("h1", {}, entry.component), el("div", {}, chip(entry.cls, "accent"), chip(entry.label, "extra"), chip(entry.road === "ahead" ? "native package, ahead of time" : `JIT: ${entry.backend}`),
      chip(count(entry.ops.length, "operation")), chip(kernelsSaid(entry), "extra"), chip(`compiled in ${seconds(entry.seconds)}`),
      entry.max_error ? chip(`differs from eager by at most ${entry.max_error.toExponential(1)}`, "extra") : null),
    entry.why_jit ? el("p", { class: "soft" }, `Not lowered ahead of time: ${entry.why_jit}`) : null,
    el("nav", { class: "tabs", "aria-label": "Views" }, TABS.map(([name, title]) =>
      el("a", { href: `${at}/${name}`, "aria-current": name === tab ? "page" : undefined }, tabTitle(entry, name, title)))));
  const body = el("div", { class: "body" });
  fill(main, head, body);
  if (tab === "graph" || tab === "kernels") showParts(body, entry, tab, target);
  else {
    body.classList.add("single");
    fill(body, el("div", { class: "pane padded" }, tab === "inputs" ? inputsView(entry) : tab === "guards" ? guardsView(entry) : codeView(entry)));
  }
}

function kernelsSaid(entry) {
  const calls = count(entry.kernelCalls, "kernel call");
  return entry.kernelCalls > entry.kernels.length ? `${calls}, ${entry.kernels.length} of them distinct` : calls;
}

function tabTitle(entry, name, title) {
  if (name === "kernels") return `${title} ${entry.kernels.length}`;
  if (name === "guards") return `${title} ${entry.guards.reduce((sum, row) => sum + row[3], 0)}`;
  return title;
}

function showParts(body, entry, tab, target) {
  const at = `#e${entry.number}`;
  const jump = (what, index) => {
    const hash = what === "op" ? `${at}/graph/${entry.ops[index].name}` : `${at}/kernels/${index}`;
    if (location.hash === hash) route();
    else location.hash = hash;
  };
  const inspector = new Inspector(entry, jump);
  const pane = el("div", { class: "pane" });
  fill(body, pane, inspector.box);
  if (tab === "kernels") {
    fill(pane, kernelList(entry, Number(target), jump));
    if (target) inspector.kernel(Number(target));
    pane.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "center" });
    return;
  }
  if (!entry.ops.length) {
    fill(pane, el("p", { class: "notice" }, `This entry has no graph in the dump. ${(entry.notes || []).join(" ")}`));
    return;
  }
  const chosen = (node) => {
    if (node.op !== undefined) {
      inspector.op(node.op);
      history.replaceState(null, "", `${at}/graph/${entry.ops[node.op].name}`);
    } else inspector.module(node);
  };
  const outline = states.get(entry) || new Outline(entry, chosen);
  outline.select = chosen;
  states.set(entry, outline);
  fill(pane, outline.box);
  if (target && entry.byName.has(target)) outline.reveal(entry.byName.get(target));
  else if (outline.selected) outline.select(outline.selected);
  outline.box.focus({ preventScroll: true });
}

function kernelList(entry, chosen, jump) {
  if (!entry.kernels.length) return el("p", { class: "notice" }, "No kernels: the backend generated no code, or it is not in the dump.");
  const most = Math.max(...entry.kernels.map((kernel) => kernel.lowered.length), 1);
  return el("div", { class: "rows kernels", role: "listbox", "aria-label": "Kernels in the order in which they run" }, entry.kernels.map((kernel) => {
    const bar = el("i", { class: "bar" });
    bar.style.width = `${Math.max(2, kernel.lowered.length / most * 44)}px`;
    const name = kernel.name.replace(/^cpp_fused_|^triton_\w+?_fused_/, "");
    return el("div", { class: `row op ${kernel.library ? "library" : ""}`, role: "option", "data-kernel": kernel.index, "aria-selected": String(kernel.index === chosen), title: kernel.name, onclick: () => jump("kernel", kernel.index) },
      el("span", { class: "number" }, String(kernel.index + 1)),
      el("div", { class: "name" }, el("span", { class: "title" }, name), kernel.times > 1 ? el("span", { class: "fold" }, `× ${kernel.times}`) : null, kernel.special ? el("span", { class: "is" }, "frequent sizes") : null),
      el("span", { class: "type" }, commonModule(kernel.ops.map((i) => entry.ops[i].module))),
      el("span", { class: "share" }, count(kernel.lowered.length, "op"), bar));
  }));
}

// The module that all of them are in.
function commonModule(modules) {
  const paths = [...new Set(modules)].map((module) => module.split("."));
  const first = paths[0] || [];
  let n = 0;
  while (n < first.length && paths.every((path) => path[n] === first[n])) n += 1;
  return first.slice(0, n).join(".");
}

function inputsView(entry) {
  const dims = foldRows(entry.arguments).map(([[path, dtype, dims, example], times]) => [[el("code", {}, path), " ", times > 1 ? el("span", { class: "fold", title: "and the same of the other blocks" }, `× ${times}`) : null], dtype,
    el("code", {}, `[${dims.join(", ")}]`), el("code", { class: "soft" }, example.length ? `[${example.join(", ")}]` : "")]);
  const facts = [...Object.entries(entry.key).map(([k, v]) => [el("code", {}, k), v]), ...Object.entries(entry.modes).map(([k, v]) => [k, v])];
  return [el("h2", {}, "Arguments"), el("p", { class: "soft" }, "A dim is the label under which it varies, or the one size that the entry is for."),
    table(["!tensor", "dtype", "!dims", "traced with"], dims),
    el("h2", {}, "Call key"), el("p", { class: "soft" }, "Calls with the same key share the entry, if their sizes meet the conditions."), table(["!part", "value"], facts),
    entry.texts.conditions ? [el("h2", {}, "Conditions on sizes"), el("pre", { class: "text" }, entry.texts.conditions)] : null];
}

function guardsView(entry) {
  const covers = new Map();
  for (const [, cover, , n] of entry.guards) covers.set(cover || "not said", (covers.get(cover || "not said") || 0) + n);
  const rows = entry.guards.map(([kind, cover, rule, n, names]) => [el("code", {}, kind), [chip(cover || "not said", cover ? "accent" : ""), rule ? el("div", { class: "soft" }, rule) : null], String(n),
    el("span", { class: "code soft" }, names.slice(0, 3).join("  ") + (n > 3 ? " …" : ""))]);
  return [el("h2", {}, "What Dynamo would have checked at every call"),
    el("p", { class: "soft" }, "None of these is evaluated. Each is covered by something else:"),
    el("div", { class: "facts" }, [...covers].sort((a, b) => b[1] - a[1]).map(([cover, n]) => fact(n.toLocaleString("en"), cover))),
    el("h2", {}, "One by one"),
    rows.length ? table(["!guard", "covered by", "#how many", "of what, for example"], rows) : el("p", {}, "The dump has no guards of this entry.")];
}

function codeView(entry) {
  return [el("h2", {}, "Transformed bytecode"), el("p", { class: "soft" }, "What Dynamo made of the traced function, as Python through depyf where it is installed."),
    entry.texts.bytecode ? el("pre", { class: "text" }, entry.texts.bytecode) : el("p", {}, "Not in the dump."),
    (entry.notes || []).length ? [el("h2", {}, "Notes"), entry.notes.map((note) => el("p", { class: "notice" }, note))] : null];
}
