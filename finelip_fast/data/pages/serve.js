/** The page of `finelip serve`: its link is the search, and every answer comes from the server that sent it. */

import { countFilters, showFilters } from "./serve-filters.js";
import { composeWhere, linkOf, readLink } from "./serve-link.js";
import { nameOf, showResult } from "./serve-opened.js";
import { keepPicture, keptPicture, pictureIn } from "./serve-picture.js";
import { addressOf, asSentence, ask, keepKey, showThumbnail, thumbnailOf } from "./serve-server.js";

const PAGE = 48; // pictures asked for at once
const at = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
const plural = (count, noun) => `${number.format(count)} ${noun}${count === 1 ? "" : "s"}`;

let info = { fields: [], aggregated: false, alpha: 1, items: 0, writable: false, limits: {}, warning: null };
let search = readLink(location.search);
/** What is shown: the items so far, and how the next are asked for; null where these are all. */
let shown = { link: null, items: [], next: null };
let asking = new AbortController();
let opening = new AbortController();

const NONE_SIMILAR = { similar: "", similarShard: "" };
const NONE_OPEN = { open: "", openShard: "" };
const opened = ({ id, shard }) => ({ open: id, openShard: shard ?? "" });

const isQuery = () => Boolean(search.text || search.picture || search.similar);

// --- The search

/** Take the search from the form, make it the page's link, and run it. */
function submit() {
  search.text = search.picture || search.similar ? "" : at("text").value.trim();
  Object.assign(search, NONE_OPEN);
  follow();
  showCount();
  return run();
}

/** @param {import("./serve-link.js").Search} goal */
function go(goal) {
  search = goal;
  follow();
  showSearch();
  return run();
}

/** Make the search the page's link. */
function follow() {
  const link = linkOf(search);
  if (link !== linkOf(readLink(location.search))) history.pushState({}, "", link);
  document.title = search.text ? `${search.text.slice(0, 60)} · finelip` : "finelip";
}

/** Say how many filters there are. */
function showCount() {
  const used = countFilters(search);
  at("refined").hidden = !used;
  at("refined").textContent = String(used);
}

/** Put the search into its controls. */
function showSearch() {
  const example = at("example");
  const isPicture = Boolean(search.picture || search.similar);
  example.hidden = !isPicture;
  at("describe").hidden = isPicture;
  if (isPicture) showExample(example);
  else if (at("text").value.trim() !== search.text) at("text").value = search.text;
  countTokens();
  showFilters(at("filters"), info, search, submit);
  showCount();
}

function showExample(example) {
  const [title, detail] = example.querySelectorAll("p > *");
  const image = example.querySelector("img");
  const fresh = image.cloneNode();
  fresh.removeAttribute("src");
  image.replaceWith(fresh);
  if (search.picture) {
    title.textContent = "Like your picture";
    detail.textContent = "";
    const uri = keptPicture(search.picture);
    if (uri) fresh.src = uri;
  } else {
    title.textContent = "Like this picture";
    detail.textContent = nameOf(search.similar);
    showThumbnail(fresh, thumbnailOf(search.similar, search.similarShard), 160, { eager: true });
  }
}

/** Show the search's results from the start. */
async function run() {
  const link = linkOf({ ...search, ...NONE_OPEN });
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  say(null);
  at("results").setAttribute("aria-busy", "true");
  try {
    const answer = await pageOf(0, null, signal);
    shown = { link, items: [], next: null };
    at("grid").replaceChildren();
    append(answer);
    tell(answer);
  } catch (fault) {
    if (fault.name === "AbortError") return;
    shown = { link: null, items: [], next: null };
    at("grid").replaceChildren();
    at("more").hidden = true;
    at("said").textContent = "";
    tell({});
    say(fault, run);
  } finally {
    if (!signal.aborted) at("results").removeAttribute("aria-busy");
  }
  await showOpened();
}

/**
 * One page of results: of a search, or of the whole collection where nothing is searched for.
 *
 * @param {number} offset @param {string | null} after @param {AbortSignal} signal
 * @returns {Promise<{items: object[], next: object | null, note?: string, covered?: number, missing?: object}>}
 */
