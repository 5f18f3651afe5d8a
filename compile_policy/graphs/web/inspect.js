// What is to be said of one operation, kernel or module, each with links to the others.
class Inspector {
  constructor(entry, jump) {
    this.entry = entry;
    this.jump = jump;
    this.box = el("aside", { class: "inspector empty", "aria-label": "Details", "aria-live": "polite" });
    this.nothing();
  }

  nothing() {
    this.box.classList.add("empty");
    const keys = [["/", "search everything"], ["↑ ↓", "go through the rows"], ["→ ←", "open and close"], ["[ ]", "entry before, next entry"], ["t", "dark, light, as the system"]];
    fill(this.box, el("div", { class: "hint" },
      el("p", {}, "Choose an operation for the line of the model that it comes from, what it was lowered to, and the kernel that it is in."),
      el("dl", {}, keys.map(([key, said]) => [el("dt", {}, key.split(" ").map((k) => el("kbd", {}, k))), el("dd", {}, said)]))));
  }

  show(...children) {
    this.box.classList.remove("empty");
    const close = el("button", { class: "close", "aria-label": "close", onclick: () => this.box.classList.add("empty") }, "×");
    fill(this.box, close, children);
    this.box.scrollTop = 0;
  }

  op(index) {
    const op = this.entry.ops[index];
    const cost = op.flops || op.bytes ? `${short(op.flops, "FLOP")}, ${short(op.bytes, "B")} on the traced sizes` : "moves no data";
    this.show(
      el("h1", {}, op.name), el("div", { class: "code soft" }, `${op.op} → ${op.type || "no tensor"}`),
      el("div", { class: "chain" }, el("span", {}, op.module || "the component itself"), el("span", {}, "·"), el("span", {}, cost)),
      el("h3", {}, "Line of the model"), this.source(op.source),
      el("h3", {}, "Lowered to"), op.lowered.length ? this.lowered(op.lowered) : this.gone(),
      el("h3", {}, op.kernels.length === 1 ? "Kernel" : "Kernels"), op.kernels.length ? this.kernels(op.kernels) : this.noKernel(),
      el("h3", {}, "Reads"), this.links(op.inputs), el("h3", {}, "Read by"), this.links(op.users));
  }

  gone() {
    const said = this.entry.lowered.length
      ? "Not in the lowered graph under its own name: it changes nothing, only shapes, or is worked out once together with an equal one."
      : "The dump has no lowered graph of this entry.";
    return el("p", { class: "soft" }, said);
  }

  noKernel() {
    const said = this.entry.kernels.length
      ? "None of its own: a view, or part of what an equal operation already does."
      : "The backend generated no code, or it is not in the dump.";
    return el("p", { class: "soft" }, said);
  }

  kernel(index) {
    const kernel = this.entry.kernels[index];
    const lines = new Map();
    for (const i of kernel.ops) {
      const source = this.entry.ops[i].source;
      const key = `${source[0]}:${source[1]}`;
      if (!lines.has(key)) lines.set(key, { source, ops: [] });
      lines.get(key).ops.push(i);
    }
    const sorted = [...lines.values()].sort((a, b) => a.source[0].localeCompare(b.source[0]) || a.source[1] - b.source[1]);
    this.show(
      el("h1", {}, kernel.name),
      el("div", {}, chip(kernel.library ? "library" : "generated", "accent"), " ", chip(count(kernel.lowered.length, "lowered operation")), " ",
        kernel.bytes ? [chip(`moves about ${short(kernel.bytes, "B")}`), " "] : null, kernel.times > 1 ? [chip(`runs in ${kernel.times} blocks`), " "] : null, kernel.special ? chip("in calls of frequent sizes") : null),
      el("h3", {}, "Lines of the model"),
      sorted.length ? sorted.map(({ source, ops }) => el("button", { class: "line", onclick: () => this.jump("op", ops[0]) },
        el("span", { class: "code" }, source[3] || "(line not known)"),
        el("span", { class: "soft" }, `${lastPart(source[0])}:${source[1]} · ${this.names(ops)}`)))
        : el("p", { class: "soft" }, "Which operations are in it was not recorded."),
      kernel.lowered.length ? [el("h3", {}, "Lowered operations"), this.lowered(kernel.lowered)] : null,
      el("h3", {}, "Code"),
      kernel.code ? [this.copy(kernel.code), el("pre", { class: "text" }, kernel.code)]
        : el("p", { class: "soft" }, kernel.library ? "A library's kernel; nothing was generated." : "Not on this page; the dump's folder lowered/ has it."));
  }

