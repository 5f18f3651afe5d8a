// Two entries side by side, aligned by operation, module, type and line of the model.
const MOST_CHANGES = 3000;
const MOST_FACTS = 8;

function showCompare(main, first, second) {
  const a = entries[first] || entries[0];
  const b = entries[second] || entries.find((e) => e !== a && e.component === a.component) || entries.find((e) => e !== a) || a;
  const choice = (chosen, other, isFirst) => el("select", { "aria-label": isFirst ? "first entry" : "second entry",
    onchange: (e) => { location.hash = isFirst ? `#compare/${e.target.value}/${other}` : `#compare/${other}/${e.target.value}`; } },
  entries.map((entry) => el("option", { value: entry.number, selected: entry === chosen }, `${entry.id}${entry.run ? ` (${entry.run})` : ""}`)));
  fill(main, el("h1", {}, "Side by side"), el("div", { class: "picker" }, choice(a, b.number, true), choice(b, a.number, false)));
  const facts = factsOf(a, b);
  const told = (some) => el("div", { class: "pair" }, table(["!", "first", "second"], some.map(([what, x, y]) => [what, el("code", {}, x), el("code", {}, y)])));
  if (facts.length) add(main, [el("h2", {}, "The calls"), told(facts.slice(0, MOST_FACTS)),
    facts.length > MOST_FACTS ? el("details", {}, el("summary", { class: "soft" }, `and ${facts.length - MOST_FACTS} more`), told(facts.slice(MOST_FACTS))) : null]);
  const changes = align(a.ops, b.ops);
  if (changes === null) return add(main, [el("h2", {}, "The graphs"), el("p", { class: "soft" }, "They have too little in common to be aligned.")]);
  const differ = changes.some((change) => change.kind !== "equal");
  add(main, [el("h2", {}, "The graphs"), differ ? sidesOf(a, b, changes) : el("p", { class: "soft" }, `All ${count(a.ops.length, "operation")} are the same.`)]);
}

function factsOf(a, b) {
  const facts = [];
  const note = (what, x, y) => { if (String(x) !== String(y)) facts.push([what, String(x ?? "absent"), String(y ?? "absent")]); };
  for (const [field, said] of [["component", "component"], ["cls", "class"], ["backend", "backend"], ["road", "road of lowering"]]) note(said, a[field], b[field]);
  for (const part of ["key", "modes"]) for (const name of new Set([...Object.keys(a[part]), ...Object.keys(b[part])])) note(name, a[part][name], b[part][name]);
  const rows = [a, b].map((entry) => new Map(entry.arguments.map(([path, dtype, dims]) => [path, `${dtype} [${dims.join(", ")}]`])));
  for (const path of new Set([...rows[0].keys(), ...rows[1].keys()])) note(path, rows[0].get(path), rows[1].get(path));
  return foldRows(facts).map(([[what, x, y], times]) => [times > 1 ? `${what} (× ${times})` : what, x, y]);
}

const alike = (op) => [op.op, op.module, op.source[0], op.source[3], op.type.replace(/[a-z_]\w*(\.\d+)?/g, "*")].join("\n");

// Myers' greedy algorithm: the shortest edit between two lists of operations.
function align(a, b) {
  const x = a.map(alike);
  const y = b.map(alike);
  const trace = [];
  let reach = new Map([[1, 0]]);
  for (let d = 0; d <= Math.min(x.length + y.length, MOST_CHANGES); d += 1) {
    trace.push(new Map(reach));
    for (let k = -d; k <= d; k += 2) {
      let i = k === -d || (k !== d && (reach.get(k - 1) ?? -1) < (reach.get(k + 1) ?? -1)) ? reach.get(k + 1) ?? 0 : (reach.get(k - 1) ?? 0) + 1;
      let j = i - k;
      while (i < x.length && j < y.length && x[i] === y[j]) { i += 1; j += 1; }
      reach.set(k, i);
      if (i >= x.length && j >= y.length) return runs(trace, a, b, d);
    }
    if (d * d > 4_000_000) break;
  }
  return null;
}

function runs(trace, a, b, last) {
  let i = a.length;
  let j = b.length;
  const steps = [];
  for (let d = last; d >= 0; d -= 1) {
    const reach = trace[d];
    const k = i - j;
    const down = k === -d || (k !== d && (reach.get(k - 1) ?? -1) < (reach.get(k + 1) ?? -1));
    const from = down ? k + 1 : k - 1;
    const i0 = d === 0 ? 0 : reach.get(from) ?? 0;
    const j0 = d === 0 ? 0 : i0 - from;
    while (i > i0 && j > j0) steps.push(["equal", --i, --j]);
    if (d > 0) steps.push(down ? ["new", i, --j] : ["gone", --i, j]);
  }
  const out = [];
  for (const [kind, left, right] of steps.reverse()) {
    const kindOf = kind === "equal" ? "equal" : "change";
    if (!out.length || out[out.length - 1].kind !== kindOf) out.push({ kind: kindOf, left: [], right: [] });
    if (kind !== "new") out[out.length - 1].left.push(left);
    if (kind !== "gone") out[out.length - 1].right.push(right);
  }
  return out;
}

function sidesOf(a, b, changes) {
  const box = el("div", { class: "sides" });
  const cell = (entry, index, side, kind) => {
    if (index === undefined) return el("div", { class: side });
    const op = entry.ops[index];
    return el("div", { class: `${side} ${kind}` }, el("a", { href: `#e${entry.number}/graph/${op.name}` }, op.name), ` = ${op.op} ${op.type}`,
      el("small", {}, `${lastPart(op.source[0])}:${op.source[1]}  ${op.source[3]}`));
  };
  const pairs = (change, left, right) => Array.from({ length: Math.max(change.left.length, change.right.length) }, (_, n) =>
    [cell(a, change.left[n], "left", left), cell(b, change.right[n], "right", right)]).flat();
  for (const change of changes) {
    if (change.kind === "equal") {
      const fold = el("div", { class: "equal", role: "button", tabindex: "0", onclick: () => fold.replaceWith(...pairs(change, "", "")) }, `${count(change.left.length, "operation")} the same`);
      box.append(fold);
    } else add(box, pairs(change, "gone", "new"));
  }
  return box;
}