async function pageOf(offset, after, signal) {
  const where = composeWhere(search, info.fields);
  if (!isQuery()) {
    const values = new URLSearchParams({ limit: String(PAGE), ...(where ? { where } : {}), ...(after ? { after } : {}) });
    const { items, next } = await ask(`v1/items?${values}`, { signal });
    return { items, next: next === null ? null : { offset: 0, after: next } };
  }
  const k = Math.min(PAGE, (info.limits.k ?? 1000) - offset);
  const query = search.picture ? { image: keptPicture(search.picture) }
    : search.similar ? { item: search.similar, shard: search.similarShard || null } : { text: search.text };
  if (query.image === null) {
    throw new Error("This was a search by a picture that this tab no longer has. Drop, paste or choose it again.");
  }
  const options = { k, offset, where, alpha: search.alpha === "" ? null : Number(search.alpha) };
  const { results: [{ hits, note }], covered, missing } = await ask("v1/search", {
    method: "POST", json: { ...query, ...options }, signal,
  });
  const isMore = hits.length === k && offset + k < (info.limits.k ?? 1000);
  return { items: hits, next: isMore ? { offset: offset + k, after: null } : null, note, covered, missing };
}

/** Load the next page of results, where there is one. */
async function more() {
  const { next, link } = shown;
  if (!next || at("more").disabled) return;
  at("more").disabled = true;
  const { signal } = asking;
  try {
    const answer = await pageOf(next.offset, next.after, signal);
    if (shown.link === link) append(answer);
  } catch (fault) {
    if (fault.name !== "AbortError") say(fault, more);
  } finally {
    at("more").disabled = false;
  }
}

/** @param {{items: object[], next: object | null}} answer */
function append({ items, next }) {
  const hadFocus = document.activeElement === at("more");
  const cards = items.map(card);
  shown.items.push(...items);
  shown.next = next;
  at("grid").append(...cards);
  at("more").hidden = !next;
  const count = plural(shown.items.length, "picture");
  if (isQuery()) at("said").textContent = shown.items.length ? `${next ? "The best " : ""}${count}, best first` : "No picture passes the filter.";
  else at("said").textContent = shown.items.length ? "" : noPictures();
  if (hadFocus && !next) cards[0]?.querySelector("a").focus();
  cards.forEach((made, place) => showThumbnail(made.querySelector("img"), items[place].thumbnail, 240));
  watchEnd();
}

const noPictures = () => (info.items ? "No picture passes the filter." : "There are no pictures yet.");

