"use strict";
// Plays what benchmarks/page.py recorded (DATA, from data.js). Every film is a row of a picture, its frames side by side.
const SIZE = 64, RATE = 125; // pixels of a frame, milliseconds a frame
const get = id => document.getElementById(id);
const say = (id, html) => { get(id).innerHTML = html; };
const quiet = matchMedia("(prefers-reduced-motion: reduce)");

// ---------------------------------------------------------------------------------------------------------- films
const sheets = {};
function sheet(name) {
  if (!sheets[name]) {
    sheets[name] = new Image();
    sheets[name].src = `page/${name}.webp`;
  }
  return sheets[name];
}
const films = new Map(); // canvas -> its frames, each [sheet, column, row]
let clock = 0, moving = !quiet.matches;

function paint(canvas, [name, x, y], left = 0, top = 0, dim = 1) {
  const picture = sheet(name), pen = canvas.getContext("2d");
  const draw = () => {
    pen.clearRect(left, top, SIZE, SIZE);
    pen.globalAlpha = dim;
    pen.drawImage(picture, x * SIZE, y * SIZE, SIZE, SIZE, left, top, SIZE, SIZE);
    pen.globalAlpha = 1;
  };
  if (picture.complete) draw(); else picture.addEventListener("load", draw, { once: true });
}
function show(canvas, frames, label) {
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  films.set(canvas, frames);
  paint(canvas, frames[moving ? clock % frames.length : frames.length - 1]);
}
function still(frame, label = "") {
  const canvas = make("canvas", { width: SIZE, height: SIZE });
  if (label) canvas.setAttribute("aria-label", label), canvas.setAttribute("role", "img");
  else canvas.setAttribute("aria-hidden", "true");
  paint(canvas, frame);
  return canvas;
}
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
const row = (name, y, count, first = 0) => Array.from({ length: count }, (_, x) => [name, first + x, y]);
const hold = frames => [...frames, ...Array(10).fill(frames[frames.length - 1])]; // the end stays for a while
setInterval(() => {
  if (!moving || document.hidden) return;
  clock += 1;
  for (const [canvas, frames] of films)
    if (canvas.isConnected) paint(canvas, frames[clock % frames.length]); else films.delete(canvas);
}, RATE);
function setMotion(on) {
  moving = on;
  get("motion").setAttribute("aria-pressed", String(!on));
  for (const [canvas, frames] of films) if (!on) paint(canvas, frames[frames.length - 1]);
}
get("motion").addEventListener("click", () => setMotion(!moving));
setMotion(moving);

const scene = name => ["scenes", DATA.scenes.indexOf(name), 0];
const end = (name, like) => like.includes(name) ? `${name} <span class="heart" aria-label="liked">♥</span>` : name;
const list = names => names.length < 2 ? names.join() : `${names.slice(0, -1).join(", ")} or ${names[names.length - 1]}`;

// ---------------------------------------------------------------------------------------- 1: route it yourself
const L = DATA.lattice, FRAMES = 6; // that a branch makes by itself
const anchor = L.routes.length; // the last film of both pictures
let order = [...L.cards]; // cards, the one lit longest first; the last CHOSEN are lit
let draw = -1; // which fresh noise; -1: none
const found = [{ tries: new Set(), ends: new Set() }, { tries: new Set(), ends: new Set() }];

