// The page: a form that becomes one request, what runs, and the gallery.

import { get, newId, post, remove, ServerError } from "./api.js";
import * as gallery from "./gallery.js";
import { MaskedImage } from "./mask.js";

const $ = (id) => document.getElementById(id);
const masked = new MaskedImage($("canvas"));
const NUMBERS = ["steps", "cfg_scale", "width", "height", "batch_size"];
const KEPT = ["prompt", "negative_prompt", "sampler_name", "scheduler", "seed", "enable_hr", "hr_scale", "hr_strength",
  "hr_upscaler", "denoising_strength", "inpainting_fill", "mask_blur", "inpaint_full_res", ...NUMBERS];
let job = null; // {id, abort, isCancelled} while one runs
let shown = null; // the gallery's entry in the viewer

// What was typed survives a reload.

function keep() {
  const values = Object.fromEntries(KEPT.map((id) => [id, $(id).type === "checkbox" ? $(id).checked : $(id).value]));
  localStorage.setItem("fastsd-form", JSON.stringify(values));
}

function restore() {
  let values = {};
  try {
    values = JSON.parse(localStorage.getItem("fastsd-form") || "{}");
  } catch {
    localStorage.removeItem("fastsd-form");
  }
  for (const id of KEPT) if (id in values) set(id, values[id]);
}

function set(id, value) {
  if ($(id).type === "checkbox") $(id).checked = Boolean(value);
  else $(id).value = value ?? "";
}

function say(message) {
  $("error").textContent = message;
}

// Lists from the server.

async function fillLists() {
  const [samplers, schedulers, models, loras, upscalers, nets] = await Promise.all(
    ["samplers", "schedulers", "sd-models", "loras", "upscalers"].map((name) => get(`sdapi/v1/${name}`))
      .concat(get("controlnet/model_list")),
  );
  addOptions("sampler_name", samplers.map((one) => [one.name, one.name]));
  addOptions("scheduler", schedulers.filter((one) => one.name !== "automatic").map((one) => [one.label, one.label]));
  addOptions("lora", loras.map((one) => [one.name, one.name]));
  addOptions("hr_upscaler", upscalers.filter((one) => one.model_name).map((one) => [one.name, one.name]));
  addOptions("control_model", nets.model_list.map((name) => [name, name]));
  $("lora-row").hidden = !loras.length;
  $("control-part").hidden = !nets.model_list.length;
  const { sd_model_checkpoint: current } = await get("sdapi/v1/options");
  $("model").replaceChildren();
  addOptions("model", models.map((one) => [one.title, one.model_name]));
  $("model").value = current;
}

function addOptions(id, pairs) {
  for (const [value, text] of pairs) {
    const option = document.createElement("option");
    option.value = value;
    option.textContent = text;
    $(id).append(option);
  }
}

$("model").addEventListener("change", async () => {
  $("model").disabled = true;
  status(`Loading ${$("model").selectedOptions[0].textContent} …`);
  try {
    await post("sdapi/v1/options", { sd_model_checkpoint: $("model").value });
    say("");
  } catch (error) {
    report(error);
    const { sd_model_checkpoint: current } = await get("sdapi/v1/options").catch(() => ({}));
    $("model").value = current ?? $("model").value;
  } finally {
    $("model").disabled = false;
    if (!job) $("work").hidden = true;
  }
});

$("lora").addEventListener("change", () => {
  if (!$("lora").value) return;
  $("prompt").value = `${$("prompt").value.trimEnd()} <lora:${$("lora").value}:${$("lora-strength").value || 1}>`.trim();
  $("lora").value = "";
  keep();
});

// The request.

