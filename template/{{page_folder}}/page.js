// The page: reads its forms, asks the service, shows what came. Nothing from outside is ever taken for HTML.
import { Service } from "./service.js";
import * as V from "./vectors.js";

const rendered = JSON.parse(document.getElementById("rendered").textContent);
const service = new Service(() => document.getElementById("key").value);
service.batch = rendered.max_client_batch_size;

/** An element with attributes and children, which are elements or text. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "circle", "text", "title"].includes(name) && attributes.svg;
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (key !== "svg") element.setAttribute(key, value);
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

const table = (caption, head, rows) => make("table", {},
  make("caption", {}, caption),
  make("thead", {}, make("tr", {}, ...head.map((cell) => make("th", { scope: "col" }, cell)))),
  make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell))))));
const number = (value, digits = 3) => value.toFixed(digits);
const took = (answer, texts) =>
  make("p", {}, `${texts} ${texts === 1 ? "text" : "texts"}, ${answer.tokens} tokens, ${Math.round(answer.milliseconds)} ms`);

const prompted = (id, texts) => {
  const prompt = rendered.prompts[document.getElementById(id).value] ?? "";
  return texts.map((text) => prompt + text);
};
const value = (id) => document.getElementById(id).value;

function wanted(texts, least, most) {
  if (texts.length < least) throw new Error(`At least ${least} ${least === 1 ? "line is" : "lines are"} needed.`);
  if (texts.length > most) throw new Error(`At most ${most} lines are taken; there are ${texts.length}.`);
  return texts;
}

const shows = {
  async single(output) {
    const text = value("single-text");
    if (!text.trim()) throw new Error("A text is needed.");
    const answer = await service.embed(prompted("single-prompt", [text]), rendered.model_id);
    const [vector] = answer.vectors;
    output.append(
      took(answer, 1),
      make("p", {}, `${vector.length} numbers, length ${number(V.length(vector))}`),
      make("pre", { tabindex: 0, "aria-label": "The vector" }, vector.map((v) => number(v, 6)).join("  ")),
    );
  },

  async compare(output) {
    const texts = wanted(V.lines(value("compare-texts")), 2, 50);
    const answer = await service.embed(prompted("compare-prompt", texts), rendered.model_id);
    const matrix = V.similarities(answer.vectors);
    const near = V.nearest(matrix);
    const heat = make("table", { class: "heat" },
      make("caption", {}, "Cosine similarity of each pair"),
      make("thead", {}, make("tr", {}, make("td"), ...texts.map((text, i) => make("th", { scope: "col", title: text }, i + 1)))),
      make("tbody", {}, ...matrix.map((row, i) => make("tr", {},
        make("th", { scope: "row", title: texts[i] }, i + 1),
        ...row.map((v, j) => make("td", { class: `heat-${Math.round(Math.max(0, Math.min(1, v)) * 10)}`, title: `${texts[i]} / ${texts[j]}` }, number(v, 2)))))));
    const list = make("ol", {}, ...texts.map((text, i) =>
      make("li", {}, text, make("small", {}, ` nearest: ${near[i] + 1} (${number(matrix[i][near[i]])})`))));
    const scroll = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Similarities" }, heat);
    output.append(took(answer, texts.length), list, scroll);
  },

  async search(output) {
    const passages = wanted(V.lines(value("search-texts")), 1, 1000);
    const query = value("search-query").trim();
    if (!query) throw new Error("A question is needed.");
    const texts = [...prompted("search-query-prompt", [query]), ...prompted("search-passage-prompt", passages)];
    const answer = await service.embed(texts, rendered.model_id);
    const [asked, ...vectors] = answer.vectors;
    const rows = V.ranked(asked, vectors).map(({ index, score }, place) => [place + 1, number(score), passages[index]]);
    output.append(took(answer, texts.length), table("Best first", ["", "similarity", "passage"], rows));
  },

  async map(output) {
    const texts = wanted(V.lines(value("map-texts")), 3, 300);
    const answer = await service.embed(prompted("map-prompt", texts), rendered.model_id);
    const { points, shares } = V.principal(answer.vectors);
    output.append(took(answer, texts.length), picture(points, texts),
      make("p", {}, `The two axes hold ${Math.round(100 * (shares[0] + shares[1]))} % of the differences.`),
      make("ol", {}, ...texts.map((text) => make("li", {}, text))));
  },

  async timing(output) {
    const text = value("timing-text");
    if (!text.trim()) throw new Error("A text is needed.");
    const rows = [];
    for (const size of V.batchSizes(service.batch)) {
      const times = [];
      let tokens = 0;
      for (let n = 0; n < 3; n++) {
        const answer = await service.embed(Array(size).fill(text), rendered.model_id);
        times.push(answer.milliseconds);
        tokens = answer.tokens;
      }
      const time = V.median(times);
      rows.push([size, Math.round(time), number((1000 * size) / time, 1), Math.round((1000 * tokens) / time)]);
      output.replaceChildren(table("Middle of three requests", ["texts", "ms", "texts/s", "tokens/s"], rows));
      if (time > 10_000) break;
    }
  },
};

/** Points as numbered dots; the numbers are those of the list below the picture. */
function picture(points, texts) {
  const bounds = [0, 1].map((axis) => points.map((p) => p[axis])).map((all) => [Math.min(...all), Math.max(...all)]);
  const place = (p, axis, size) => {
    const [low, high] = bounds[axis];
    return 24 + ((high > low ? (p[axis] - low) / (high - low) : 0.5) * (size - 48));
  };
  const svg = make("svg", { svg: 1, viewBox: "0 0 640 420", role: "img", "aria-label": `A picture of ${texts.length} texts` });
  points.forEach((point, i) => {
    const [x, y] = [place(point, 0, 640), 420 - place(point, 1, 420)];
    svg.append(
      make("circle", { svg: 1, cx: x, cy: y, r: 5 }, make("title", { svg: 1 }, texts[i])),
      make("text", { svg: 1, x: x > 480 ? x - 8 : x + 8, y: y + 4, "text-anchor": x > 480 ? "end" : "start" }, texts.length > 60 ? i + 1 : `${i + 1} ${texts[i].slice(0, 24)}`),
    );
  });
  return svg;
}

