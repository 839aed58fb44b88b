// The page of `omni-ray serve`: asks /v1/chat/completions and shows question, answer, sound and time.
"use strict";

const $ = (id) => document.getElementById(id);
const SOUND_FORMS = { wav: "wav", wave: "wav", mp3: "mp3", flac: "flac", ogg: "ogg", oga: "ogg" };
const FILM_TYPES = { mp4: "video/mp4", m4v: "video/mp4", mov: "video/quicktime", webm: "video/webm", mkv: "video/x-matroska" };
const PLAIN_PICTURES = ["image/png", "image/jpeg", "image/webp", "image/bmp"];

let added = [];   // {name, kind, part, show}: kind image | audio | video, part for the request, show an address to look at
let history = []; // earlier turns as request messages
let busy = false;
const fileNames = new WeakMap(); // of the parts that were made from files

function sayError(sentence) {
  $("error").textContent = sentence;
  $("error").hidden = !sentence;
  if (sentence) $("error").scrollIntoView({ block: "nearest" });
}

function ending(name) {
  return name.includes(".") ? name.split(".").pop().toLowerCase() : "";
}

function asDataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("the file cannot be read; choose it again"));
    reader.readAsDataURL(blob);
  });
}

const base64Of = (uri) => uri.slice(uri.indexOf(",") + 1);

async function picturePart(file) {
  let blob = file;
  if (!PLAIN_PICTURES.includes(file.type)) { // gif, avif, heic: the browser turns it into png if it can look at it
    const picture = await createImageBitmap(file);
    const canvas = document.createElement("canvas");
    canvas.width = picture.width;
    canvas.height = picture.height;
    canvas.getContext("2d").drawImage(picture, 0, 0);
    blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }
  return { type: "image_url", image_url: { url: await asDataUri(blob) } };
}

async function soundPart(file) {
  const form = SOUND_FORMS[ending(file.name)];
  if (form) return { type: "input_audio", input_audio: { data: base64Of(await asDataUri(file)), format: form } };
  const rate = 16000; // m4a, webm and others: decoded here, sent as wav
  const context = new OfflineAudioContext(1, 1, rate);
  const sound = await context.decodeAudioData(await file.arrayBuffer());
  const mixed = new OfflineAudioContext(1, sound.length, rate);
  const source = mixed.createBufferSource();
  source.buffer = sound;
  source.connect(mixed.destination);
  source.start();
  const wave = (await mixed.startRendering()).getChannelData(0);
  return { type: "input_audio", input_audio: { data: base64Of(await asDataUri(wavOf(wave, rate))), format: "wav" } };
}

