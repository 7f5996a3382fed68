/** The studio as a whole: what is served, what is on the screen, and what follows from a change. */
import { batch, computed, effect, signal, untracked } from "@preact/signals";
import type { ModelJson } from "../contract.ts";
import type { Bytes, Size } from "../lib/raster.ts";
import { ApiError, getModel, type Brief, type Refusal } from "./api.ts";
import {
  acting, activeId, addLayer, change, commits, doc, load, makeMask, nameOf, noEffect, type Doc, type Layer, type Term,
} from "./doc.ts";
import { MOST_FRAGMENT, packLayers, packSettings, unpackLayers } from "./link.ts";
import { connect, Lane, server, type Picture } from "./live.ts";
import { go, parse, route } from "./router.ts";
import { keep, readMade, readWork, saveWork } from "./store.ts";
import { plain, runOf } from "./wire.ts";

export const model = signal<ModelJson | null>(null);
export const size = computed<Size>(() => ({
  width: model.value?.defaults?.width ?? 512, height: model.value?.defaults?.height ?? 512,
}));
export const blocks = computed(() => (model.value?.hookPoints ?? []).filter((point) =>
  model.value?.saes?.some((sae) => sae.hookPoint === point.name)));
export const saeNames = computed(() => (model.value?.saes ?? []).map((sae) => sae.name ?? ""));

export function gridOf(sae: string): Size {
  const point = model.value?.saes?.find((one) => one.name === sae)?.hookPoint;
  const found = model.value?.hookPoints?.find((one) => one.name === point) ?? model.value?.hookPoints?.[0];
  return { width: found?.width ?? 16, height: found?.height ?? 16 };
}

/** What each block is about, as the method's paper and our dose table have it; said only where it was measured. */
const ROLES: Record<string, string> = {
  "down.2.1": "what is where", "mid.0": "little by itself", "up.0.0": "color, shape, texture", "up.0.1": "background, style",
};
export const roleOf = (block: string) => ROLES[block] ?? "";

const MINI = {
  prompts: [
    "a big red circle left of a big red square, sky background",
    "a big blue star, night background, neon style",
    "a small striped green ring above a big yellow heart, sunset background",
  ],
  words: ["purple", "star", "neon", "sunset", "small"],
};
const ANY = {
  prompts: [
    "a photograph of a red fox in a snowy forest",
    "a bowl of oranges on a wooden table, morning light",
    "a small house by the sea, oil painting",
  ],
  words: ["fire", "snow", "fur", "neon", "flowers"],
};
export const examples = computed(() => (model.value?.name?.includes("mini") ? MINI : ANY));

// --- pictures -------------------------------------------------------------------------------------------------------

export const base = signal<Picture | null>(null);
export const result = signal<Picture | null>(null);
export const preview = signal<{ bitmap: ImageBitmap; step: number; steps: number } | null>(null);
export const refusal = signal<Refusal | null>(null);
/** Set while a stroke is being painted: the layer's mask as it is so far. */
export const wet = signal<{ id: string; data: Bytes } | null>(null);
export type Live = "while" | "after" | "off";
export const live = signal<Live>("while");
export const latency = signal<{ all: number; server: number; studio: number } | null>(null);

export const baseLane = new Lane("base");
export const paintLane = new Lane("paint");
export const busy = computed(() => baseLane.busy.value || paintLane.busy.value);

const settingsKey = (of: Doc) => `${of.prompt}\n${of.seed}\n${of.steps}`;
/** Settings that `base` shows. */
export const baseKey = signal("");
/** Whether the result is of the document as it is now. */
export const settled = signal(true);
let ready = false;

function failed(error: Refusal): void {
  refusal.value = error;
}

/** Make the plain picture, with its features. */
function makeBase(of: Doc): void {
  baseLane.run([{ ...plain(of), features: true, previews: of.steps > 1 }], {
    step: (step, steps, bitmap) => bitmap && (preview.value = { bitmap, step, steps }),
    picture: (picture) => {
      batch(() => {
        base.value = picture;
        baseKey.value = settingsKey(of);
        preview.value = null;
        refusal.value = null;
        latency.value = picture.times;
      });
      void keep(picture, { ...of, layers: [] }, [], result.value?.key ?? "");
    },
    error: (error) => {
      preview.value = null;
      failed(error);
    },
  });
}

let lastBegan = 0;
let lastTook = 100;
/** Whether the last picture asked for is of a moment of a stroke: nobody waits for it once the stroke is done. */
let drewMidway = false;
let timer = 0;

/** Layers as they look now, the stroke that is being painted included. */
function actingNow(): Layer[] {
  const stroke = wet.value;
  return acting.value.map((layer) =>
    stroke && layer.id === stroke.id ? { ...layer, mask: makeMask(stroke.data, size.value) } : layer);
}

