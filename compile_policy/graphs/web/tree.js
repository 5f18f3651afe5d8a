// The graph as rows: modules that open, blocks that are folded, and arcs for data that skips rows.
const ROW = 28;

class Outline {
  constructor(entry, select) {
    this.entry = entry;
    this.select = select;
    this.open = new Set();
    this.selected = null;
    this.box = el("div", { class: "rows", role: "tree", tabindex: "0", "aria-label": "Graph", onkeydown: (e) => this.key(e) });
    for (const node of entry.tree.children) if (entry.tree.children.length < 3 && !node.blocks) this.open.add(node);
    this.draw();
  }

  visible() {
    const rows = [];
    const walk = (nodes, depth) => {
      for (const node of nodes) {
        rows.push({ node, depth });
        if (node.op === undefined && this.open.has(node)) walk(inside(node), depth + 1);
      }
    };
    walk(this.entry.tree.children, 0);
    return rows;
  }

  draw() {
    this.rows = this.visible();
    this.owner = new Map();
    this.rows.forEach(({ node }, i) => {
      const open = node.op === undefined && this.open.has(node);
      if (!open) for (const op of node.ops) this.owner.set(op, i);
    });
    fill(this.box, this.arcs(), this.rows.map((row, i) => this.row(row, i)));
  }

  row({ node, depth }, i) {
    const entry = this.entry;
    const isOp = node.op !== undefined;
    const op = isOp ? entry.ops[node.op] : null;
    const flops = node.ops.reduce((sum, o) => sum + entry.ops[o].flops, 0);
    const share = entry.flops ? flops / entry.flops : 0;
    const chosen = this.selected === node;
    const name = el("div", { class: "name" });
    name.style.paddingLeft = `${depth * 1.05}rem`;
    add(name, isOp
      ? [el("span", { class: "twist" }), el("span", { class: "title" }, op.name), el("span", { class: "is" }, op.op)]
      : [el("span", { class: "twist" }, "▶"), el("span", { class: "title" }, this.title(node)), this.fold(node), el("span", { class: "is" }, node.cls)]);
    const bar = el("i", { class: "bar" });
    bar.style.width = `${Math.max(share > 0 ? 2 : 0, share * 44)}px`;
    return el("div", {
      class: `row ${isOp ? "op" : "module"} ${this.near(i) ? "near" : ""}`, role: "treeitem", "data-row": i, "aria-level": depth + 1,
      "aria-selected": String(chosen), "aria-expanded": isOp ? undefined : String(this.open.has(node)),
      title: isOp ? `${op.name} = ${op.op}` : node.path, onclick: () => this.pick(node, true),
    }, name, isOp ? el("span", { class: "type" }, op.type) : null,
    el("span", { class: "share" }, isOp ? (op.flops ? short(op.flops, "FLOP") : "") : count(node.ops.length, "op"), bar));
  }

  title(node) {
    if (!node.blocks) return node.title;
    const path = node.blocks[node.shown].title;
    return this.open.has(node) ? path : `${node.blocks[0].title} … ${node.blocks[node.blocks.length - 1].title.match(/\d+$/)[0]}`;
  }

  fold(node) {
    if (!node.blocks) return null;
    const step = (by) => (event) => {
      event.stopPropagation();
      node.shown = (node.shown + by + node.blocks.length) % node.blocks.length;
      this.draw();
    };
    const pill = el("span", { class: "fold", title: `${node.blocks.length} blocks that do the same` }, `× ${node.blocks.length}`);
    if (!this.open.has(node)) return pill;
    return [el("button", { class: "step", title: "the block before", onclick: step(-1) }, "‹"), pill, el("button", { class: "step", title: "the next block", onclick: step(1) }, "›")];
  }

  pick(node, toggle) {
    if (node.op === undefined && toggle) {
      if (this.open.has(node)) this.open.delete(node);
      else this.open.add(node);
    }
    this.selected = node;
    this.draw();
    this.select(node);
  }

