// Streams completions of the server and colours each token by the number of pauses before it.
"use strict";

const $ = (id) => document.getElementById(id);
const COLOURS = 6;
const NO_LIMIT = 100;

let model = null;
let running = null; // an AbortController while text is generated
let shownToken = null;

function element(name, classes, text) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  if (text !== undefined) made.textContent = text;
  return made;
}

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

// The message of an answer that is not OK.
async function refusal(answer) {
  if (answer.status === 401) $("key-field").hidden = false;
  try {
    return (await answer.json()).error.message;
  } catch {
    return "the server answers with status " + answer.status;
  }
}

function say(text, isError) {
  $("status").textContent = text;
  $("status").classList.toggle("error", Boolean(isError));
}

// An answer of the server; throws an error with a message for a person if it is refused.
async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { headers: headers(), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is cyb-serve still running?");
  }
  if (!answer.ok) throw new Error(await refusal(answer));
  return answer;
}

async function askForModel() {
  const answer = await ask("v1/models");
  model = (await answer.json()).data[0];
  const pauses = model.max_pauses === 1 ? "1 pause" : model.max_pauses + " pauses";
  $("model").textContent =
    `${model.id}: method ${model.method}, step ${model.step}, at most ${pauses} per token, ` +
    `context of ${model.max_model_len} tokens`;
  $("most").max = $("most").value = model.max_pauses;
  $("tokens").max = model.max_model_len;
  // The prompt needs a part of the context.
  $("tokens").value = Math.min(Number($("tokens").value), Math.max(1, Math.floor(model.max_model_len * 0.6)));
  $("pausing").hidden = model.max_pauses === 0;
  if (model.max_pauses === 0) $("compare").checked = false;
  $("paced-title").textContent = model.max_pauses === 0 ? "Text" : "With pauses";
  showLegend();
  showValues();
}

function tokenClasses(pauses) {
  if (!pauses) return "t";
  const most = Math.max(1, model.max_pauses);
  const colour = most === 1 ? COLOURS : 1 + Math.round(((Math.min(pauses, most) - 1) / (most - 1)) * (COLOURS - 1));
  return `t c${colour} u${Math.min(pauses, 3)}`;
}

function showLegend() {
  const legend = $("legend");
  legend.replaceChildren(element("span", "", "Pauses before the token: "));
  for (let pauses = 0; pauses <= model.max_pauses; pauses++) {
    legend.append(element("span", tokenClasses(pauses), String(pauses)));
  }
  legend.hidden = model.max_pauses === 0;
}

function showValues() {
  $("threshold-value").textContent = Number($("threshold").value).toFixed(2);
  const budget = Number($("budget").value);
  $("budget-value").textContent = budget === NO_LIMIT ? "no limit" : "at most " + budget;
  $("budget").setAttribute("aria-valuetext", $("budget-value").textContent);
  $("most-value").textContent = "at most " + $("most").value;
  const both = $("compare").checked;
  $("plain").hidden = !both;
  $("panels").classList.toggle("both", both);
}

// The fields of the request that both panels share.
function shared() {
  return {
    model: model.id,
    prompt: $("prompt").value,
    max_tokens: Number($("tokens").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
    stream: true,
  };
}

function pacing() {
  if (model.max_pauses === 0 || !model.can_pace_itself) return {};
  const read = document.querySelector("input[name=read]:checked").value;
  const body = { mode: "self_paced", read, max_pauses: Number($("most").value) };
  if (read === "threshold") body.threshold = Number($("threshold").value);
  if (Number($("budget").value) < NO_LIMIT) body.pause_budget = Number($("budget").value);
  return body;
}

// The JSON objects of a stream of server-sent events.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const data = text.slice(0, end).replace(/^data: /, "");
      text = text.slice(end + 2);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// One panel: the text of one request, and its numbers.
class Panel {
  constructor(section) {
    this.text = section.querySelector(".text");
    this.numbers = section.querySelector(".numbers");
    this.text.replaceChildren(element("span", "given", $("prompt").value));
    this.tokens = this.pauses = this.slots = 0;
    this.begun = performance.now();
    this.first = null;
    this.show();
  }

  add(choice) {
    choice.token_ids.forEach((_, i) => {
      const slots = choice.slots[i];
      const span = element("span", tokenClasses(choice.pauses[i]), choice.text);
      span.tabIndex = this.tokens ? -1 : 0;
      span.data = { text: choice.text, pauses: choice.pauses[i], slots };
      this.text.append(span);
      this.tokens += 1;
      this.pauses += choice.pauses[i];
      this.slots += slots.d.length;
    });
    if (this.first === null) this.first = performance.now();
    this.show();
  }

  show() {
    const seconds = (performance.now() - this.begun) / 1000;
    const values = {
      tokens: String(this.tokens),
      "tokens/s": this.tokens ? (this.tokens / seconds).toFixed(0) : "–",
      pauses: String(this.pauses),
      "slots per token": this.tokens ? (this.slots / this.tokens).toFixed(2) : "–",
      "first token after": this.first === null ? "–" : (this.first - this.begun).toFixed(0) + " ms",
    };
    this.numbers.replaceChildren(
      ...Object.entries(values).map(([name, value]) => {
        const pair = element("div");
        pair.append(element("dt", "", name), element("dd", "", value));
        return pair;
      }),
    );
  }

  async run(body, signal) {
    const answer = await ask("v1/completions", { method: "POST", body: JSON.stringify(body), signal });
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.choices.length) this.add(event.choices[0]);
    }
  }
}