/** Make the steered picture; `done` is told when the document as it is now was shown. */
export function makeResult(): void {
  const [of, layers] = [doc.value, actingNow()];
  const run = runOf(of, layers);
  const drawing = wet.value !== null;
  if (!run.edits.length) {
    paintLane.cancel();
    result.value = null; // the plain picture is the result
    settled.value = true;
    return;
  }
  lastBegan = performance.now();
  const began = lastBegan;
  const features = route.value.screen === "explore";
  paintLane.run([{ ...run, ...(features ? { features: true } : {}) }], {
    picture: (picture) => {
      lastTook = picture.cached ? lastTook : performance.now() - began;
      batch(() => {
        result.value = picture;
        refusal.value = null;
        latency.value = picture.times;
        if (doc.value === of && !wet.value) settled.value = true;
      });
      if (settled.value && !drawing) measureStroke(picture.times);
      if (!drawing) void keep(picture, of, layers, base.value?.key ?? "");
    },
    error: failed,
  }, drewMidway && !drawing);
  drewMidway = drawing;
}

/** Tell the browser's own timeline how long the picture after a stroke took, once it is on the screen. */
function measureStroke(times: Picture["times"]): void {
  requestAnimationFrame(() => {
    // Looked for here: of two pictures within one frame the first has taken the mark.
    if (!performance.getEntriesByName("stroke-end").length) return;
    performance.measure("stroke to picture", { start: "stroke-end", detail: times });
    performance.clearMarks("stroke-end");
  });
}

/** While something is dragged, a picture is asked for at most every second picture's time: the last one must not wait. */
function soon(): void {
  if (timer || live.value !== "while" || document.hidden) return;
  const pause = Math.max(30, lastBegan + 2 * lastTook - performance.now());
  timer = window.setTimeout(() => {
    timer = 0;
    if (paintLane.busy.value) soon();
    else makeResult();
  }, pause);
}

/** Make the document's pictures now, whatever "live" says. */
export function apply(): void {
  if (baseKey.value !== settingsKey(doc.value)) makeBase(doc.value);
  makeResult();
}

export function cancelRuns(): void {
  baseLane.cancel();
  paintLane.cancel();
}

const SHOWS_PICTURES = new Set(["explore", "paint", "compare", "feature"]);

function follow(): void {
  // The plain picture follows prompt, seed and steps.
  effect(() => {
    const of = doc.value;
    if (server.value.state !== "ready" || !model.value || !ready) return;
    untracked(() => {
      if (baseKey.value !== settingsKey(of) && baseAsked !== settingsKey(of)) {
        baseAsked = settingsKey(of);
        makeBase(of);
      }
    });
  });
  // The steered one follows the layers too.
  let seenCommit = -1;
  let seenActing: readonly Layer[] | null = null;
  let seenDoc: Doc | null = null;
  effect(() => {
    const [commit, layers, of, stroke] = [commits.value, acting.value, doc.value, wet.value];
    if (server.value.state !== "ready" || !model.value || !ready || !SHOWS_PICTURES.has(route.value.screen)) return;
    untracked(() => {
      const news = of !== seenDoc || layers !== seenActing || stroke !== null;
      if (news) settled.value = false;
      if (commit !== seenCommit || (layers !== seenActing && of === seenDoc)) {
        [seenCommit, seenActing, seenDoc] = [commit, layers, of];
        if (live.value !== "off" && !document.hidden) {
          clearTimeout(timer);
          timer = 0;
          makeResult();
        }
      } else if (news) {
        seenDoc = of;
        soon();
      }
    });
  });
  effect(() => {
    if (live.value === "off") clearTimeout(timer), (timer = 0);
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) clearTimeout(timer), (timer = 0);
    else if (!settled.value && live.value !== "off") makeResult();
  });
}
let baseAsked = "";

// --- addresses and what stays ---------------------------------------------------------------------------------------

const remembered = new Map<string, Doc>();
export const linkTooLong = signal(false);
let writing = 0;

async function writeAddress(how: "push" | "replace"): Promise<void> {
  const own = ++writing;
  const of = doc.value;
  const packed = await packLayers(of.layers);
  if (own !== writing) return;
  linkTooLong.value = packed.length > MOST_FRAGMENT;
  const id = `${Date.now()}-${own}`;
  remembered.set(id, of);
  if (remembered.size > 300) remembered.delete(remembered.keys().next().value!);
  go({ ...route.value, query: { ...route.value.query, ...packSettings(of) }, fragment: linkTooLong.value ? "" : packed }, how);
  history.replaceState({ id }, "");
}

/** The document of an address; null where the address has none. */
async function read(address: URL): Promise<Doc | null> {
  const { query, fragment } = parse(address);
  if (query.prompt === undefined && !fragment) return null;
  const layers = await unpackLayers(fragment, size.value).catch(() => {
    say("That link's layers cannot be read; it was cut off, or is of another version.");
    return [];
  });
  const seed = /^\d{1,19}$/.test(query.seed ?? "") ? query.seed! : "7";
  const steps = Math.max(1, Math.min(model.value?.limits?.maxSteps ?? 4, Number(query.steps ?? 1) || 1));
  return { prompt: query.prompt ?? "", seed, steps, layers };
}

