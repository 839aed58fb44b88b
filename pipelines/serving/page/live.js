// Live conversation over /v1/realtime: microphone and camera out, words and sound in.
"use strict";

const RATE = 24000;
const FRAME_MS = 500; // two looks a second
const live = {
  socket: null, context: null, microphone: null, stream: null, film: null, looks: 0, holding: false, answering: false, sentMs: 0,
  sources: [], playAt: 0, playing: null, turns: new Map(), endOfTurn: 0, level: 0, spoken: 0,
};

const say = (state) => { $("state").textContent = state; };
const send = (event) => { if (live.socket?.readyState === WebSocket.OPEN) live.socket.send(JSON.stringify(event)); };
const handsfree = () => $("handsfree").checked;

function toBase64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

function settings() {
  const detection = handsfree() ? { type: "server_vad" } : null;
  return {
    type: "realtime", output_modalities: ["audio"], omni: { video: true, statistics: true },
    audio: { input: { turn_detection: detection, transcription: { model: "same" } } },
  };
}

async function start() {
  sayError("");
  say("asking for the microphone");
  try {
    if (!navigator.mediaDevices) throw new Error("A browser gives its microphone to a secure page only (https, or localhost).");
    live.stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true } });
    live.context = new AudioContext({ sampleRate: RATE });
    await live.context.audioWorklet.addModule("page/microphone.js");
    live.microphone = new AudioWorkletNode(live.context, "microphone");
    live.microphone.port.onmessage = (message) => heard(message.data);
    live.context.createMediaStreamSource(live.stream).connect(live.microphone);
    await connect();
    $("talk").setAttribute("aria-pressed", "true");
    $("talk").textContent = "Stop";
    $("stage").hidden = false;
    $("hold").hidden = handsfree();
    draw();
    if ($("camera").checked) await openCamera();
  } catch (error) {
    stop();
    sayError(error.name === "NotAllowedError" ? "The microphone was not allowed; allow it in the address bar." : error.message);
  }
}

function connect() {
  return new Promise((resolve, reject) => {
    const address = new URL("v1/realtime", location.href);
    address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(address, ["realtime"]);
    live.socket = socket;
    socket.onmessage = (message) => {
      const event = JSON.parse(message.data);
      if (event.type === "session.created") send({ type: "session.update", session: settings() });
      if (event.type === "session.updated") resolve();
      follow(event);
    };
    socket.onclose = (event) => {
      reject(new Error(event.reason || "The server closed the conversation."));
      if (live.socket === socket) { stop(); if (event.code !== 1000) sayError(event.reason || "The connection was lost."); }
    };
  });
}

function stop() {
  const socket = live.socket;
  live.socket = null;
  socket?.close(1000);
  live.stream?.getTracks().forEach((track) => track.stop());
  closeCamera();
  silence();
  live.context?.close();
  Object.assign(live, { context: null, microphone: null, stream: null, holding: false, answering: false, sentMs: 0, level: 0, spoken: 0 });
  live.turns.clear();
  $("talk").setAttribute("aria-pressed", "false");
  $("talk").textContent = "Start talking";
  $("stage").hidden = $("hold").hidden = true;
  say("not connected");
}

function heard(piece) {
  live.level = Math.max(...piece.map(Math.abs), live.level * 0.8);
  if (!handsfree() && !live.holding) return;
  const view = new DataView(new ArrayBuffer(2 * piece.length));
  piece.forEach((x, i) => view.setInt16(2 * i, Math.max(-1, Math.min(1, x)) * 32767, true));
  send({ type: "input_audio_buffer.append", audio: toBase64(new Uint8Array(view.buffer)) });
  live.sentMs += (1000 * piece.length) / RATE;
}

function bubble(whose, id) {
  let found = live.turns.get(id);
  if (!found) {
    const words = paragraph("");
    const element = turn(whose, words);
    element.classList.add("heard");
    found = { element, words };
    live.turns.set(id, found);
  }
  return found;
}

const follows = {
  "session.updated": () => say(handsfree() ? "listening" : "hold the button to speak"),
  "input_audio_buffer.speech_started": (event) => {
    say("you speak");
    interrupted();
    bubble("mine", event.item_id).words.textContent = "\u2026";
  },
  "input_audio_buffer.speech_stopped": () => say("thinking"),
  "input_audio_buffer.committed": (event) => {
    live.endOfTurn = performance.now();
    bubble("mine", event.item_id).words.textContent ||= "\u2026";
  },
  "conversation.item.input_audio_transcription.completed": (event) => {
    bubble("mine", event.item_id).words.textContent = event.transcript || "(nothing understood)";
  },
  "response.created": () => { live.answering = true; say("answering"); },
  "response.output_audio_transcript.delta": (event) => {
    bubble("theirs", event.item_id).words.textContent += event.delta;
    $("log").parentElement.scrollTop = $("log").parentElement.scrollHeight;
  },
  "response.output_audio.delta": (event) => play(event),
  "response.done": (event) => {
    const done = event.response;
    live.answering = false;
    const item = done.output[0];
    if (item && done.status === "cancelled") bubble("theirs", item.id).element.classList.add("cut");
    if (item && !item.content[0]?.transcript && done.status !== "cancelled") bubble("theirs", item.id).words.textContent ||= "(no words)";
    if (done.status === "failed") sayError(done.status_details?.error?.message ?? "The answer failed.");
    say(handsfree() ? "listening" : "hold the button to speak");
  },
  error: (event) => sayError(event.error.message),
};

function follow(event) {
  follows[event.type]?.(event);
}

