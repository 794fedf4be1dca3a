"use strict";
// Samples and refused records: filtered, paged, opened by link. Whatever is shown is set as text, never as markup.
(() => {
  const PAGE = 24;
  const root = document.getElementById("gallery");
  if (!root) return;
  const data = JSON.parse(document.getElementById("gallery-data").textContent);
  const byKey = new Map();
  const byClip = new Map();
  const items = [...data.samples, ...data.rejected];
  for (const item of items) {
    if (item.key) byKey.set(item.key, item);
    if (!byClip.has(item.clip)) byClip.set(item.clip, item);
    const words = [item.key, item.clip, item.source, item.category, item.reason, item.detail, ...(item.findings ?? [])];
    for (const text of item.texts ?? []) words.push(...text.captions);
    item.haystack = words.filter(Boolean).join("\n").toLowerCase();
  }

  const make = (name, attributes = {}, ...children) => {
    const svg = ["svg", "rect", "line", "title"].includes(name);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(key, value);
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  };
  const seconds = (value) => `${Number(value).toFixed(value < 10 ? 2 : 1)} s`;
  const link = (item) => `#${encodeURIComponent(item.key ?? `record:${item.clip || item.source}`)}`;

  const timeline = (item) => {
    const length = Math.max(item.seconds ?? 0, ...(item.windows ?? []).map((w) => w.start + item.length), 0.001);
    if (!item.windows?.length) return null;
    const at = (value) => ((100 * value) / length).toFixed(2);
    const word = item.windows.length === 1 ? "window" : "windows";
    const words = `Clip of ${seconds(length)} with ${item.windows.length} ${word}` +
      (item.key ? `; this one from ${seconds(item.start)} to ${seconds(item.start + item.length)}` : "");
    const svg = make("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", class: "timeline", role: "img", "aria-label": words });
    svg.append(make("rect", { x: 0, y: 3, width: 100, height: 4, class: "rail" }));
    for (const w of item.windows) {
      const kind = w.status !== "accepted" ? "refused" : w.key === item.key ? "this" : "other";
      const bar = make("rect", { x: at(w.start), y: kind === "this" ? 0 : 2, width: Math.max(0.4, at(item.length)), height: kind === "this" ? 10 : 6, class: kind });
      bar.append(make("title", {}, `${seconds(w.start)}: ${w.status}${w.reason ? ` (${w.reason})` : ""}`));
      svg.append(bar);
    }
    return make("div", { class: "on-clip" }, svg, make("span", { class: "quiet", "aria-hidden": "true" }, words));
  };

  const rows = (pairs) => make("dl", { class: "pairs" }, ...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));

  const captions = (item, whole) => (item.texts ?? []).flatMap((text) => text.captions.slice(0, whole ? undefined : 1).map((caption, place) => {
    const head = whole ? make("span", { class: "quiet" }, `${text.set}${place ? `, variant ${place}` : ""}, ${text.tokens[place] ?? "?"} tokens: `) : null;
    return make("p", { class: whole ? "caption" : "caption short" }, head, caption || "(no words)");
  }));

  const cuts = (item) => (item.texts ?? []).flatMap((text) => text.cut).map(([level, why, sentence]) => make("li", {}, make("span", { class: "quiet" }, `${level}, ${why}: `), sentence));

  const picture = (item, eager) => item.preview
    ? make("img", { src: `data:image/jpeg;base64,${item.preview}`, alt: `Frames of ${item.key} in a row`, loading: eager ? "eager" : "lazy", decoding: "async" })
    : item.key ? make("p", { class: "quiet no-picture" }, data.note_without_picture) : null;

  const badges = (item) => make("p", { class: "badges" },
    item.key ? null : make("span", { class: "badge bad" }, `refused: ${item.stage}/${item.reason}`),
    item.bucket ? make("span", { class: "badge" }, item.bucket) : null,
    item.category ? make("span", { class: "badge" }, item.category) : null,
    item.retryable ? make("span", { class: "badge" }, "a retry can help") : null,
    ...(item.findings ?? []).map((code) => make("span", { class: data.bad.includes(code) ? "badge bad" : "badge warn" }, code)));

  const title = (item) => item.key ?? (item.clip || item.source);

  const card = (item) => make("li", {}, make("article", { class: "card sample", "aria-label": title(item) },
    picture(item, false),
    make("h3", {}, make("a", { href: link(item), class: "mono" }, title(item))),
    badges(item),
    item.detail ? make("p", { class: "caption" }, item.detail) : null,
    ...captions(item, false),
    timeline(item)));

  const one = (item) => {
    const heading = make("h3", { tabindex: "-1", id: "one-title", class: "mono" }, title(item));
    const close = make("button", { type: "button" }, "Back to the list");
    close.addEventListener("click", () => { history.pushState(null, "", "#samples"); show(); search.focus(); });
    const lost = cuts(item);
    const facts = Object.entries(item.facts ?? {});
    const others = (item.windows ?? []).map((w) => {
      const words = `${seconds(w.start)} ${w.status}${w.reason ? `: ${w.reason}${w.detail ? `, ${w.detail}` : ""}` : ""}`;
      return make("li", {}, w.key && w.key !== item.key && byKey.has(w.key) ? make("a", { href: link(byKey.get(w.key)) }, words) : words + (w.key === item.key && w.key ? " (this one)" : ""));
    });
    return [make("div", { class: "one-head" }, heading, close), picture(item, true), badges(item),
      item.detail ? make("p", {}, item.detail) : null, timeline(item), ...captions(item, true),
      item.decisions?.length ? make("div", {}, make("h4", {}, "Decisions and their grounds"), rows(item.decisions)) : null,
      facts.length ? make("div", {}, make("h4", {}, "The file and its record"), rows(facts)) : null,
      others.length ? make("div", {}, make("h4", {}, "Windows of the clip"), make("ul", {}, ...others)) : null,
      lost.length ? make("details", {}, make("summary", {}, `${lost.length} sentences cut from the captions`), make("ul", {}, ...lost)) : null].filter(Boolean);
  };

  const field = (id, label, control) => { control.id = id; return make("div", { class: "field" }, make("label", { for: id }, label), control); };
  const choice = (id, label, name, values) => {
    const select = make("select", {}, make("option", { value: "" }, "all"), ...values.map(([value, count]) => make("option", { value }, `${value} (${count.toLocaleString("en")})`)));
    select.dataset.name = name;
    return [field(id, label, select), select];
  };
  const count = (get) => {
    const counts = new Map();
    for (const item of items) for (const value of get(item)) counts.set(value, (counts.get(value) ?? 0) + 1);
    return [...counts].sort((a, b) => b[1] - a[1]);
  };
  const GET = {
    status: (item) => [item.key ? "samples" : "refused records"],
    category: (item) => item.category ? [item.category] : [],
    bucket: (item) => item.bucket ? [item.bucket] : [],
    reason: (item) => [...(item.reason ? [`${item.stage}/${item.reason}`] : []), ...(item.findings ?? []).map((code) => `finding: ${code}`),
      ...(item.windows ?? []).filter((w) => w.reason && w.reason !== item.reason).map((w) => `window: ${w.reason}`)],
  };
  for (const name of Object.keys(GET)) { const get = GET[name]; GET[name] = (item) => [...new Set(get(item))]; }

  const search = make("input", { type: "search", autocomplete: "off", spellcheck: "false" });
  const selects = [];
  const form = make("form", { class: "filters", role: "search", "aria-label": "Samples and records" }, field("find", "Search ids, captions, reasons", search));
  for (const [name, label] of [["status", "Show"], ["category", "Category"], ["bucket", "Bucket"], ["reason", "Reason or finding"]]) {
    const values = count(GET[name]);
    if (!values.length) continue;
    const [block, select] = choice(`by-${name}`, label, name, values);
    form.append(block);
    selects.push(select);
  }
  const status = make("p", { role: "status", id: "found" });
  const list = make("ul", { class: "cards" });
  const panel = make("div", { id: "one", class: "card", role: "region", "aria-labelledby": "one-title", hidden: "" });
  const before = make("button", { type: "button" }, "Previous");
  const after = make("button", { type: "button" }, "Next");
  const where = make("span", { class: "quiet" });
  const pager = make("div", { class: "pager", role: "group", "aria-label": "Pages" }, before, where, after);
  root.append(form, panel, status, list, pager);

  let page = 0;
  const filtered = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    return items.filter((item) => words.every((word) => item.haystack.includes(word)) &&
      selects.every((select) => !select.value || GET[select.dataset.name](item).includes(select.value)));
  };
  const draw = () => {
    const found = filtered();
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    list.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(card));
    status.textContent = `${found.length.toLocaleString("en")} of ${items.length.toLocaleString("en")} match`;
    where.textContent = `page ${page + 1} of ${pages}`;
    before.disabled = page === 0;
    after.disabled = page >= pages - 1;
    pager.hidden = pages === 1;
  };
  const turn = (by) => {
    page += by;
    draw();
    status.scrollIntoView({ block: "start" });
    const [pressed, other] = by > 0 ? [after, before] : [before, after];
    (pressed.disabled ? other : pressed).focus({ preventScroll: true });
  };
  before.addEventListener("click", () => turn(-1));
  after.addEventListener("click", () => turn(1));
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const kind of ["input", "change"]) form.addEventListener(kind, () => { page = 0; draw(); });

  const show = () => {
    let name = "";
    try { name = decodeURIComponent(location.hash.slice(1)); } catch { name = ""; }
    const item = byKey.get(name) ?? (name.startsWith("record:") ? items.find((one) => !one.key && (one.clip || one.source) === name.slice(7)) : undefined);
    panel.hidden = !item;
    panel.replaceChildren(...(item ? one(item) : []));
    // A key that looks like one and is not here was not among those chosen for the page.
    const lost = !item && (name.includes("@") || name.startsWith("record:"));
    if (lost) {
      panel.hidden = false;
      panel.replaceChildren(make("h3", { id: "one-title", tabindex: "-1" }, `${name} is not on this page`), make("p", {}, data.note_not_here));
    }
    if (item || lost) { panel.scrollIntoView({ block: "start" }); document.getElementById("one-title").focus({ preventScroll: true }); }
  };
  window.addEventListener("hashchange", show);
  window.addEventListener("popstate", show);
  draw();
  show();
})();