/** @param {object} item @returns {HTMLLIElement} */
function card(item) {
  const made = at("card").content.cloneNode(true).firstElementChild;
  const link = made.querySelector("a");
  link.href = linkOf({ ...search, ...opened(item) });
  link.addEventListener("click", (event) => {
    if (event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    open(item);
  });
  made.querySelector(".name").textContent = nameOf(item.id, item.path);
  const verdict = made.querySelector(".verdict");
  if (item.verdict === "stands out" || item.verdict === "perhaps") verdict.textContent = item.verdict;
  else verdict.remove();
  if (item.verdict) made.dataset.verdict = item.verdict;
  return made;
}

/** What there is to say of results as a whole. */
function tell({ note, covered, missing }) {
  at("note").hidden = !note;
  at("note").textContent = note ? asSentence(note) : "";
  const isPartial = covered !== undefined && covered < 1;
  at("partial").hidden = !isPartial;
  const reasons = Object.entries(missing ?? {}).map(([shard, reason]) => `${shard}: ${reason}`).join("; ");
  at("partial").textContent = isPartial
    ? `Only ${Math.floor(100 * covered)} % of the pictures were searched${reasons ? `: ${reasons}` : ""}.` : "";
}

/**
 * Show what went wrong, or nothing any more.
 *
 * @param {Error | null} fault @param {() => void} [again] What to try again.
 */
function say(fault, again) {
  if (fault?.status === 401) return askKey();
  const isFilter = fault?.status === 400 && (fault.param === "where" || fault.message.includes("where expression"));
  at("where").setAttribute("aria-invalid", String(isFilter));
  at("where-fault").textContent = isFilter ? fault.message : "";
  if (isFilter) refine(true);
  at("fault").hidden = !fault || isFilter;
  at("fault").querySelector("p").textContent = fault?.message ?? "";
  at("fault").querySelector("button").onclick = again ?? null;
  at("fault").querySelector("button").hidden = !again || fault?.status === 400;
  return undefined;
}

/** @param {boolean} isOpen Whether the filters are to be shown. */
function refine(isOpen) {
  at("filters").hidden = !isOpen;
  at("refine").setAttribute("aria-expanded", String(isOpen));
}

// --- The description

let counting = new AbortController();
let waiting = 0;

/** Count the tokens, and strike out what lies beyond the context. */
function countTokens() {
  const text = at("text").value;
  const [inside, beyond] = at("describe").querySelectorAll(".page > *");
  const known = beyond.textContent ? inside.textContent : null;
  // Until the answer comes, what was beyond stays so.
  const cut = known !== null && text.startsWith(known) ? known.length : text.length;
  [inside.textContent, beyond.textContent] = [text.slice(0, cut), text.slice(cut)];
  counting.abort();
  clearTimeout(waiting);
  if (!text.trim() || at("describe").hidden) {
    at("count").textContent = "";
    at("count").classList.remove("over");
    return;
  }
  counting = new AbortController();
  const { signal } = counting;
  waiting = setTimeout(async () => {
    const answer = await ask("v1/tokens", { method: "POST", json: { text }, signal }).catch(() => null);
    if (!answer || signal.aborted) return;
    const { tokens, context_length: length, cut_at: end } = answer;
    const read = end === null ? text : [...text].slice(0, end).join("");
    [inside.textContent, beyond.textContent] = [read, text.slice(read.length)];
    at("count").classList.toggle("over", end !== null);
    at("count").textContent = `${number.format(tokens)} of ${number.format(length)} tokens${end === null ? "" : "; what is struck out is not read"}`;
  }, 150);
}

// --- A result, opened

/** @param {object} item */
function open(item) {
  const isOpen = at("opened").open;
  Object.assign(search, opened(item));
  history[isOpen ? "replaceState" : "pushState"]({ opened: true }, "", linkOf(search));
  return showOpened();
}

function close() {
  if (!search.open) return;
  if (history.state?.opened) return void history.back();
  Object.assign(search, NONE_OPEN);
  history.replaceState({}, "", linkOf(search));
  showOpened();
}

/** Show the item that the link names, in a dialog; close it where there is none. */
async function showOpened() {
  const dialog = at("opened");
  opening.abort();
  opening = new AbortController();
  const { signal } = opening;
  if (!search.open) {
    if (dialog.open) dialog.close();
    return;
  }
  const place = placeOpened();
  const item = shown.items[place] ?? await unlisted(signal);
  if (signal.aborted) return;
  if (!item) {
    say(new Error(`There is no picture ${nameOf(search.open)} here any more.`));
    return void close();
  }
  at("opened-name").textContent = nameOf(item.id, item.path);
  at("previous").disabled = place <= 0;
  at("next").disabled = place < 0 || (place === shown.items.length - 1 && !shown.next);
  const isNew = !dialog.open;
  if (isNew) dialog.showModal();
  const goal = { ...search, text: "", picture: "", similar: item.id, similarShard: item.shard ?? "", ...NONE_OPEN };
  showResult(dialog.querySelector(".content"), item, {
    text: search.text, similar: linkOf(goal), writable: info.writable, signal,
    findSimilar: (event) => {
      if (event.metaKey || event.ctrlKey || event.shiftKey) return;
      event.preventDefault();
      window.scrollTo({ top: 0 });
      go(goal);
    },
    remove: () => remove(item),
  });
  dialog.querySelector(".content").scrollTop = 0;
  if (isNew) at("opened-name").focus();
}

const isOpened = ({ id, shard }) => id === search.open && (!search.openShard || shard === search.openShard);
const placeOpened = () => shown.items.findIndex(isOpened);

/** @param {AbortSignal} signal @returns {Promise<object | undefined>} The item that the link names, not among the results. */
async function unlisted(signal) {
  const values = new URLSearchParams({ where: `id = '${search.open.replaceAll("'", "''")}'` });
  const answer = await ask(`v1/items?${values}`, { signal }).catch(() => null);
  return answer?.items.find(isOpened);
}

/** @param {number} by 1: to the next, -1: to the one before. */
async function step(by) {
  const place = placeOpened();
  if (place < 0) return;
  if (place + by === shown.items.length) await more();
  const item = shown.items[place + by];
  if (!item) return;
  await open(item);
  if (document.activeElement === document.body || document.activeElement.disabled) at("opened-name").focus();
}

/** Delete an item for good. */
async function remove(item) {
  await ask(addressOf(item.id), { method: "DELETE" });
  announce(`${nameOf(item.id, item.path)} was deleted.`);
  close();
  await loadInfo();
  await run();
}

// --- Adding

/**
 * Add pictures one after another: each is refused for itself, and a request stays within the server's bounds.
 *
 * @param {File[]} files
 */
async function add(files) {
  const said = [];
  let count = 0;
  for (const [place, file] of files.entries()) {
    announce(`Adding picture ${place + 1} of ${files.length} …`);
    const form = new FormData();
    form.append("image", file);
    try {
      const { added, items } = await ask("v1/items", { method: "POST", form });
      count += added;
      said.push(...items.filter(({ reason }) => reason).map(({ name, reason }) => `${name}: ${reason}.`));
    } catch (fault) {
      if (fault.status !== 400) { // what is wrong with a picture; all else would be wrong with the next, too
        announce(count ? `${plural(count, "picture")} added.` : "");
        return say(fault, () => add(files.slice(place)));
      }
      said.push(`${file.name}: ${fault.message}`);
    }
  }
  announce([`${plural(count, "picture")} added.`, ...said].join(" "));
  await loadInfo();
  return run();
}

/** @param {string} news */
function announce(news) {
  at("news").hidden = !news;
  at("news").textContent = news;
}

// --- The server

async function loadInfo() {
  info = await ask("v1/info");
  at("holdings").textContent = plural(info.items, "picture");
  at("add").hidden = !info.writable;
  let isKnown = false;
  try {
    isKnown = localStorage.getItem("finelip-warned") === info.warning;
  } catch { // a browser that keeps nothing
  }
  at("warning").hidden = !info.warning || isKnown;
  at("warning").querySelector("span").textContent = info.warning ? asSentence(info.warning) : "";
}

function askKey() {
  const dialog = at("ask-key");
  at("key").value = "";
  if (!dialog.open) dialog.showModal();
}

async function start() {
  showSearch();
  try {
    await loadInfo();
  } catch (fault) {
    return say(fault, start);
  }
  showFilters(at("filters"), info, search, submit); // and nothing else: by now, something may have been typed
  return run();
}

// --- What people do

at("search").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
at("text").addEventListener("input", countTokens);
at("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
at("describe").addEventListener("click", () => at("text").focus());
at("refine").addEventListener("click", () => refine(at("filters").hidden));
at("home").addEventListener("click", (event) => {
  event.preventDefault();
  go(readLink(""));
});
at("example").querySelector("button").addEventListener("click", () => {
  go({ ...search, picture: "", ...NONE_SIMILAR, ...NONE_OPEN });
  at("text").focus();
});
at("warning").querySelector("button").addEventListener("click", () => {
  at("warning").hidden = true;
  localStorage.setItem("finelip-warned", info.warning);
});

/** @param {File | undefined} file */
async function searchByPicture(file) {
  if (!file) return;
  const picture = await keepPicture(file);
  await go({ ...search, text: "", ...NONE_SIMILAR, ...NONE_OPEN, picture });
}

at("choose").addEventListener("click", () => at("chosen").click());
at("chosen").addEventListener("change", async () => {
  await searchByPicture(at("chosen").files[0]);
  at("chosen").value = "";
});
document.addEventListener("paste", (event) => {
  const file = pictureIn(event.clipboardData);
  if (!file) return;
  event.preventDefault();
  searchByPicture(file);
});
let inside = 0; // elements that a dragged file is over: entering a child comes before leaving its parent
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => {
  inside += 1;
  at("drop").hidden = !hasFiles(event);
});
document.addEventListener("dragleave", () => {
  inside -= 1;
  if (inside <= 0) at("drop").hidden = true;
});
document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  inside = 0;
  at("drop").hidden = true;
  const file = pictureIn(event.dataTransfer);
  if (file) searchByPicture(file);
  else say(new Error("That was no picture: drop a JPEG, PNG, WebP or another picture."));
});