async function request(id) {
  const body = { prompt: $("prompt").value, negative_prompt: $("negative_prompt").value, force_task_id: id };
  for (const name of ["sampler_name", "scheduler"]) if ($(name).value) body[name] = $(name).value;
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  if ($("control_model").value && $("control_file").files[0]) {
    const unit = { model: $("control_model").value, module: $("control_module").value, resize_mode: 1 };
    unit.weight = Number($("control_weight").value);
    unit.image = await gallery.dataOf($("control_file").files[0]);
    body.alwayson_scripts = { ControlNet: { args: [unit] } };
  }
  if (!masked.data) {
    if ($("enable_hr").checked) {
      body.enable_hr = true;
      body.hr_scale = Number($("hr_scale").value);
      body.hr_upscaler = $("hr_upscaler").value;
      body.denoising_strength = Number($("hr_strength").value);
    }
    return ["sdapi/v1/txt2img", body];
  }
  body.init_images = [masked.data];
  body.denoising_strength = Number($("denoising_strength").value);
  if (masked.isMasked) {
    body.mask = masked.maskData();
    body.mask_blur = Number($("mask_blur").value);
    body.inpainting_fill = Number($("inpainting_fill").value);
    body.inpaint_full_res = $("inpaint_full_res").checked;
    if (body.inpaint_full_res) body.inpaint_full_res_padding = 32;
  }
  return ["sdapi/v1/img2img", body];
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (job) return;
  say("");
  $("notes").textContent = "";
  keep();
  const id = newId();
  const own = (job = { id, abort: new AbortController(), isCancelled: false });
  running(true);
  watch(own);
  try {
    const [path, body] = await request(id);
    const answer = await post(path, body, job.abort.signal);
    const info = JSON.parse(answer.info);
    for (const [k, image] of answer.images.entries()) {
      const entry = await gallery.add(gallery.blobOf(image), info.infotexts[k] || "");
      show(entry);
      if (!gallery.isKept(entry)) say("The browser has no room to keep this image. Download it: a reload loses it.");
    }
    $("notes").textContent = info.notes.join(" · ");
  } catch (error) {
    if (own.isCancelled) $("notes").textContent = "Cancelled.";
    else report(error);
  } finally {
    job = null;
    running(false);
  }
});

function report(error) {
  say(error instanceof ServerError ? error.message : `The page made a mistake: ${error.message}`);
}

function running(now) {
  $("generate").disabled = now;
  $("cancel").hidden = !now;
  $("work").hidden = !now;
  if (now) {
    $("preview").hidden = true;
    $("progress").removeAttribute("value");
    status("Waiting …");
  }
}

function status(text) {
  $("work").hidden = false;
  $("status").textContent = text;
}

// Follow a job: its place in the queue, then steps and previews.

async function watch(own) {
  let seen = 0;
  while (job === own) {
    await new Promise((done) => setTimeout(done, 250));
    if (job !== own) return;
    const state = await get(`jobs/${own.id}?preview=${seen}`).catch(() => null);
    if (!state || job !== own) continue;
    if (state.state === "waiting") status(state.loading ? `Loading ${state.loading} …` : `Waiting, place ${state.place} …`);
    if (state.state !== "running") continue;
    $("progress").value = state.progress;
    const left = state.seconds_left === null ? "" : `, ${Math.ceil(state.seconds_left)} s left`;
    status(`Step ${state.index} of ${state.total}${left}`);
    if (state.preview) {
      seen = state.previews;
      $("preview").src = `data:image/jpeg;base64,${state.preview}`;
      $("preview").hidden = false;
    }
  }
}

async function cancel() {
  if (!job) return;
  const own = job;
  own.isCancelled = true;
  await remove(`jobs/${own.id}`).catch(() => null);
  own.abort.abort();
}

$("cancel").addEventListener("click", cancel);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  if (event.key === "Escape" && !$("viewer").open) cancel();
});

// The image to start from.

async function openImage(blob, withSettings = true) {
  try {
    if (withSettings && blob.type === "image/png") await readSettings(blob);
    await masked.open(blob);
    $("image-box").hidden = false;
    $("image-part").open = true;
  } catch (error) {
    say(error instanceof ServerError ? error.message : "This file is not an image that the browser can show.");
  }
}

$("image-file").addEventListener("change", () => $("image-file").files[0] && openImage($("image-file").files[0]));
$("remove-image").addEventListener("click", () => {
  masked.remove();
  $("image-box").hidden = true;
  $("image-file").value = "";
  $("image-file").focus();
});
$("brush").addEventListener("input", () => (masked.brush = Number($("brush").value)));
$("clear-mask").addEventListener("click", () => masked.clear());
$("all-mask").addEventListener("click", () => masked.fill());
$("erase").addEventListener("click", () => {
  masked.erases = !masked.erases;
  $("erase").setAttribute("aria-pressed", masked.erases);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind !== "drop") return;
    const file = [...event.dataTransfer.files].find((one) => one.type.startsWith("image/"));
    if (file) openImage(file);
    else say("Drop an image: a PNG, JPEG or WebP file.");
  });
}