function play(event) {
  if (!live.context) return;
  if (live.endOfTurn) {
    $("latency").textContent = `${Math.round(performance.now() - live.endOfTurn)} ms`;
    $("latency").dataset.ms = Math.round(performance.now() - live.endOfTurn);
    live.endOfTurn = 0;
  }
  const raw = Uint8Array.from(atob(event.delta), (c) => c.charCodeAt(0));
  const samples = Float32Array.from(new Int16Array(raw.buffer), (x) => x / 32768);
  const buffer = live.context.createBuffer(1, samples.length, RATE);
  buffer.copyToChannel(samples, 0);
  const source = live.context.createBufferSource();
  source.buffer = buffer;
  source.connect(live.context.destination);
  const now = live.context.currentTime;
  if (live.playing?.id !== event.item_id) {
    live.playAt = now;
    live.playing = { id: event.item_id, began: now };
  }
  live.playAt = Math.max(live.playAt, now);
  source.start(live.playAt);
  live.playAt += buffer.duration;
  live.sources.push(source);
  live.spoken = Math.max(...samples.map(Math.abs), live.spoken * 0.8);
  source.onended = () => { live.sources = live.sources.filter((other) => other !== source); };
}

function silence() {
  live.sources.forEach((source) => { try { source.stop(); } catch { /* not begun */ } });
  live.sources = [];
}

// The user speaks into an answer: stop its sound, and tell the server how much of it was heard.
function interrupted() {
  if (!live.sources.length || !live.playing || !live.context) return;
  const heardMs = Math.max(0, Math.round(1000 * (live.context.currentTime - live.playing.began)));
  silence();
  bubble("theirs", live.playing.id).element.classList.add("cut");
  send({ type: "conversation.item.truncate", item_id: live.playing.id, content_index: 0, audio_end_ms: heardMs });
  live.playing = null;
}

async function openCamera() {
  try {
    live.film = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 320 }, facingMode: "user" } });
  } catch {
    $("camera").checked = false;
    return sayError("The camera was not allowed.");
  }
  const view = $("view");
  view.srcObject = live.film;
  view.hidden = false;
  await view.play();
  const canvas = document.createElement("canvas");
  live.looks = setInterval(() => {
    if (!view.videoWidth) return;
    canvas.width = Math.min(320, view.videoWidth);
    canvas.height = Math.round((canvas.width * view.videoHeight) / view.videoWidth);
    canvas.getContext("2d").drawImage(view, 0, 0, canvas.width, canvas.height);
    send({ type: "input_video_buffer.append", image: canvas.toDataURL("image/jpeg", 0.8), ts_ms: Math.round(live.sentMs) });
  }, FRAME_MS);
}

function closeCamera() {
  clearInterval(live.looks);
  live.film?.getTracks().forEach((track) => track.stop());
  live.film = null;
  $("view").hidden = true;
}

function draw() {
  if (!live.context) return;
  const canvas = $("wave"), pen = canvas.getContext("2d"), style = getComputedStyle(document.body);
  const image = pen.getImageData(2, 0, canvas.width - 2, canvas.height);
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.putImageData(image, 0, 0);
  const bar = (level, place, colour) => {
    const size = Math.max(1, level * canvas.height * 0.48);
    pen.fillStyle = colour;
    pen.fillRect(canvas.width - 2, place - size / 2, 2, size);
  };
  bar(live.level, canvas.height * 0.26, style.getPropertyValue("color"));
  bar(live.sources.length ? live.spoken : 0, canvas.height * 0.74, "#3b82c4");
  live.level *= 0.9;
  requestAnimationFrame(draw);
}

function hold(down) {
  if (down === live.holding || handsfree() || !live.socket) return;
  live.holding = down;
  $("hold").classList.toggle("pressed", down);
  if (down) {
    interrupted();
    if (live.answering) send({ type: "response.cancel" });
    say("you speak");
  } else {
    send({ type: "input_audio_buffer.commit" });
    send({ type: "response.create" });
    say("thinking");
  }
}

// While a conversation runs, typed words and pictures join it instead of being asked apart.
async function joinLive(event) {
  if (!live.socket) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  const text = $("text").value.trim();
  const content = [
    ...added.filter((item) => item.kind === "image").map((item) => ({ type: "input_image", image_url: item.part.image_url.url })),
    ...(text ? [{ type: "input_text", text }] : []),
  ];
  if (added.some((item) => item.kind !== "image")) return sayError("While talking, only pictures and words can be added.");
  if (!content.length) return;
  turn("mine", ...added.map((item) => player(item.kind, item.show, item.name)), ...(text ? [paragraph(text)] : []));
  $("text").value = "";
  added = [];
  showFiles();
  live.endOfTurn = performance.now();
  send({ type: "conversation.item.create", item: { type: "message", role: "user", content } });
  send({ type: "response.create" });
}

$("talk").addEventListener("click", () => (live.socket || live.stream ? stop() : start()));
$("camera").addEventListener("change", () => { if (live.socket) ($("camera").checked ? openCamera() : closeCamera()); });
$("handsfree").addEventListener("change", () => {
  $("hold").hidden = handsfree() || !live.socket;
  send({ type: "session.update", session: settings() });
});
$("hold").addEventListener("pointerdown", (event) => { $("hold").setPointerCapture(event.pointerId); hold(true); });
for (const end of ["pointerup", "pointercancel"]) $("hold").addEventListener(end, () => hold(false));
document.addEventListener("keydown", (event) => { if (event.code === "Space" && event.target === document.body && !event.repeat) { event.preventDefault(); hold(true); } });
document.addEventListener("keyup", (event) => { if (event.code === "Space") hold(false); });
$("ask").addEventListener("submit", joinLive, { capture: true });
