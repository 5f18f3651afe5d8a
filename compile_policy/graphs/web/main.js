// Which view the address asks for, and keys that work everywhere.
const main = document.getElementById("main");

function route() {
  const [view, ...rest] = decodeURIComponent(location.hash.slice(1)).split("/");
  main.classList.remove("wide");
  const entry = /^e(\d+)$/.exec(view);
  if (entry && entries[Number(entry[1])]) showEntry(main, Number(entry[1]), TABS.some(([name]) => name === rest[0]) ? rest[0] : "graph", rest.slice(1).join("/"));
  else if (view === "events") showEvents(main);
  else if (view === "compare" && entries.length) showCompare(main, Number(rest[0] || 0), rest[1] === undefined ? -1 : Number(rest[1]));
  else showOverview(main);
  if (!main.classList.contains("wide")) main.scrollTop = 0;
  const current = entry ? `#e${entry[1]}` : `#${["events", "compare"].includes(view) ? view : "overview"}`;
  for (const link of document.querySelectorAll("#side a")) {
    if (link.getAttribute("href").split("/")[0] === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function drawSide() {
  const side = document.getElementById("side");
  const links = [["overview", "Overview"], ["events", "Events"], ...(entries.length > 1 ? [["compare", "Side by side"]] : [])];
  fill(side, links.map(([name, title]) => el("a", { href: `#${name}` }, title)));
  let component = null;
  for (const entry of entries) {
    if (entry.component !== component) add(side, [el("h3", {}, (component = entry.component))]);
    add(side, [el("a", { href: `#e${entry.number}/graph` }, el("span", { class: "role" }, `${entry.component.split(" ")[0]} `), entry.label, " ", el("span", { class: "soft" }, count(entry.ops.length, "op")))]);
  }
}

function setUpTheme() {
  const button = document.getElementById("theme");
  const names = { "": "System", dark: "Dark", light: "Light" };
  const set = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    button.textContent = names[theme];
  };
  const next = () => {
    const all = Object.keys(names);
    set(all[(all.indexOf(document.documentElement.dataset.theme || "") + 1) % all.length]);
  };
  button.addEventListener("click", next);
  return next;
}

const nextTheme = setUpTheme();
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const here = /^#e(\d+)/.exec(location.hash);
  if (event.key === "/") document.getElementById("search").select();
  else if (event.key === "t") nextTheme();
  else if (event.key === "]" && entries.length) location.hash = `#e${here ? Math.min(Number(here[1]) + 1, entries.length - 1) : 0}/graph`;
  else if (event.key === "[" && here) location.hash = `#e${Math.max(Number(here[1]) - 1, 0)}/graph`;
  else return;
  event.preventDefault();
});
window.addEventListener("hashchange", route);
drawSide();
setUpSearch();
route();
document.documentElement.dataset.ready = String(Math.round(performance.now()));