function section(name) {
  for (const one of document.querySelectorAll("main > section")) one.hidden = one.id !== name;
  for (const button of document.querySelectorAll("nav button")) {
    if (button.dataset.shows === name) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => section(button.dataset.shows));
}

for (const select of document.querySelectorAll("select.prompt")) {
  select.append(make("option", { value: "" }, "nothing"));
  for (const [name, prompt] of Object.entries(rendered.prompts)) {
    if (prompt) select.append(make("option", { value: name }, `${name}: “${prompt.slice(0, 60)}”`));
  }
  select.value = V.promptFor(select.dataset.use, rendered.prompts);
}

for (const form of document.querySelectorAll("main form")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { id } = form.parentElement;
    const output = form.parentElement.querySelector("output");
    const button = form.querySelector("button");
    if (button.disabled) return;
    button.disabled = true;
    output.replaceChildren(make("p", {}, "Asking …"));
    try {
      const shown = make("div");
      if (id === "timing") { await shows.timing(output); return; }
      await shows[id](shown);
      output.replaceChildren(...shown.childNodes);
    } catch (error) {
      output.replaceChildren(make("p", { class: "wrong", role: "alert" }, error.message));
    } finally {
      button.disabled = false;
    }
  });
}

async function greet() {
  const model = document.getElementById("model");
  let info = {};
  try {
    info = await service.info();
    const name = info.served_model_name ?? rendered.model_id;
    const embeds = info.model_type?.embedding || info.model_type?.Embedding;
    const right = embeds && name === rendered.model_id;
    model.textContent = right ? `${name} answers.`
      : embeds ? `${name} answers; this page was made for ${rendered.model_id}.`
      : "What answers serves no embeddings.";
    model.classList.toggle("wrong", !right);
  } catch (error) {
    // A gateway routes what clients call alone, so the render says what /info would.
    const hidden = error.status === 404;
    model.textContent = hidden ? `This page was made for ${rendered.model_id}.` : `${rendered.model_id}. ${error.message}`;
    model.classList.toggle("wrong", !hidden);
  }
  const facts = {
    Model: rendered.model_id,
    Version: rendered.version ?? "as the pod resolved it",
    "Numbers per vector": rendered.dimensions ?? "not known",
    Pooling: rendered.pooling,
    "Longest input": `${info.max_input_length ?? rendered.max_input_tokens} tokens; what is longer is cut`,
    "Texts per request": service.batch,
    "Computes in": info.model_dtype ?? rendered.dtype,
    Server: info.version ? `TEI ${info.version}${info.docker_label ? `, ${info.docker_label}` : ""}` : "Text Embeddings Inference",
    Prompts: rendered.prompt_of_server ? `the server writes “${rendered.prompt_of_server}” before every text by itself`
      : Object.entries(rendered.prompts).map(([name, text]) => `${name}: “${text}”`).join("; ") || "none",
  };
  document.getElementById("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, fact]) => [make("dt", {}, name), make("dd", {}, fact)]));
}

document.getElementById("access").addEventListener("submit", (event) => { event.preventDefault(); greet(); });
document.getElementById("key").addEventListener("change", greet);
greet();