const lit = () => order.slice(-L.chosen).sort((a, b) => a - b);
function tap(card) {
  if (draw < 0 && lit().includes(card)) { // goes dark, and the one that went dark last lights up again
    const others = order.filter(c => c !== card), at = others.length - L.chosen;
    order = [...others.slice(0, at), card, ...others.slice(at)];
  } else order = [...order.filter(c => c !== card), card];
  draw = -1;
  showRoute();
}
function strip() {
  const cards = [["first", 1], ...L.cards.map(c => [c, c]), ["last", L.fork - 1]];
  for (const [card, frame] of cards) {
    const locked = card !== frame;
    const picture = still(["past", frame, 0]);
    const text = locked ? (card === "first" ? "start ×3" : "now ×2") : "";
    const box = make(locked ? "div" : "button", { className: locked ? "lit" : "" }, picture, text);
    if (!locked) {
      box.type = "button";
      box.dataset.card = card;
      box.setAttribute("aria-label", `Frame ${frame}, ${L.scenes[frame]}`);
      box.addEventListener("click", () => tap(card));
    } else {
      box.setAttribute("role", "img");
      box.setAttribute("aria-label", `${L.scenes[frame]}, always read: ${card === "first" ? "the first three frames" : "the two frames before the fork"}`);
    }
    get("strip").append(box);
  }
  get("strip").append(make("div", { className: "next", textContent: "?", ariaHidden: "true" }));
}
function showRoute(example = false) {
  const fresh = draw >= 0, route = L.routes.indexOf(lit().join("-"));
  const ends = fresh ? L.freshEnds : L.ends, rewards = fresh ? L.freshRewards : L.rewards, at = fresh ? draw : route;
  const read = fresh ? L.ordinary : [...L.ordinary.slice(0, 3), ...lit(), L.fork - 2, L.fork - 1];
  for (const box of get("strip").querySelectorAll("button")) {
    const on = read.includes(Number(box.dataset.card));
    box.classList.toggle("lit", on);
    box.setAttribute("aria-pressed", String(on));
  }
  const film = (name, y) => hold([...row("past", 0, 6, L.fork - 6), ...row(name, y, FRAMES)]);
  clock = 0; // from the last shared frames on
  show(get("film"), film(fresh ? "fresh" : "routes", at), `Film: the hero goes on and settles: ${ends[at]}`);
  const told = (what, name, reward) => `${what}.<br>He settles: <b>${end(name, L.like)}</b><br>reward <b>${reward.toFixed(2)}</b>`;
  say("ending", told(fresh ? "New noise" : example ? "An example" : "Your choice", ends[at], rewards[at]));
  show(get("usual"), film("routes", anchor), `Film with the usual memory, settles: ${L.ends[anchor]}`);
  say("usual-t", told("Usual memory", L.ends[anchor], L.rewards[anchor]));
  const counts = {};
  for (const frame of read.slice(3)) counts[L.scenes[frame]] = (counts[L.scenes[frame]] || 0) + 1;
  const most = Math.max(...Object.values(counts)), follows = counts[ends[at]] === most;
  const votes = Object.entries(counts).sort((a, b) => b[1] - a[1]).map(([name, n]) => `${n} × ${name}`).join(", ");
  say("why", fresh ? "Usual memory, the last six frames, and <b>new noise</b>: every pixel is drawn anew, but the story?"
    : `After the start it sees <b>${votes}</b>. The hero settles where most of what he remembers was${follows ? "." : ": here the model errs."}`);
  const tally = found[fresh ? 1 : 0];
  if (!example) {
    tally.tries.add(at);
    tally.ends.add(ends[at]);
  }
  [...get("found").tBodies[0].rows].forEach((line, k) => {
    line.cells[1].textContent = found[k].tries.size;
    line.cells[2].replaceChildren(...[...found[k].ends].map(name => still(scene(name), name)));
  });
}
get("fresh").addEventListener("click", () => {
  draw = (draw + 1) % (L.freshEnds.length - 1);
  showRoute();
});
get("any").addEventListener("click", () => {
  draw = -1;
  const other = L.routes[Math.floor(Math.random() * L.routes.length)].split("-").map(Number);
  order = [...L.cards.filter(c => !other.includes(c)), ...other];
  showRoute();
});
order = [...L.cards.slice(L.chosen), ...L.cards.slice(0, L.chosen)];
say("script", L.script);
say("follow", `${L.follow} of ${L.routes.length}`);
strip();
showRoute(true);

