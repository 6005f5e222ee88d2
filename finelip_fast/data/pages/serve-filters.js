/** Controls for what the items' metadata offer. */

import { noChoice } from "./serve-link.js";

const MOST_BOXES = 6; // values of a field that are shown at once; more are a list to choose from

/**
 * @param {HTMLElement} panel
 * @param {{fields: object[], aggregated: boolean, alpha: number}} info
 * @param {import("./serve-link.js").Search} search
 * @param {() => void} changed Called when the search has been changed.
 */
export function showFilters(panel, info, search, changed) {
  const controls = info.fields.map((field) => control(field, choiceOf, changed));
  if (info.aggregated) controls.push(weight(info.alpha, search, changed));
  controls.push(freeFilter(search, changed));
  panel.replaceChildren(...controls);

  /** @param {string} name */
  function choiceOf(name) {
    if (!search.choices.has(name)) search.choices.set(name, noChoice());
    return search.choices.get(name);
  }
}

/** @param {import("./serve-link.js").Search} search @returns {number} How many of the controls say something. */
export function countFilters(search) {
  const used = [...search.choices.values()].filter(({ is, from, to, has }) => is.length || from || to || has);
  return used.length + Number(Boolean(search.where.trim())) + Number(search.alpha !== "");
}

/**
 * @param {keyof HTMLElementTagNameMap} tag
 * @param {object} properties
 * @param {...(Node | string)} children
 */
function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** @param {string} name As filters take it. @returns {string} */
const label = (name) => name.replaceAll('"', "");

const shown = (value) => (typeof value === "boolean" ? (value ? "yes" : "no") : String(value));

/** Controls of one field. */
function control(field, choiceOf, changed) {
  const { name, kind, values } = field;
  const known = (values ?? []).filter((value) => value !== null);
  if (kind === "number" || kind === "date") return range(field, choiceOf(name), changed);
  if (!known.length) return part(name, choiceOf(name), changed);
  return known.length <= MOST_BOXES ? boxes(name, known, choiceOf(name), changed) : list(name, known, choiceOf(name), changed);
}

function boxes(name, values, choice, changed) {
  const labels = values.map((value) => {
    const code = JSON.stringify(value);
    const box = element("input", { type: "checkbox", checked: choice.is.includes(code) });
    box.addEventListener("change", () => {
      choice.is = choice.is.filter((other) => other !== code);
      if (box.checked) choice.is.push(code);
      changed();
    });
    return element("label", { className: "chip" }, box, shown(value));
  });
  return element("fieldset", {}, element("legend", {}, label(name)), ...labels);
}

function list(name, values, choice, changed) {
  const select = element("select", {}, element("option", { value: "" }, "any"));
  for (const value of values) select.append(element("option", { value: JSON.stringify(value) }, shown(value)));
  select.value = choice.is[0] ?? "";
  select.addEventListener("change", () => {
    choice.is = select.value ? [select.value] : [];
    changed();
  });
  return element("label", { className: "field" }, element("span", {}, label(name)), select);
}

function range({ name, kind, least, greatest }, choice, changed) {
  const type = kind === "date" ? "date" : "number";
  const bound = (value) => (kind === "date" ? String(value ?? "").slice(0, 10) : value ?? "");
  const inputs = [["from", least], ["to", greatest]].map(([end, edge]) => {
    const input = element("input", { type, value: choice[end], placeholder: String(bound(edge)) });
    if (type === "number") input.step = "any";
    input.setAttribute("aria-label", `${label(name)} ${end}`);
    input.addEventListener("change", () => {
      choice[end] = input.value;
      changed();
    });
    return input;
  });
  const pair = element("div", { className: "range" }, inputs[0], "–", inputs[1]);
  return element("fieldset", {}, element("legend", {}, label(name)), pair);
}

function part(name, choice, changed) {
  const input = element("input", { type: "text", value: choice.has, placeholder: "contains" });
  input.addEventListener("change", () => {
    choice.has = input.value;
    changed();
  });
  return element("label", { className: "field" }, element("span", {}, label(name)), input);
}

function weight(usual, search, changed) {
  const value = () => (search.alpha === "" ? usual : Number(search.alpha));
  const input = element("input", { type: "range", min: "0", max: "1", step: "0.05", value: String(value()) });
  const output = element("output", {});
  const tell = () => {
    output.textContent = `${Math.round(100 * input.value)} % global, ${Math.round(100 - 100 * input.value)} % fine`;
  };
  input.addEventListener("input", tell);
  input.addEventListener("change", () => {
    search.alpha = Math.abs(Number(input.value) - usual) < 0.001 ? "" : input.value;
    changed();
  });
  tell();
  return element("label", { className: "field" }, element("span", {}, "What counts"), input, output);
}

function freeFilter(search, changed) {
  const input = element("input", { type: "text", id: "where", value: search.where, spellcheck: false, autocomplete: "off",
    placeholder: "camera = 'front' and year >= 2024" });
  input.setAttribute("aria-describedby", "where-fault");
  input.addEventListener("change", () => {
    search.where = input.value;
    changed();
  });
  const fault = element("span", { id: "where-fault", className: "wrong" });
  fault.setAttribute("role", "alert");
  return element("label", { className: "field wide" }, element("span", {}, "Filter by an expression"), input, fault);
}
