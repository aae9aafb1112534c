// The search page: asks the server that it comes from, and shows what that says as text, never as markup.

const PER_PAGE = 24;
const MOST = 1000; // rows that may be passed over
const TRACED = 5; // results that states are compared with
const WORDS = 3; // of each state
const by = (id) => document.getElementById(id);

let picture = null; // a data URI
let like = null; // the id of a result whose neighbours are wanted
let current = null; // the body of the search that is shown
let shown = 0;
let running = new AbortController(); // what the search that is shown, or begun, still waits for

function make(name, text, className) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

async function ask(path, body, signal) {
  const key = sessionStorage.getItem("plume-key");
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let answer;
  try {
    answer = await fetch(path, { headers, signal, ...(body && { method: "POST", body: JSON.stringify(body) }) });
  } catch {
    throw new Error("The server does not answer; is it still running?");
  }
  by("key").hidden = answer.status !== 401;
  let content = null;
  try {
    content = await answer.json();
  } catch {
    // what stands between may answer something else
  }
  if (!answer.ok || content === null) {
    const problem = new Error(content?.error?.message ?? `The server answered with status ${answer.status}.`);
    problem.status = answer.status;
    throw problem;
  }
  return content;
}

function tell(problem) {
  by("problem").hidden = !problem;
  by("problem").textContent = problem ?? "";
}

// What is asked for.

function asked() {
  const words = by("words").value.trim();
  const steps = by("steps").value;
  const body = {
    kinds: [...document.querySelectorAll("#kinds input:checked")].map((box) => box.value),
    folder: by("folder").value.trim(),
    since: by("since").value,
    until: by("until").value,
    top_k: PER_PAGE,
  };
  if (by("close").checked) body.cut = "auto";
  if (by("once").checked) body.group_by = "file";
  if (like) return { ...body, like };
  if (!words && !picture) return null;
  if (by("written").checked) body.hybrid = 0.5;
  if (steps !== "") body.num_latent_steps = Number(steps);
  body.query = picture ? { image: picture, ...(words && { text: words }) } : words;
  return body;
}

// Words, filters and settings stand in the address, so that a search can be kept; a picture does not fit there.
function keep() {
  const kept = new URLSearchParams();
  for (const id of ["words", "folder", "since", "until", "steps"]) {
    if (by(id).value.trim()) kept.set(id, by(id).value.trim());
  }
  for (const box of document.querySelectorAll("#kinds input:checked")) kept.append("kind", box.value);
  for (const id of ["written", "close", "once", "compare", "inside"]) if (by(id).checked) kept.set(id, "1");
  history.replaceState(null, "", kept.size ? `?${kept}` : location.pathname);
}

function recall() {
  const kept = new URLSearchParams(location.search);
  for (const id of ["words", "folder", "since", "until", "steps"]) by(id).value = kept.get(id) ?? "";
  for (const id of ["written", "close", "once", "compare", "inside"]) by(id).checked = kept.has(id);
}

async function search() {
  keep();
  const body = asked();
  running.abort();
  running = new AbortController();
  const { signal } = running;
  current = body;
  shown = 0;
  by("more").hidden = by("trace").hidden = true;
  by("hits").replaceChildren();
  by("others").replaceChildren();
  if (body === null) {
    by("status").textContent = "";
    return;
  }
  const isCompared = by("compare").checked && body.query !== undefined;
  by("columns").classList.toggle("two", isCompared);
  by("other").hidden = !isCompared;
  by("status").textContent = "Searching…";
  try {
    const began = performance.now();
    const [found, other] = await Promise.all([
      ask("search", { ...body, steps: by("inside").checked }, signal),
      isCompared ? ask("search", { ...body, num_latent_steps: 0 }, signal) : null,
    ]);
    if (signal.aborted) return;
    tell(null);
    const seconds = ((performance.now() - began) / 1000).toFixed(2);
    by("title").textContent =
      found.num_latent_steps === null ? "K as the gate decides" : `K = ${found.num_latent_steps}`;
    by("status").textContent =
      `${found.hits.length || "No"} results in ${seconds} s` + (body.like ? ", like the one that was chosen" : "");
    show(found.hits, by("hits"));
    if (other) show(other.hits, by("others"));
    if (found.steps) trace(found.steps, found.hits);
    shown = found.hits.length;
    by("more").hidden = isCompared || shown < PER_PAGE;
  } catch (error) {
    if (signal.aborted) return;
    by("status").textContent = "";
    tell(error.message);
  }
}

// More of the search that is shown, whatever stands in the fields by now.
async function more() {
  const { signal } = running;
  by("more").disabled = true;
  try {
    const found = await ask("search", { ...current, offset: shown }, signal);
    if (signal.aborted) return;
    tell(null);
    show(found.hits, by("hits"));
    shown += found.hits.length;
    by("more").hidden = found.hits.length < PER_PAGE || shown > MOST;
  } catch (error) {
    if (!signal.aborted) tell(error.message);
  } finally {
    by("more").disabled = false;
  }
}

// What was found.

