// The page: models, tabs, and texts that grow in one or two columns.

import {Refused, complete, models} from "./service.js";
import {Tokens, element} from "./tokens.js";
import {Masks} from "./masks.js";

const byId = (id) => document.getElementById(id);
const ALTERNATIVES = 8;
let running = null;

const say = (sentence) => { byId("status").textContent = sentence; };

const settings = () => ({
  key: byId("key").value,
  models: [byId("model").value, byId("other").value].filter((name, place) => name && (place === 0 || name !== "none")),
});

async function loadModels() {
  try {
    const found = await models(byId("key").value);
    const options = () => found.map(({id}) => element("option", {value: id, textContent: id}));
    byId("model").replaceChildren(...options());
    byId("other").replaceChildren(element("option", {value: "none", textContent: "no other"}), ...options());
    say("");
  } catch (error) {
    if (error.status === 401) byId("key-choice").hidden = false;
    say(error.message);
  }
}

const number = (id) => byId(id).value === "" ? undefined : Number(byId(id).value);

// What is asked of every model; undefined fields are left out of JSON.
function question(model) {
  return {
    model,
    prompt: byId("prompt").value,
    suffix: byId("suffix").value || undefined,
    max_tokens: number("max_tokens"),
    temperature: number("temperature"),
    top_p: number("top_p"),
    top_k: number("top_k"),
    repetition_penalty: number("repetition_penalty"),
    seed: number("seed"),
    stop: byId("stop").value ? [byId("stop").value] : undefined,
    logprobs: ALTERNATIVES,
  };
}

// One model's column: its text grows in it.
async function grow(model, place, signal) {
  const text = element("div", {className: "text", id: `text-${place}`});
  const facts = element("p", {className: "facts"});
  const section = element("section", {className: "answer"}, element("h2", {textContent: model}),
    element("span", {className: "text given", textContent: byId("prompt").value}), text, facts);
  section.setAttribute("aria-label", `Answer of ${model}`);
  byId("answers").append(section);
  const tokens = new Tokens(text, `Tokens of ${model}: arrow keys show alternatives`);
  const start = performance.now();
  const report = (end) => {
    const seconds = (performance.now() - start) / 1000;
    facts.textContent = `${tokens.tokens.length} tokens, ${(tokens.tokens.length / seconds).toFixed(1)} a second${end}`;
  };
  try {
    for await (const {choices: [choice]} of complete(question(model), settings().key, signal)) {
      add(choice, tokens);
      report(choice.finish_reason ? ` (${choice.finish_reason})` : "");
    }
  } catch (error) {
    if (signal.aborted) { report(" (stopped)"); return; }
    facts.className = "facts failed";
    facts.textContent = error instanceof Refused ? error.message : `the connection failed: ${error.message}`;
  }
}

// Add the tokens of a chunk. Bytes of one character come together: the last shows it.
function add({text, logprobs: {tokens: names, token_logprobs: values, top_logprobs: others}}, tokens) {
  let rest = text;
  names.forEach((name, place) => {
    const isLast = place === names.length - 1;
    const seen = isLast ? rest : rest.startsWith(name) ? name : "";
    rest = rest.slice(seen.length);
    tokens.add(seen, name, values[place], others[place]);
  });
}

async function go(event) {
  event.preventDefault();
  running?.abort();
  running = new AbortController();
  const {signal} = running;
  byId("answers").replaceChildren();
  byId("halt").disabled = false;
  say("writing");
  await Promise.all(settings().models.map((model, place) => grow(model, place, signal)));
  if (signal === running.signal) {
    byId("halt").disabled = true;
    say(signal.aborted ? "stopped" : "done");
  }
}

// Tabs: arrow keys move, as readers of the screen expect.
function openTab(tab) {
  for (const each of document.querySelectorAll("[role=tab]")) {
    const isOpen = each === tab;
    each.setAttribute("aria-selected", String(isOpen));
    each.tabIndex = isOpen ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = !isOpen;
  }
}

function moveTab(event) {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const next = tabs[(tabs.indexOf(event.target) + 1) % tabs.length];
  openTab(next);
  next.focus();
}

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => openTab(tab));
  tab.addEventListener("keydown", moveTab);
}
byId("question").addEventListener("submit", go);
byId("halt").addEventListener("click", () => running?.abort());
byId("key").addEventListener("change", loadModels);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("question").requestSubmit();
  if (event.key === "Escape") running?.abort();
});
const masks = new Masks({text: byId("text"), words: byId("words"), candidates: byId("candidates"), settings, say});
for (const choice of ["model", "other"]) byId(choice).addEventListener("change", () => masks.ask());
await loadModels();