at("add").addEventListener("click", () => at("added").click());
at("added").addEventListener("change", async () => {
  await add([...at("added").files]);
  at("added").value = "";
});

at("more").addEventListener("click", more);
const end = new IntersectionObserver(([{ isIntersecting }]) => isIntersecting && more(), { rootMargin: "600px" });

/** Load more once the end is near; watched again after each page, which may end above it. */
function watchEnd() {
  end.unobserve(at("more"));
  if (shown.next) end.observe(at("more"));
}

at("close").addEventListener("click", close);
at("previous").addEventListener("click", () => step(-1));
at("next").addEventListener("click", () => step(1));
at("opened").addEventListener("cancel", (event) => {
  event.preventDefault();
  close();
});
at("opened").addEventListener("click", (event) => event.target === at("opened") && close());
at("opened").addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.target.matches("input") || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") step(event.key === "ArrowLeft" ? -1 : 1);
});
at("ask-key").addEventListener("close", () => {
  const key = at("key").value;
  if (!key) return;
  keepKey(key);
  start();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input, textarea, select") || at("opened").open) return;
  event.preventDefault();
  at("text").focus();
});
window.addEventListener("popstate", () => {
  const goal = readLink(location.search);
  if (linkOf({ ...goal, ...NONE_OPEN }) === linkOf({ ...search, ...NONE_OPEN })) {
    Object.assign(search, { open: goal.open, openShard: goal.openShard });
    return void showOpened();
  }
  search = goal;
  showSearch();
  run();
});

start();
