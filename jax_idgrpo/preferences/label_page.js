"use strict";
// The page of `idgrpo annotate --page`: shows two videos in step and sends labels by keyboard.

const $ = (id) => document.getElementById(id);
const sides = [$("left"), $("right")];
let annotator = "", now = null, labels = {}, began = 0, busy = false, after = null;

async function send(address, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  };
  for (let attempt = 0; ; attempt++) {
    try {
      const reply = await fetch(address, options);
      const value = await reply.json();
      if (!reply.ok) throw Object.assign(new Error(value.error || reply.statusText), { final: true });
      $("error").textContent = "";
      return value;
    } catch (error) {
      if (error.final) { $("error").textContent = error.message; throw error; }
      // The server was stopped or restarted: the answer stays here until it is acknowledged.
      $("error").textContent = "The server does not answer; trying again.";
      await new Promise((done) => setTimeout(done, Math.min(500 * 2 ** attempt, 8000)));
    }
  }
}

// Words for annotators; other dimensions are shown by name.
const TITLES = { SA: "Who looks more like the photos?", motion: "Who moves better?" };

const media = (pair, name) => `media/${pair}/${name}`;

function names(unit) {
  return unit.exchanged ? ["B", "A"] : ["A", "B"];
}

function preload(unit) {
  if (!unit || unit.pair === now.pair) return;
  const [left, right] = names(unit);
  for (const name of [left, right, ...Array(unit.photos).keys()]) {
    fetch(media(unit.pair, name)).catch(() => {});
  }
}

function restart() {
  for (const video of sides) { video.currentTime = 0; video.play().catch(() => {}); }
}

function show(state) {
  now = state.now;
  after = state.after;
  labels = {};
  $("bar").max = state.total || 1;
  $("bar").value = state.done;
  $("count").textContent = `${state.done} of ${state.total}`;
  document.querySelector("footer").hidden = false;
  $("work").hidden = !now;
  $("end").hidden = Boolean(now);
  if (!now) { sides.forEach((video) => video.removeAttribute("src")); return; }
  $("prompt").textContent = now.prompt;
  $("photos").replaceChildren(...Array.from({ length: now.photos }, (_, number) => {
    const image = new Image();
    image.src = media(now.pair, number);
    image.alt = `person ${number + 1}`;
    return image;
  }));
  names(now).forEach((name, side) => { sides[side].src = media(now.pair, name); });
  questions();
  began = performance.now();
  let ready = 0;
  for (const video of sides) {
    video.oncanplay = () => { video.oncanplay = null; if (++ready === 2) { restart(); preload(after); } };
  }
}

function questions() {
  const current = now.dimensions.find((name) => !(name in labels));
  $("questions").replaceChildren(...now.dimensions.map((name) => {
    const item = document.createElement("li");
    const given = labels[name];
    item.textContent = `${TITLES[name] || name}${given === undefined ? "" : ` ${given}`}`;
    if (name === current) item.className = "current";
    return item;
  }));
  return current;
}

// Labels are kept as the annotator sees them; they are sent in terms of A and B of the CSV.
function stored() {
  const other = { A: "B", B: "A", same: "same" };
  return Object.fromEntries(Object.entries(labels).map(
    ([name, given]) => [name, now.exchanged ? other[given] : given]));
}

async function submit() {
  busy = true;
  try {
    show(await send("label", {
      annotator, unit: now.unit, labels: stored(), seconds: (performance.now() - began) / 1000,
    }));
  } catch (error) {
    labels = {};
    questions();
  } finally {
    busy = false;
  }
}

async function press(key) {
  if (busy || !annotator) return;
  const given = { a: "A", arrowleft: "A", b: "B", arrowright: "B", s: "same", arrowdown: "same" }[key];
  if (key === "u") {
    if (Object.keys(labels).length) {
      delete labels[Object.keys(labels).pop()];
      questions();
      return;
    }
    busy = true;
    try { show(await send("undo", { annotator })); } catch (error) { /* shown */ } finally { busy = false; }
  } else if (!now) {
    return;
  } else if (given) {
    labels[questions()] = given;
    if (!questions()) await submit();
  } else if (key === "k") {
    labels = {};
    await submit();
  } else if (key === "r") {
    restart();
  } else if (key === " ") {
    const paused = sides[0].paused;
    for (const video of sides) paused ? video.play().catch(() => {}) : video.pause();
  }
}

// Both videos start together, and start again when the longer one has ended.
for (const video of sides) {
  video.addEventListener("ended", () => { if (sides.every((one) => one.ended)) restart(); });
  video.addEventListener("error", () => {
    if (video.getAttribute("src")) $("error").textContent = "A video cannot be shown; press K to skip the pair.";
  });
}
sides[0].addEventListener("timeupdate", () => {
  const gap = sides[0].currentTime - sides[1].currentTime;
  if (!sides[0].ended && !sides[1].ended && Math.abs(gap) > 0.1) sides[1].currentTime = sides[0].currentTime;
});

document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const key = event.key.toLowerCase();
  if (key === " " || key.startsWith("arrow")) event.preventDefault();
  press(key);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-key]");
  if (button) { button.blur(); press(button.dataset.key); }
});

async function start(name) {
  annotator = name;
  try { sessionStorage.setItem("annotator", name); } catch (error) { /* private window */ }
  $("start").hidden = true;
  try { show(await send(`next?annotator=${encodeURIComponent(name)}`)); } catch (error) {
    annotator = "";
    $("start").hidden = false;
  }
}

$("start").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("name").value.trim()) start($("name").value.trim());
});
let kept = null;
try { kept = sessionStorage.getItem("annotator"); } catch (error) { /* private window */ }
if (kept) start(kept);