function show(hits, list) {
  for (const hit of hits) {
    const card = by("card").content.cloneNode(true);
    const name = card.querySelector(".name");
    const preview = card.querySelector(".preview");
    const isClip = hit.kind === "video" && hit.start !== undefined;
    const page = hit.page
      ? `, page ${hit.page} of ${hit.num_pages}`
      : isClip ? `, ${hit.start} to ${hit.end.toFixed(0)} s` : "";
    const part = hit.page ? `#page=${hit.page}` : isClip ? `#t=${hit.start},${hit.end}` : "";
    const file = `search/${hit.id}/file${part}`;
    name.textContent = hit.name;
    name.title = hit.path;
    if (hit.has_file) name.href = preview.href = file;
    preview.setAttribute("aria-hidden", "true");
    preview.tabIndex = -1; // the name beside it leads to the same place
    if (hit.has_thumbnail) {
      const image = make("img");
      image.loading = "lazy";
      image.alt = "";
      image.src = `search/${hit.id}/thumbnail`;
      preview.append(image);
    } else {
      preview.textContent = hit.excerpt;
    }
    card.querySelector(".score").textContent = hit.score.toFixed(3);
    card.querySelector(".score").title = "cosine to the query";
    card.querySelector("meter").value = hit.score;
    card.querySelector("meter").setAttribute("aria-hidden", "true");
    if (hit.text_score !== null && hit.has_thumbnail && hit.excerpt) {
      card.querySelector(".found").textContent = hit.excerpt;
      card.querySelector(".found").hidden = false;
    }
    const when = hit.changed ? `, ${hit.changed}` : "";
    card.querySelector(".about").textContent = `${hit.kind}${page}${when}${hit.is_there ? "" : " (gone)"}`;
    card.querySelector(".like").addEventListener("click", () => {
      like = hit.id;
      search();
      by("words").focus();
    });
    list.append(card);
  }
}

function trace(steps, hits) {
  const compared = hits.slice(0, TRACED);
  const heads = ["After step", "Nearest words", "Experts", "Embedding", ...compared.map((hit) => hit.name)];
  by("head").replaceChildren(...heads.map((text) => Object.assign(make("th", text), { scope: "col", title: text })));
  by("states").replaceChildren(
    ...steps.map((state, step) => {
      const row = make("tr");
      row.append(Object.assign(make("th", String(step)), { scope: "row" }));
      const words = make("td");
      for (const { token, probability } of state.words.slice(0, WORDS)) {
        const word = make("span", token, "word");
        word.title = `probability ${probability.toPrecision(2)}`;
        words.append(word);
      }
      row.append(words, make("td", state.experts.join(", ")));
      for (const cosine of [state.cosine_to_embedding, ...state.cosine_to_hits.slice(0, TRACED)]) {
        const cell = make("td", cosine.toFixed(3), "number");
        const share = Math.round(60 * Math.max(cosine, 0));
        cell.style.background = `color-mix(in srgb, var(--accent) ${share}%, transparent)`;
        row.append(cell);
      }
      return row;
    }),
  );
  by("trace").hidden = false;
}

// A picture: dropped, picked or pasted.

function take(file) {
  if (!file?.type.startsWith("image/")) {
    tell("Only pictures can be searched with.");
    return;
  }
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    picture = reader.result;
    like = null;
    by("shown").src = picture;
    by("chip").hidden = false;
    search();
  });
  reader.addEventListener("error", () => tell("The picture cannot be read."));
  reader.readAsDataURL(file);
}

function forget() {
  picture = like = null;
  by("chip").hidden = true;
  by("file").value = "";
}

by("pick").addEventListener("click", () => by("file").click());
by("file").addEventListener("change", () => by("file").files.length && take(by("file").files[0]));
by("drop").addEventListener("click", () => {
  forget();
  search();
  by("words").focus();
});
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!event.dataTransfer.files.length) return; // text goes where it is dropped
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const isText = event.clipboardData.types.includes("text/plain"); // tables come as both
  if (event.clipboardData.files.length && !isText) {
    event.preventDefault();
    take(event.clipboardData.files[0]);
  }
});
document.addEventListener("keydown", (event) => {
  const isTyping = event.target instanceof HTMLInputElement;
  if (event.key === "/" && !isTyping) {
    event.preventDefault();
    by("words").focus();
  }
  if (event.key === "Escape" && (picture || like)) {
    forget();
    search();
  }
});

by("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (JSON.stringify(asked()) === JSON.stringify(current) && shown) return; // a field has searched already
  if (by("words").value.trim() || picture) like = null;
  search();
});
by("form").addEventListener("change", (event) => {
  const isUnfinished = !event.target.checkValidity(); // such as a year of which two figures are typed
  if (!["words", "file"].includes(event.target.id) && !isUnfinished) search();
});
by("words").addEventListener("input", () => {
  like = null;
});
by("more").addEventListener("click", more);
by("key").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = by("secret").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    tell("A key is letters, figures and signs, without spaces.");
    return;
  }
  sessionStorage.setItem("plume-key", key);
  begin();
});

const RETRY_MS = 2000;

// What the index holds, which may take as long as the model is being loaded.
async function begin() {
  try {
    const about = await ask("search");
    tell(null);
    const kept = new URLSearchParams(location.search).getAll("kind");
    const legend = by("kinds").firstElementChild;
    const boxes = Object.entries(about.kinds).map(([kind, count]) => {
      const label = make("label");
      const box = Object.assign(make("input"), { type: "checkbox", value: kind, checked: kept.includes(kind) });
      label.append(box, ` ${kind} (${count.toLocaleString("en")})`);
      return label;
    });
    by("kinds").replaceChildren(legend, ...boxes);
    by("folders").replaceChildren(
      ...Object.keys(about.folders).map((folder) => Object.assign(make("option"), { value: folder })),
    );
    by("steps").max = about.max_latent_steps;
    by("steps").placeholder = about.query_latent_steps ?? "gate";
    if (current === null) by("status").textContent = `${about.rows.toLocaleString("en")} rows`;
    if (current === null && asked()) search();
  } catch (error) {
    tell(error.message);
    if (error.status === 503) setTimeout(begin, RETRY_MS);
  }
}

by("filters").open = matchMedia("(min-width: 40rem)").matches;
recall();
begin();