async function generate() {
  if (running) return;
  running = new AbortController();
  const signal = running.signal;
  $("start").disabled = true;
  $("stop").disabled = false;
  hideSlots();
  try {
    if (model === null) await askForModel();
    const panels = [[new Panel($("paced")), pacing()]];
    if ($("compare").checked) panels.push([new Panel($("plain")), { mode: "none" }]);
    say("Generating …");
    await Promise.all(panels.map(([panel, own]) => panel.run({ ...shared(), ...own }, signal)));
    const [paced] = panels[0];
    say(
      `Done: ${paced.tokens} tokens` +
        (model.max_pauses ? `, ${paced.pauses} pauses, ${(paced.slots / paced.tokens).toFixed(2)} slots per token.` : "."),
    );
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error.message, true);
  } finally {
    running.abort(); // the other panel's request, if one has failed
    running = null;
    $("start").disabled = false;
    $("stop").disabled = true;
  }
}

function hideSlots() {
  $("slots").hidden = true;
  if (shownToken) shownToken.classList.remove("on");
  shownToken = null;
}

function showSlots(span) {
  if (span === shownToken) return;
  hideSlots();
  shownToken = span;
  span.classList.add("on");
  const { text, pauses, slots } = span.data;
  const table = element("table");
  const count = pauses === 1 ? "1 pause" : pauses + " pauses";
  table.append(element("caption", "", `“${text.replaceAll("\n", "↵")}” after ${count}`));
  const head = table.createTHead().insertRow();
  for (const name of ["slot", "d", "t", "s"]) {
    const cell = element("th", "", name);
    cell.scope = "col";
    head.append(cell);
  }
  const body = table.createTBody();
  slots.d.forEach((_, slot) => {
    const row = body.insertRow();
    // With all slots of a token in one pass, the read slot need not be the last one.
    const isRead = slot === Math.min(pauses, slots.d.length - 1);
    if (isRead) row.className = "read";
    const name = element("th", "", (slot ? "pause " + slot : "the token") + (isRead ? ", read" : ""));
    name.scope = "row";
    row.append(name);
    for (const values of [slots.d, slots.t, slots.s]) {
      row.insertCell().textContent = values[slot] === null ? "–" : values[slot].toFixed(4);
    }
  });
  $("slots").replaceChildren(table);
  $("slots").hidden = false;
}

function tokenOf(event) {
  const span = event.target.closest ? event.target.closest(".text .t") : null;
  return span && span.data ? span : null;
}

function moveFocus(event) {
  const span = tokenOf(event);
  if (event.key === "Escape") hideSlots();
  if (!span) return;
  const all = [...span.parentElement.querySelectorAll(".t")];
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const ends = { Home: 0, End: all.length - 1 };
  const place = all.indexOf(span);
  const next = event.key in ends ? ends[event.key] : place + (steps[event.key] || 0);
  if (next === place || !all[next]) return;
  event.preventDefault();
  span.tabIndex = -1;
  all[next].tabIndex = 0;
  all[next].focus();
}

document.addEventListener("DOMContentLoaded", () => {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  $("stop").addEventListener("click", () => running && running.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  });
  for (const id of ["threshold", "budget", "most", "compare"]) $(id).addEventListener("input", showValues);
  // Moving the threshold chooses the rule that uses it.
  $("threshold").addEventListener("input", () => {
    document.querySelector("input[name=read][value=threshold]").checked = true;
  });
  $("key").addEventListener("change", () => askForModel().then(() => say(""), (error) => say(error.message, true)));
  $("panels").addEventListener("pointerover", (event) => tokenOf(event) && showSlots(tokenOf(event)));
  $("panels").addEventListener("focusin", (event) => tokenOf(event) && showSlots(tokenOf(event)));
  document.addEventListener("keydown", moveFocus);
  showValues();
  askForModel().catch((error) => {
    $("model").textContent = "The server's model is not known yet.";
    say(error.message, true);
  });
});
