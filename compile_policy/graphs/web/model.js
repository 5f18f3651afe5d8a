// Entries as objects: rows of the data, read by name.
class Entry {
  constructor(raw, number) {
    Object.assign(this, raw, { number });
    this.ops = raw.ops.map((row, i) => ({
      index: i, name: row[0], op: raw.strings[row[1]], type: raw.strings[row[2]], module: raw.strings[row[3]],
      source: raw.sources[row[4]], inputs: row[5], kernels: row[6], lowered: row[7], flops: row[8], bytes: row[9], users: [],
    }));
    for (const op of this.ops) for (const from of op.inputs) if (from >= 0) this.ops[from].users.push(op.index);
    this.kernels = raw.kernels.map((row, i) => ({
      index: i, name: row[0], graph: row[1], times: row[2], lowered: row[3], ops: row[4], code: raw.codes[row[5]] || "", bytes: row[6], special: row[7],
      library: /^(extern_kernels\.|torch\.ops\.|aten\.|aoti_torch_)/.test(row[0]),
    }));
    this.flops = this.ops.reduce((sum, op) => sum + op.flops, 0);
    this.byName = new Map(this.ops.map((op) => [op.name, op.index]));
    this.kernelCalls = this.kernels.reduce((sum, kernel) => sum + (kernel.special ? 0 : kernel.times), 0);
    this.label = this.id.slice(this.id.lastIndexOf("/") + 1);
  }

  get tree() {
    return (this.made ||= makeTree(this));
  }
}

const entries = data.entries.map((raw, i) => new Entry(raw, i));

// A tree of modules in the order in which their operations run. A list of modules and its members are one step.
function makeTree(entry) {
  const root = { title: "", path: "", children: [], ops: entry.ops.map((op) => op.index), depth: 0, parent: null };
  grow(entry, root, "");
  return root;
}

function grow(entry, node, prefix) {
  let at = 0;
  while (at < node.ops.length) {
    const first = node.ops[at];
    const step = nextStep(entry.ops[first].module, prefix);
    if (step === "") {
      node.children.push({ op: first, ops: [first], depth: node.depth + 1, parent: node, children: [] });
      at += 1;
      continue;
    }
    const path = prefix ? `${prefix}.${step}` : step;
    const ops = [];
    while (at < node.ops.length && nextStep(entry.ops[node.ops[at]].module, prefix) === step) ops.push(node.ops[at++]);
    const child = { title: step, path, cls: entry.modules[path] || "", ops, depth: node.depth + 1, parent: node, children: [] };
    grow(entry, child, path);
    node.children.push(child);
  }
  node.children = folded(entry, node);
}

function nextStep(module, prefix) {
  if (prefix && module !== prefix && !module.startsWith(`${prefix}.`)) return "";
  const rest = (prefix ? module.slice(prefix.length + 1) : module).split(".");
  let step = rest[0];
  for (let i = 1; i < rest.length && /^\d+$/.test(rest[i]); i += 1) step += `.${rest[i]}`;
  return step;
}

// Blocks that follow one another and do the same become one row that shows one of them.
function folded(entry, node) {
  const out = [];
  for (let i = 0; i < node.children.length;) {
    const child = node.children[i];
    const base = numberless(child.title);
    let j = i + 1;
    if (base !== null) {
      const mine = form(entry, child);
      while (j < node.children.length && numberless(node.children[j].title) === base && form(entry, node.children[j]) === mine) j += 1;
    }
    if (j - i > 1) {
      const blocks = node.children.slice(i, j);
      out.push({ ...child, blocks, shown: 0, ops: blocks.flatMap((block) => block.ops), children: child.children, first: child });
      for (const block of blocks) block.fold = out[out.length - 1];
    } else {
      out.push(child);
    }
    i = j;
  }
  return out;
}

const numberless = (title) => title && /\.\d+$/.test(title) ? title.replace(/\d+$/, "") : null;

function form(entry, node) {
  // Arithmetic with sizes stands where it is needed first, so it says nothing about a block.
  const isSize = (op) => !op.type && !op.users.some((user) => entry.ops[user].op === "getitem");
  return (node.form ||= node.ops.map((i) => entry.ops[i]).filter((op) => !isSize(op))
    .map((op) => `${op.op} ${op.type} ${op.module.slice(node.path.length)}`).join("\n"));
}

const inside = (node) => node.blocks ? node.blocks[node.shown].children : node.children;