const sameDoc = async (a: Doc, b: Doc) =>
  settingsKey(a) === settingsKey(b) && (await packLayers(a.layers)) === (await packLayers(b.layers));

async function begin(): Promise<void> {
  const first = (await read(new URL(location.href))) ?? (await readWork().catch(() => undefined)) ?? {
    prompt: examples.value.prompts[0]!, seed: "7", steps: model.value?.defaults?.steps ?? 1, layers: [],
  };
  load(first);
  activeId.value = first.layers.at(-1)?.id ?? "";
  ready = true;
  await writeAddress("replace");
  commits.value++;
  let seen = commits.value;
  effect(() => {
    const [commit, of] = [commits.value, doc.value];
    if (commit === seen) return;
    seen = commit;
    untracked(() => {
      void writeAddress("push");
      void saveWork(of).catch(() => undefined);
    });
  });
  addEventListener("popstate", (event: PopStateEvent) => {
    void (async () => {
      route.value = parse(new URL(location.href));
      const known = remembered.get((event.state as { id?: string } | null)?.id ?? "");
      const next = known ?? (await read(new URL(location.href)));
      if (next && !(await sameDoc(next, doc.value))) {
        load(next);
        if (live.value !== "off") makeResult();
      }
    })();
  });
}

async function readModel(): Promise<void> {
  model.value = await getModel();
}

export function start(): void {
  connect();
  void readMade().catch(() => say("This browser keeps nothing: its storage is off."));
  let generation = 0;
  effect(() => {
    const now = server.value;
    if (now.state !== "ready" || now.generation === generation) return;
    generation = now.generation;
    void untracked(async () => {
      try {
        await readModel();
      } catch (error) {
        if (error instanceof ApiError) say(error.message);
        generation = 0;
        return;
      }
      if (!ready) {
        await begin();
        follow();
      } else {
        // Another server may draw otherwise: what is on the screen is made again.
        baseAsked = "";
        baseKey.value = "";
        apply();
      }
    });
  });
}

// --- what people do -------------------------------------------------------------------------------------------------

export interface Toast {
  id: number;
  text: string;
  action?: { label: string; act: () => void };
}
export const toasts = signal<readonly Toast[]>([]);

export function say(text: string, action?: Toast["action"]): void {
  const toast: Toast = { id: Date.now() + Math.random(), text, ...(action ? { action } : {}) };
  toasts.value = [...toasts.value.filter((one) => one.text !== text), toast].slice(-3);
  setTimeout(() => (toasts.value = toasts.value.filter((one) => one.id !== toast.id)), 6000);
}

/** A strength to begin with: so that an average feature goes well past its own maximum. In the unit "mean". */
export function firstStrength(features: readonly Brief[]): number {
  const ratios = features.filter((one) => one.mean > 0).map((one) => one.max / one.mean);
  const usual = ratios.length ? ratios.reduce((a, b) => a + b, 0) / ratios.length : 2;
  return Math.round(Math.min(8, Math.max(3, 2 * usual)));
}

export const termOf = ({ sae, index, label }: Brief): Term => ({ sae, index, label });

/** Steer by features: a layer, the painting screen, and the picture that follows. */
export function steerBy(features: readonly Brief[], part: Partial<Layer> = {}): void {
  const unit = features.every((one) => one.mean > 0) ? "mean" : "raw";
  const layer = addLayer(features.map(termOf), { amount: firstStrength(features), unit, ...part });
  say(`${nameOf(layer)} is a layer now.`);
  go({ screen: "paint" });
}

export function setSettings(part: Partial<Pick<Doc, "prompt" | "seed" | "steps">>, during = ""): void {
  const next = { ...doc.value, ...part };
  if (settingsKey(next) === settingsKey(doc.value)) return;
  const steps = next.steps;
  // A window of steps that no longer fits is cut to what there is.
  const layers = next.layers.map((layer) =>
    layer.steps && layer.steps[1] > steps ? { ...layer, steps: layer.steps[0] >= steps ? null : ([layer.steps[0], steps] as const) } : layer);
  const name = part.prompt !== undefined ? "Change the prompt" : part.seed !== undefined ? "Change the seed" : "Change the steps";
  change(name, { ...next, layers }, during);
}

/** Put back what was made, as it was. */
export function restore(of: Doc): void {
  change("Restore", of);
  activeId.value = of.layers.at(-1)?.id ?? "";
  go({ screen: of.layers.length ? "paint" : "explore" });
}

/** The layers that a refused field is about. */
export function layerAt(field: string): Layer | undefined {
  const at = /edits\[(\d+)\]/.exec(field)?.[1];
  if (at === undefined) return undefined;
  return acting.value.filter((layer) => layer.features.length && !noEffect(layer))[Number(at)];
}