// ------------------------------------------------------------------------------------------- 2: watch it learn
const run = DATA.runs[0], updates = run.groups.length, letters = "ABCDEFGHIJKLMNOP";
const signed = x => Math.abs(x) < 0.005 ? "±0" : (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
const percent = x => `${Math.round(100 * x)}%`;
let timer = 0;

function chart(values, now, low, high, bars, text) {
  const w = 320, h = 130, n = values.length, x = k => 52 + (w - 66) * (n > 1 ? k / (n - 1) : 0.5);
  const y = v => 8 + (h - 30) * (high - v) / (high - low);
  const rule = v => `<line x1="42" x2="${w}" y1="${y(v)}" y2="${y(v)}" stroke="var(--line)"/><text x="38" y="${y(v) + 4}" text-anchor="end">${text(v)}</text>`;
  const step = bars ? 1 : 0; // bars belong to an update, points stand after it
  const marks = values.map((v, k) => bars
    ? `<rect x="${x(k) - 7}" width="14" y="${Math.min(y(v), y(0))}" height="${Math.abs(y(v) - y(0)) + 0.5}" fill="${k + 1 === Math.max(now, 1) ? "var(--lit)" : "var(--soft)"}"/>`
    : `<circle cx="${x(k)}" cy="${y(v)}" r="${k === now ? 7 : 3}" fill="${k === now ? "var(--lit)" : "var(--soft)"}"/>`).join("");
  const line = bars ? "" : `<polyline fill="none" stroke="var(--soft)" stroke-width="2" points="${values.map((v, k) => `${x(k)},${y(v)}`).join(" ")}"/>`;
  const names = values.map((_, k) => `<text x="${x(k)}" y="${h - 4}" text-anchor="middle">${k + step}</text>`).join("");
  const told = values.map((v, k) => `${k + step}: ${text(v)}`).join(", ");
  return `<svg viewBox="0 0 ${w} ${h}" role="img" aria-label="By update: ${told}">${rule(low)}${rule(high)}${bars && low < 0 ? rule(0) : ""}${line}${marks}${names}</svg>`;
}
function branchCard(group, g, now) {
  const isAnchor = g === group.A.length;
  const name = isAnchor ? "usual memory" : `branch ${letters[g]}`;
  const card = make("li", {}, still(["groups", g, now], `${name} ends: ${group.ends[g]}`));
  const pull = group.force[g], most = Math.max(...group.p, ...group.later);
  const what = pull > 0.05 ? `<b class="pulled">▲ pulled</b>` : pull < -0.05 ? `<b class="pushed">▼ pushed</b>` : "left alone";
  const bars = isAnchor ? "" : `energy ${group.energy[g].toFixed(2)}<br>probability ${percent(group.p[g])} → ${percent(group.later[g])}
    <span class="bar was" style="width:${100 * group.p[g] / most}%"></span><span class="bar" style="width:${100 * group.later[g] / most}%"></span>`;
  const worth = isAnchor ? `reward ${group.anchor.toFixed(2)}` : `reward ${signed(group.reward[g] - group.anchor)}`;
  card.insertAdjacentHTML("beforeend", `<b>${name}</b><br>${end(group.ends[g], run.like)}<br>${worth}<br>${isAnchor ? "the measure" : what}<br>${bars}`);
  return card;
}
function showUpdate(now) {
  get("update").value = now;
  get("update").setAttribute("aria-valuetext", `after ${now} of ${updates} updates`);
  say("done", `${now} of ${updates}`);
  [...get("five").children].forEach((figure, k) => {
    const name = run.films[now][k];
    show(figure.firstChild, hold(row("updates", now * 5 + k, run.frames)), `Film ${k + 1}, after ${now} updates, settles: ${name}`);
    figure.lastChild.innerHTML = `ends: ${end(name, run.like)}`;
  });
  say("curve-t", `Test films that end in a liked scene: <b>${percent(run.liked[now])}</b>`);
  say("curve", chart(run.liked, now, 0, 1, false, percent));
  const over = run.groups.map(group => group.over), far = Math.max(0.1, ...over.map(Math.abs));
  say("over", chart(over, now, -far, far, true, signed));
  const index = Math.max(now, 1) - 1, group = run.groups[index];
  say("group-h", `Update ${index + 1} ${now ? "learned" : "will learn"} from branches such as these: <q>${group.script}</q>`);
  get("branches").replaceChildren(...group.ends.map((_, g) => branchCard(group, g, index)));
}
function play(on) {
  clearInterval(timer);
  get("play").textContent = on ? "Pause" : "Play";
  get("play").setAttribute("aria-pressed", String(on));
  if (on) timer = setInterval(() => Number(get("update").value) < updates ? step(1, true) : play(false), 2500);
}
function step(by, playing = false) {
  if (!playing) play(false);
  showUpdate(Math.min(updates, Math.max(0, Number(get("update").value) + by)));
}
get("update").max = updates;
get("update").addEventListener("input", () => step(0));
get("back").addEventListener("click", () => step(-1));
get("next").addEventListener("click", () => step(1));
get("play").addEventListener("click", () => {
  const on = get("play").textContent === "Play";
  if (on && Number(get("update").value) === updates) showUpdate(0);
  play(on);
});
for (let k = 0; k < 5; k++) get("five").append(make("figure", {}, make("canvas", { width: SIZE, height: SIZE }), make("figcaption")));
say("likes", list(run.like));
say("prompt", run.script);

// -------------------------------------------------------------------------------------- 3: you choose the taste
const ACROSS = 8; // films in a line
function grid(id, sheetName, y, ends, like) {
  const canvas = get(id), liked = ends.filter(name => like.includes(name)).length;
  canvas.width = ACROSS * SIZE;
  canvas.height = Math.ceil(ends.length / ACROSS) * SIZE;
  ends.forEach((name, k) => paint(canvas, [sheetName, k, y], k % ACROSS * SIZE, Math.floor(k / ACROSS) * SIZE, like.includes(name) ? 1 : 0.22));
  canvas.setAttribute("aria-label", `${liked} of ${ends.length} films end in a liked scene`);
  say(`${id}-t`, `${id === "before" ? "Before" : "After"} training: <b>${liked} of ${ends.length}</b> liked <span class="heart" aria-hidden="true">♥</span>`);
  return liked;
}
function showTaste(k) {
  const { like, before, after, pairs, journey, frames } = DATA.runs[k], n = before.length;
  const was = grid("before", `ends${k}`, 0, before, like), is = grid("after", `ends${k}`, 1, after, like);
  say("verdict", `Rewarded for ${list(like)}: <b>${was} → ${is}</b> of ${n} films end where it is liked. The journey before is in order in ${percent(journey[0])} → ${percent(journey[journey.length - 1])}.`);
  get("pairs").replaceChildren(...pairs.map(({ film, script }, j) => {
    const [a, b] = [0, pairs.length].map(() => make("canvas", { width: SIZE, height: SIZE }));
    show(a, hold(row(`pairs${k}`, j, frames)), `Before training, settles: ${before[film]}`);
    show(b, hold(row(`pairs${k}`, pairs.length + j, frames)), `After training, settles: ${after[film]}`);
    const caption = make("figcaption", { innerHTML: `<q>${script}</q><br>ends: ${end(before[film], like)} → ${end(after[film], like)}` });
    return make("figure", { className: "pair" }, a, make("span", { textContent: "→", ariaHidden: "true" }), b, caption);
  }));
}
DATA.runs.forEach(({ like }, k) => {
  const radio = make("input", { type: "radio", name: "taste", value: k, checked: k === 0 });
  radio.addEventListener("change", () => showTaste(k));
  get("tastes").append(make("label", { className: "choice" }, radio, ...like.map(name => still(scene(name))), list(like)));
});
say("heldout", String(run.before.length));
addEventListener("load", () => { // what is farther down waits until the first screen is there
  showUpdate(0);
  showTaste(0);
});