function wavOf(wave, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * wave.length));
  const word = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  word(0, "RIFF"); view.setUint32(4, 36 + 2 * wave.length, true); word(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  word(36, "data"); view.setUint32(40, 2 * wave.length, true);
  wave.forEach((x, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, x)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}

async function filmPart(file) {
  const type = FILM_TYPES[ending(file.name)] || "video/mp4";
  const uri = await asDataUri(file);
  return { type: "video_url", video_url: { url: `data:${type};base64,${base64Of(uri)}` } };
}

async function addFile(file) {
  sayError("");
  const end = ending(file.name);
  let kind = file.type.split("/")[0];
  if (SOUND_FORMS[end]) kind = "audio";
  else if (FILM_TYPES[end] && kind !== "audio") kind = "video";
  const makers = { image: picturePart, audio: soundPart, video: filmPart };
  if (!makers[kind]) return sayError(`${file.name} is neither a picture, a sound nor a film.`);
  try {
    const part = await makers[kind](file);
    fileNames.set(part, file.name);
    added.push({ name: file.name, kind, part, show: URL.createObjectURL(file) });
    showFiles();
    $("text").focus();
  } catch {
    sayError(`${file.name} cannot be read here; send a png, jpeg, wav, mp3, flac, ogg or mp4 file.`);
  }
}

function showFiles() {
  $("files").replaceChildren(...added.map((item, i) => {
    const line = document.createElement("li");
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${item.name}`);
    remove.onclick = () => { added.splice(i, 1); showFiles(); };
    line.append(item.name, remove);
    return line;
  }));
}

function player(kind, address, label) {
  const element = document.createElement(kind === "image" ? "img" : kind);
  element.className = "media";
  element.src = address;
  if (kind === "image") {
    element.alt = label;
    element.onload = () => element.classList.toggle("small", element.naturalWidth < 128);
  } else {
    element.controls = true;
    element.setAttribute("aria-label", label);
    if (kind === "video") element.onloadedmetadata = () => element.classList.toggle("small", element.videoWidth < 240);
  }
  return element;
}

function paragraph(text, style) {
  const element = document.createElement("p");
  element.textContent = text;
  if (style) element.className = style;
  return element;
}

function turn(whose, ...children) {
  $("hint")?.remove();
  const element = document.createElement("article");
  element.className = `turn ${whose}`;
  element.setAttribute("aria-label", whose === "mine" ? "Your question" : "Answer");
  element.append(...children);
  $("log").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

async function request(messages, speech) {
  const body = { messages };
  if (speech) Object.assign(body, { modalities: ["text", "audio"], audio: { voice: "default", format: "wav" } });
  let reply;
  try {
    reply = await fetch("v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
  } catch {
    throw new Error("The server does not answer; is it still running?");
  }
  let answer = null;
  try { answer = await reply.json(); } catch { /* an answer without a body of ours */ }
  if (!reply.ok) throw new Error(inFileNames(answer?.error, messages) || `The server answered with status ${reply.status}.`);
  return answer;
}

// The server names a part as messages[0].content[1]; a reader knows it by the file's name.
function inFileNames(error, messages) {
  const place = /^messages\[(\d+)\]\.content\[(\d+)\]/.exec(error?.message ?? "");
  const name = place && fileNames.get(messages[place[1]]?.content?.[place[2]]);
  return name ? name + error.message.slice(place[0].length) : error?.message;
}

function showAnswer(answer, seconds) {
  const message = answer.choices[0].message;
  const text = message.content ?? message.audio?.transcript ?? "";
  const parts = [text ? paragraph(text) : paragraph("(no words)", "silent")];
  if (message.audio?.data) {
    const sound = player("audio", `data:audio/wav;base64,${message.audio.data}`, "Spoken answer");
    parts.push(sound);
    sound.play().catch(() => {}); // browsers may want a click first; the controls are there
  }
  const cut = answer.choices[0].finish_reason === "length" ? ", cut at the longest answer" : "";
  parts.push(paragraph(`${seconds.toFixed(2)} s, ${answer.usage.prompt_tokens} rows in, ${answer.usage.completion_tokens} out${cut}`, "facts"));
  turn("theirs", ...parts);
  return text;
}

async function ask(event) {
  event.preventDefault();
  const text = $("text").value.trim();
  if (busy || (!text && !added.length)) return;
  sayError("");
  const content = [...added.map((item) => item.part), ...(text ? [{ type: "text", text }] : [])];
  const question = { role: "user", content };
  const asked = turn("mine", ...added.map((item) => player(item.kind, item.show, item.name)), ...(text ? [paragraph(text)] : []));
  const kept = { text: $("text").value, added };
  $("text").value = "";
  added = [];
  showFiles();
  setBusy(true);
  const began = performance.now();
  try {
    const earlier = $("remember").checked ? history : [];
    const answer = await request([...earlier, question], $("speak").checked);
    const said = showAnswer(answer, (performance.now() - began) / 1000);
    history.push(question, { role: "assistant", content: said });
  } catch (error) {
    asked.remove(); // it stands in the form again: mend it and ask once more
    $("text").value = kept.text;
    added = kept.added;
    showFiles();
    sayError(error.message);
  } finally {
    setBusy(false);
    $("text").focus();
  }
}

function setBusy(value) {
  busy = value;
  $("send").disabled = value;
  $("send").textContent = value ? "Asking" : "Ask";
  $("log").setAttribute("aria-busy", String(value));
}

async function showModel() {
  try {
    const reply = await fetch("v1/models");
    const models = await reply.json();
    if (!reply.ok) throw new Error(models?.error?.message);
    $("model").textContent = models.data[0].id;
  } catch (error) {
    $("model").textContent = "not reachable";
    sayError(error.message || "The server does not answer.");
  }
}

$("ask").addEventListener("submit", ask);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("choose").addEventListener("change", async (event) => {
  for (const file of [...event.target.files]) await addFile(file);
  event.target.value = "";
});
document.addEventListener("paste", (event) => {
  for (const file of event.clipboardData?.files ?? []) addFile(file);
});
let inside = 0;
document.addEventListener("dragenter", () => { inside += 1; document.body.classList.add("dragging"); });
document.addEventListener("dragleave", () => { inside -= 1; if (inside <= 0) document.body.classList.remove("dragging"); });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  inside = 0;
  document.body.classList.remove("dragging");
  for (const file of event.dataTransfer.files) await addFile(file);
});
showModel();