  // Open everything above an operation, and select it.
  reveal(index, quiet) {
    let nodes = this.entry.tree.children;
    for (;;) {
      const node = nodes.find((n) => n.ops.includes(index));
      if (!node) return;
      if (node.op !== undefined) {
        this.selected = node;
        break;
      }
      if (node.blocks) node.shown = node.blocks.findIndex((block) => block.ops.includes(index));
      this.open.add(node);
      nodes = inside(node);
    }
    this.draw();
    if (!quiet) this.select(this.selected);
    this.box.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "center" });
  }

  near(i) {
    return this.lit && this.lit.has(i);
  }

  // Which rows give to and take from which, and the arcs of those that are not neighbours.
  arcs() {
    const edges = new Map();
    for (const op of this.entry.ops) {
      const to = this.owner.get(op.index);
      if (to === undefined) continue;
      for (const input of op.inputs) {
        const from = input >= 0 ? this.owner.get(input) : undefined;
        if (from !== undefined && from !== to) edges.set(`${from} ${to}`, [from, to]);
      }
    }
    const chosen = this.rows.findIndex(({ node }) => node === this.selected);
    this.lit = new Set();
    const drawn = [...edges.values()].map(([a, b]) => ({ a: Math.min(a, b), b: Math.max(a, b), on: a === chosen || b === chosen }));
    for (const edge of drawn) if (edge.on) this.lit.add(edge.a === chosen ? edge.b : edge.a);
    const shown = drawn.length > 500 ? drawn.filter((edge) => edge.on) : drawn;
    shown.sort((x, y) => (x.b - x.a) - (y.b - y.a));
    const lanes = [];
    const width = 44;
    const made = shown.map((edge) => {
      const span = edge.b - edge.a;
      let lane = 0;
      if (span > 1) {
        lane = lanes.findIndex((taken) => taken.every(([a, b]) => edge.b <= a || edge.a >= b));
        if (lane < 0) lane = lanes.push([]) - 1;
        lanes[lane].push([edge.a, edge.b]);
        lane = Math.min(lane, 5) + 1;
      }
      const x = width - 6;
      const y1 = edge.a * ROW + ROW / 2;
      const y2 = edge.b * ROW + ROW / 2;
      const out = x - lane * 6;
      const path = span === 1 ? `M${x} ${y1}V${y2}` : `M${x} ${y1}Q${out} ${y1} ${out} ${y1 + 9}V${y2 - 9}Q${out} ${y2} ${x} ${y2}`;
      return svg("path", { d: path, class: edge.on ? "on" : "" });
    });
    made.sort((p, q) => p.getAttribute("class").length - q.getAttribute("class").length);
    const dots = this.rows.map(({ node }, i) => this.open.has(node) ? null : svg("circle", { cx: width - 6, cy: i * ROW + ROW / 2, r: 2.2, class: i === chosen ? "on" : "" }));
    return svg("svg", { class: "arcs", height: this.rows.length * ROW, viewBox: `0 0 48 ${this.rows.length * ROW}`, preserveAspectRatio: "xMaxYMin meet", "aria-hidden": "true" }, made, dots);
  }

  key(event) {
    const at = this.rows.findIndex(({ node }) => node === this.selected);
    const go = (i) => {
      if (this.rows[i]) this.pick(this.rows[i].node, false);
      this.box.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
    };
    const node = this.selected;
    if (event.key === "ArrowDown" || event.key === "j") go(at + 1);
    else if (event.key === "ArrowUp" || event.key === "k") go(Math.max(at - 1, 0));
    else if ((event.key === "ArrowRight" || event.key === "Enter") && node && node.op === undefined && !this.open.has(node)) this.pick(node, true);
    else if (event.key === "ArrowLeft" && node && this.open.has(node)) this.pick(node, true);
    else if (event.key === "ArrowLeft" && node && at > 0) {
      const depth = this.rows[at].depth;
      for (let i = at; i >= 0; i -= 1) if (this.rows[i].depth < depth) { go(i); break; }
    } else return;
    event.preventDefault();
  }
}
