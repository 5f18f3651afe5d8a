// Elements are made of text alone: nothing that a dump says is ever parsed as markup.
const data = JSON.parse(document.getElementById("data").textContent);

function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  add(made, children);
  return made;
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  add(made, children);
  return made;
}

function add(parent, children) {
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) parent.append(child);
  }
}

function fill(parent, ...children) {
  parent.replaceChildren();
  add(parent, children);
}

const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : noun.endsWith("y") ? "" : "s"}`.replace(/(\d) entry$/, (m, d) => n === 1 ? m : `${d} entries`);

function short(n, unit) {
  const steps = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const [size, letter] = steps.find(([s]) => n >= s) || [1, ""];
  const value = n / size;
  return `${value >= 100 || size === 1 ? Math.round(value) : value.toFixed(1)} ${letter}${unit}`;
}

const seconds = (s) => s === null || s === undefined ? "" : s >= 100 ? `${Math.round(s)} s` : s >= 1 ? `${s.toFixed(1)} s` : `${(s * 1000).toFixed(s >= 0.01 ? 0 : 2)} ms`;
const lastPart = (path) => path.slice(path.lastIndexOf("/") + 1);
const chip = (text, kind) => el("span", { class: `chip ${kind || ""}` }, text);
const fact = (number, said) => el("div", { class: "fact" }, el("b", {}, number), el("span", {}, said));

// Rows that differ in numbers only become one, with how many they are: [row, count].
function foldRows(rows) {
  const found = new Map();
  for (const row of rows) {
    const key = JSON.stringify(row).replace(/\[\d+\]|\.\d+(?=\.)/g, "#");
    if (found.has(key)) found.get(key)[1] += 1;
    else found.set(key, [row, 1]);
  }
  return [...found.values()];
}

// A head that begins with # is of numbers, with ! of what must not be broken.
const styleOf = (head) => head.startsWith("#") ? "num" : head.startsWith("!") ? "keep" : undefined;

function table(heads, rows) {
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { class: styleOf(head) }, head.replace(/^[#!]/, ""))))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => el("td", { class: styleOf(heads[i]), "data-head": heads[i].replace(/^[#!]/, "") }, cell)))))));
}
