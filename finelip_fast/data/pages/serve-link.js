/**
 * A search as its link says it, and what the server is asked for.
 *
 * @typedef {{is: string[], from: string, to: string, has: string}} Choice What a control says of a field: any of some values
 *   (as JSON), a least and a greatest one, a part of its text.
 * @typedef {{text: string, picture: string, similar: string, similarShard: string, where: string, alpha: string,
 *   open: string, openShard: string, choices: Map<string, Choice>}} Search `picture` names one that was dropped, pasted or
 *   chosen in this tab; `similar` and `open` are ids of items, which shards may share.
 */

const SINGLE = ["picture", "similar", "similarShard", "where", "alpha", "open", "openShard"];
const OPENED = ["open", "openShard"];

/** @returns {Choice} */
export const noChoice = () => ({ is: [], from: "", to: "", has: "" });

/** @param {string} query The part of an address from `?` on. @returns {Search} */
export function readLink(query) {
  const values = new URLSearchParams(query);
  /** @type {Map<string, Choice>} */
  const choices = new Map();
  for (const [name, value] of values) {
    const [, kind, field] = /^(is|from|to|has)\.(.+)$/s.exec(name) ?? [];
    if (!kind) continue;
    if (!choices.has(field)) choices.set(field, noChoice());
    if (kind === "is") choices.get(field).is.push(value);
    else choices.get(field)[kind] = value;
  }
  const single = Object.fromEntries(SINGLE.map((name) => [name, values.get(name) ?? ""]));
  return { text: values.get("q") ?? "", ...single, choices };
}

/** @param {Search} search @returns {string} Its link, from `?` on. */
export function linkOf(search) {
  const values = new URLSearchParams();
  if (search.text) values.set("q", search.text);
  for (const name of SINGLE) if (search[name] && !OPENED.includes(name)) values.set(name, search[name]);
  for (const [field, choice] of search.choices) {
    for (const value of choice.is) values.append(`is.${field}`, value);
    for (const kind of ["from", "to", "has"]) if (choice[kind]) values.set(`${kind}.${field}`, choice[kind]);
  }
  for (const name of OPENED) if (search[name]) values.set(name, search[name]);
  const query = values.toString();
  return query ? `?${query}` : "./";
}

const quoted = (text) => `'${text.replaceAll("'", "''")}'`;

/** @param {unknown} value Text, number or boolean. */
const literal = (value) => (typeof value === "string" ? quoted(value) : String(value));

/** @param {string} day As date inputs give it. */
function dayAfter(day) {
  const date = new Date(`${day}T00:00:00Z`);
  date.setUTCDate(date.getUTCDate() + 1);
  return date.toISOString().slice(0, 10);
}

/**
 * The filter that controls and the free expression make together.
 *
 * @param {Search} search
 * @param {{name: string, kind: string}[]} fields Names are those that filters take.
 * @returns {string | null}
 */
export function composeWhere(search, fields) {
  const parts = [];
  for (const { name, kind } of fields) {
    const choice = search.choices.get(name);
    if (!choice) continue;
    const values = choice.is.map((value) => literal(JSON.parse(value)));
    if (values.length) parts.push(values.length === 1 ? `${name} = ${values[0]}` : `${name} in (${values.join(", ")})`);
    const isDate = kind === "date";
    if (choice.from) parts.push(`${name} >= ${isDate ? quoted(choice.from) : Number(choice.from)}`);
    // A date may have a time behind it: what lies before the next day.
    if (choice.to) parts.push(isDate ? `${name} < ${quoted(dayAfter(choice.to))}` : `${name} <= ${Number(choice.to)}`);
    if (choice.has) parts.push(`${name} like ${quoted(`%${choice.has}%`)}`);
  }
  const free = search.where.trim();
  if (free) parts.unshift(parts.length ? `(${free})` : free); // first, so that errors count its columns
  return parts.length ? parts.join(" and ") : null;
}