// Settings in an image.

async function readSettings(blob) {
  const found = await post("sdapi/v1/png-info", { image: await gallery.dataOf(blob) });
  if (found.info) useSettings(found.parameters);
}

const offers = (id, value) => [...$(id).options].some((option) => option.value === value);

// A sampler and a schedule as this server calls them; of those that it lacks the page says so. Older versions of A1111
// have the schedule at the end of the sampler's name.
function offered(sampler = "", schedule = "") {
  if (!offers("sampler_name", sampler)) {
    const names = [...$("scheduler").options].map((option) => option.value);
    const ending = names.find((name) => name && sampler.endsWith(` ${name}`));
    if (ending) [sampler, schedule] = [sampler.slice(0, -ending.length - 1), schedule || ending];
  }
  if (schedule === "Automatic") schedule = "";
  const lacks = [!offers("sampler_name", sampler) && sampler, !offers("scheduler", schedule) && schedule].filter(Boolean);
  if (lacks.length) say(`Its ${lacks.join(" and ")} cannot be chosen here; the model's own is.`);
  return [offers("sampler_name", sampler) ? sampler : "", offers("scheduler", schedule) ? schedule : ""];
}

function useSettings(pairs) {
  set("prompt", pairs["Prompt"]);
  set("negative_prompt", pairs["Negative prompt"]);
  const [width, height] = (pairs["Size"] || "x").split("x");
  const values = { steps: pairs["Steps"], cfg_scale: pairs["CFG scale"], seed: pairs["Seed"], width, height };
  [values.sampler_name, values.scheduler] = offered(pairs["Sampler"], pairs["Schedule type"]);
  for (const [id, value] of Object.entries(values)) set(id, value);
  set("enable_hr", "Hires upscale" in pairs);
  if ("Hires upscale" in pairs) {
    set("hr_scale", pairs["Hires upscale"]);
    set("hr_strength", pairs["Denoising strength"]);
    set("hr_upscaler", pairs["Hires upscaler"] || "Latent");
  } else if ("Denoising strength" in pairs) set("denoising_strength", pairs["Denoising strength"]);
  keep();
}

// The gallery and its viewer.

function show(entry) {
  const item = $("item").content.cloneNode(true).firstElementChild;
  const image = item.querySelector("img");
  image.src = URL.createObjectURL(entry.image);
  image.alt = entry.settings.split("\n")[0].slice(0, 200) || "An image without a prompt";
  item.dataset.id = entry.id;
  item.querySelector("button").addEventListener("click", () => view(entry, image.src));
  $("gallery").prepend(item);
  $("empty").hidden = true;
}

function view(entry, source) {
  shown = entry;
  $("viewer-image").src = source;
  $("viewer-image").alt = entry.settings.split("\n")[0].slice(0, 200);
  $("viewer-settings").textContent = entry.settings;
  $("download").href = source;
  $("download").download = `fastsd-${entry.id}.png`;
  $("viewer").showModal();
}

$("close").addEventListener("click", () => $("viewer").close());
$("use-settings").addEventListener("click", async () => {
  $("viewer").close();
  await readSettings(shown.image).catch(report);
  $("prompt").focus();
});
$("use-image").addEventListener("click", async () => {
  $("viewer").close();
  await openImage(shown.image, false);
  $("canvas").scrollIntoView({ block: "center" });
});
$("delete").addEventListener("click", async () => {
  await gallery.forget(shown.id);
  document.querySelector(`#gallery [data-id="${shown.id}"]`)?.remove();
  $("empty").hidden = Boolean($("gallery").children.length);
  $("viewer").close();
  $("gallery-title").focus();
});

// Light and dark.

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-pressed", theme === "dark");
}

$("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("fastsd-theme", theme);
  setTheme(theme);
});
const usual = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
setTheme(localStorage.getItem("fastsd-theme") || usual);

restoreAll();

async function restoreAll() {
  try {
    await fillLists();
  } catch (error) {
    report(error);
  }
  restore();
  for (const entry of await gallery.all()) show(entry);
  document.body.dataset.ready = "yes";
}
