// Search: whatever has all the words in it, the best known first. Made when it is first used.
const MOST_HITS = 60;
const NUMBER = /\d+/g;
let haystack = null;

function everything() {
  if (haystack) return haystack;
  haystack = [];
  for (const entry of entries) {
    const put = (what, said, where, hash, weight) => haystack.push({ what, said, where, hash, weight, text: `${said} ${where} ${what}`.toLowerCase() });
    const lines = new Map();
    for (const op of entry.ops) {
      const [file, line, , code] = op.source;
      const place = file ? `${lastPart(file)}:${line}` : "";
      put("operation", `${op.name} = ${op.op}`, `${op.type}  ${op.module}  ${place}`, `#e${entry.number}/graph/${op.name}`, 2);
      if (file && !lines.has(place)) lines.set(place, put("line", code, `${place} · ${entry.component}`, `#e${entry.number}/graph/${op.name}`, 1));
    }
    entry.kernels.forEach((kernel, i) => put("kernel", kernel.name, `${entry.component} · ${count(kernel.lowered.length, "operation")}`, `#e${entry.number}/kernels/${i}`, 0));
    const first = new Map();
    for (const op of entry.ops) if (op.module && !first.has(op.module)) first.set(op.module, op.name);
    for (const [module, op] of first) put("module", module, `${entry.modules[module] || ""} · ${entry.component}`, `#e${entry.number}/graph/${op}`, 1);
    put("entry", entry.id, entry.cls, `#e${entry.number}/graph`, 0);
  }
  return haystack;
}

function search(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const found = everything().filter((hit) => words.every((word) => hit.text.includes(word)));
  const groups = new Map(); // what repeated blocks have in common is one hit, the first
  for (const hit of found) {
    const key = hit.said.split(" = ")[0].toLowerCase() === words[0] ? hit : `${hit.what} ${hit.said.replace(/^\S+ = /, "")} ${hit.where}`.replace(NUMBER, "#") + hit.hash.split("/")[0];
    if (groups.has(key)) groups.get(key).times += 1;
    else groups.set(key, Object.assign(hit, { times: 1 }));
  }
  const score = (hit) => hit.weight + (hit.said.toLowerCase().startsWith(words[0]) ? -2 : 0) + (hit.said.toLowerCase().split(/[^a-z0-9_.]+/).includes(words[0]) ? -1 : 0);
  return [...groups.values()].map((hit) => [score(hit), hit]).sort((a, b) => a[0] - b[0]).slice(0, MOST_HITS).map(([, hit]) => hit);
}

function setUpSearch() {
  const input = document.getElementById("search");
  const list = document.getElementById("hits");
  let hits = [];
  let at = 0;
  const close = () => { list.hidden = true; input.setAttribute("aria-expanded", "false"); };
  const go = (hit) => {
    close();
    input.blur();
    if (location.hash === hit.hash) route();
    else location.hash = hit.hash;
  };
  const mark = () => {
    [...list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === at)));
    list.children[at]?.scrollIntoView({ block: "nearest" });
  };
  const draw = () => {
    hits = search(input.value);
    at = 0;
    list.hidden = !input.value.trim();
    input.setAttribute("aria-expanded", String(!list.hidden));
    fill(list, hits.length ? hits.map((hit) => el("li", { role: "option", onmousedown: (e) => { e.preventDefault(); go(hit); } },
      el("span", { class: "what" }, hit.what), el("span", { class: "said code" }, hit.said), el("span", { class: "where" }, hit.times > 1 ? el("span", { class: "fold" }, `× ${hit.times}`) : null, " ", hit.where))) : el("li", { class: "none" }, "Nothing has all of these words."));
    mark();
  };
  input.addEventListener("input", draw);
  input.addEventListener("focus", () => { if (input.value) draw(); });
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") at = Math.min(at + 1, hits.length - 1);
    else if (event.key === "ArrowUp") at = Math.max(at - 1, 0);
    else if (event.key === "Enter" && hits[at]) { go(hits[at]); return; } else if (event.key === "Escape") { close(); input.blur(); return; } else return;
    event.preventDefault();
    mark();
  });
}