  names(ops) {
    const names = ops.map((i) => this.entry.ops[i].name);
    return names.slice(0, 4).join(", ") + (names.length > 4 ? ` and ${names.length - 4} more` : "");
  }

  module(node) {
    const kinds = new Map();
    for (const i of node.ops) {
      const op = this.entry.ops[i];
      const known = kinds.get(op.op) || [0, 0];
      kinds.set(op.op, [known[0] + 1, known[1] + op.flops]);
    }
    const kernels = [...new Set(node.ops.flatMap((i) => this.entry.ops[i].kernels))].sort((a, b) => a - b);
    const flops = node.ops.reduce((sum, i) => sum + this.entry.ops[i].flops, 0);
    const rows = [...kinds].sort((a, b) => b[1][1] - a[1][1] || b[1][0] - a[1][0]).map(([op, [n, f]]) => [el("code", {}, op), String(n), f ? short(f, "FLOP") : ""]);
    this.show(
      el("h1", {}, node.blocks ? `${node.blocks[0].path} … ${node.blocks[node.blocks.length - 1].title}` : node.path),
      el("div", {}, chip(node.cls || "list of modules", "accent"), " ", chip(count(node.ops.length, "operation")), " ", chip(short(flops, "FLOP")), " ",
        node.blocks ? chip(`${node.blocks.length} blocks that do the same`) : null),
      el("h3", {}, "Operations"), table(["operation", "#how many", "#estimate"], rows),
      kernels.length ? [el("h3", {}, count(kernels.length, "kernel call")), this.kernels(kernels.slice(0, 60))] : null);
  }

  source([file, line, name, code, caller]) {
    if (!file) return el("p", { class: "soft" }, "Not known: the operation was made by the compiler.");
    const around = this.entry.context[file] || {};
    const numbers = Object.keys(around).map(Number).filter((n) => Math.abs(n - line) <= 4);
    const lines = numbers.includes(line) ? numbers.sort((a, b) => a - b).map((n) => [n, around[n]]) : [[line, code]];
    const indent = Math.min(...lines.map(([, text]) => text.match(/^\s*/)[0].length));
    return [el("div", { class: "source" },
      el("div", { class: "file" }, el("span", {}, `${file}:${line}`), el("span", {}, `in ${name}`)),
      el("pre", {}, lines.map(([n, text]) => el("span", { class: n === line ? "l hit" : "l" }, el("i", {}, String(n)), text.slice(indent))))),
    caller ? el("div", { class: "called" }, "called by ", el("span", { class: "code" }, caller)) : null];
  }

  lowered(numbers) {
    const rows = numbers.map((n) => this.entry.lowered[n]).filter(Boolean).map(([name, type, text]) =>
      el("div", { class: "aten code" }, el("b", {}, name), el("span", { class: "soft" }, type ? `: ${type} = ` : " = "), text.replace("torch.ops.", "")));
    if (rows.length <= 8) return rows;
    return el("details", {}, el("summary", {}, count(rows.length, "operation")), rows);
  }

  kernels(numbers) {
    return numbers.map((n) => {
      const kernel = this.entry.kernels[n];
      return el("button", { class: "kernel", "data-kernel": n, onclick: () => this.jump("kernel", n) }, el("span", { class: "code" }, kernel.name),
        el("span", { class: "soft" }, `${kernel.library ? "library" : "generated"} · ${count(kernel.lowered.length, "operation")}${kernel.special ? " · in calls of frequent sizes" : ""}`));
    });
  }

  links(numbers) {
    if (!numbers.length) return el("p", { class: "soft" }, "nothing in the graph");
    const shown = numbers.slice(0, 40).map((n) => {
      if (n < 0) {
        const [name, is, type] = this.entry.inputs[-1 - n];
        return el("span", { class: "link soft", title: `${name}: ${type}` }, is);
      }
      return el("button", { class: "link", onclick: () => this.jump("op", n) }, this.entry.ops[n].name);
    });
    return el("div", { class: "links" }, shown, numbers.length > 40 ? el("span", { class: "soft" }, `and ${numbers.length - 40} more`) : null);
  }

  copy(text) {
    const button = el("button", { class: "copy", onclick: () => navigator.clipboard?.writeText(text).then(() => { button.textContent = "copied"; }) }, "copy");
    return button;
  }
}
