/** The frame around every screen: where one is, what is being made, and how the server is. */
import { signal } from "@preact/signals";
import { useEffect, useRef, useState } from "preact/hooks";
import { BlobImage, Go, IconButton } from "./parts/controls.tsx";
import { Icon, type IconName } from "./parts/icons.tsx";
import { Compare } from "./screens/compare.tsx";
import { Explore } from "./screens/explore.tsx";
import { FeaturePage } from "./screens/feature.tsx";
import { Features } from "./screens/features.tsx";
import { History } from "./screens/history.tsx";
import { Keys, keysOn, setKeysOn } from "./screens/keys.tsx";
import { Paint } from "./screens/paint.tsx";
import { openFile } from "./state/api.ts";
import { doc } from "./state/doc.ts";
import { server } from "./state/live.ts";
import { route, type Screen } from "./state/router.ts";
import {
  base, baseLane, busy, cancelRuns, examples, latency, layerAt, model, paintLane, preview, refusal, restore, say, setSettings, size, toasts,
} from "./state/studio.ts";
import { docOf } from "./state/wire.ts";
import { activeId, nameOf } from "./state/doc.ts";

const PLACES: readonly [Screen, IconName, string][] = [
  ["explore", "explore", "Explore"],
  ["features", "features", "Features"],
  ["paint", "paint", "Paint"],
  ["compare", "compare", "Compare"],
  ["history", "history", "History"],
];

type Theme = "auto" | "light" | "dark";
const theme = signal<Theme>("auto");

function setTheme(next: Theme): void {
  theme.value = next;
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("theme", next);
  } catch {
    // Where nothing is kept, the choice holds for this page.
  }
}
try {
  setTheme((localStorage.getItem("theme") as Theme | null) ?? "auto");
} catch {
  setTheme("auto");
}

export const keysOpen = signal(false);

function Rail() {
  const here = route.value.screen === "feature" ? "features" : route.value.screen;
  return (
    <nav class="rail" aria-label="Screens">
      <Go to={{ screen: "explore" }} class="brand" label="TurboLens studio">
        <img src="static/icon.svg" alt="" width={30} height={30} />
      </Go>
      {PLACES.map(([screen, icon, name]) => (
        <Go to={{ screen }} current={here === screen}>
          <Icon name={icon} size={21} />
          <span>{name}</span>
          {screen === "paint" && doc.value.layers.length > 0 && <em aria-label={`${doc.value.layers.length} layers`}>{doc.value.layers.length}</em>}
        </Go>
      ))}
      <div class="rail-end">
        <IconButton icon={({ auto: "auto", light: "sun", dark: "moon" } as const)[theme.value]} label={`Colors: ${theme.value}`}
          onClick={() => setTheme(({ auto: "light", light: "dark", dark: "auto" } as const)[theme.value])} />
        <IconButton icon="help" label="Keys and help" keys="?" onClick={() => (keysOpen.value = true)} />
      </div>
    </nav>
  );
}

const MAX_SEED = 2n ** 63n - 1n;

function PromptBar() {
  const [text, setText] = useState(doc.value.prompt);
  const [seed, setSeed] = useState(doc.value.seed);
  useEffect(() => setText(doc.value.prompt), [doc.value.prompt]);
  useEffect(() => setSeed(doc.value.seed), [doc.value.seed]);
  const wrong = (name: string) => refusal.value?.violations.find((one) => new RegExp(`(^|\\.)${name}`).test(one.field))?.description;
  const most = model.value?.limits?.maxSteps ?? 4;
  const takeSeed = (given: string) => {
    if (/^\d{1,19}$/.test(given) && BigInt(given) <= MAX_SEED) setSettings({ seed: BigInt(given).toString() });
    else setSeed(doc.value.seed);
  };
  return (
    <form
      class="prompt-bar"
      onSubmit={(event) => {
        event.preventDefault();
        setSettings({ prompt: text });
      }}
    >
      <Go to={{ screen: "explore" }} class="at-hand" label="The picture at hand: explore it">
        {base.value ? <BlobImage blob={base.value.png} alt="" /> : <span class="loading" />}
      </Go>
      <label class="prompt">
        <span class="hidden">Prompt</span>
        <input name="prompt" value={text} placeholder="What to draw" list="prompts" autocomplete="off" enterkeyhint="go"
          aria-invalid={Boolean(wrong("prompt"))} onInput={(event) => setText(event.currentTarget.value)}
          onBlur={() => setSettings({ prompt: text })} />
      </label>
      <datalist id="prompts">{examples.value.prompts.map((one) => <option value={one} />)}</datalist>
      <label class="field seed">
        <span>Seed</span>
        <input inputMode="numeric" value={seed} size={Math.min(12, Math.max(3, seed.length))} aria-invalid={Boolean(wrong("seed"))}
          onInput={(event) => setSeed(event.currentTarget.value.trim())} onBlur={() => takeSeed(seed)}
          onKeyDown={(event) => event.key === "Enter" && takeSeed(seed)} />
        <IconButton icon="dice" label="Another seed" onClick={() => setSettings({ seed: String(Math.floor(Math.random() * 10000)) })} />
      </label>
      <label class="field steps">
        <span>Steps</span>
        <select value={doc.value.steps} onChange={(event) => setSettings({ steps: Number(event.currentTarget.value) })}>
          {[...Array(most).keys()].map((at) => <option value={at + 1}>{at + 1}</option>)}
        </select>
      </label>
      {busy.value ? (
        <button type="button" class="go" onClick={cancelRuns} title="Stop (Esc)"><Icon name="stop" /><span>Stop</span></button>
      ) : (
        <button type="submit" class="go"><Icon name="play" /><span>Draw</span></button>
      )}
    </form>
  );
}

function Status() {
  const now = server.value;
  const served = model.value;
  const waits = Math.max(baseLane.position.value, paintLane.position.value);
  const running = preview.value && `step ${preview.value.step + 1} of ${preview.value.steps}`;
  const says = now.state !== "ready" ? "no server" : waits > 0 ? `${waits} ahead` : busy.value ? running || "drawing" : "ready";
  const times = latency.value;
  return (
    <div class={`status ${now.state} ${busy.value ? "busy" : ""}`} role="status" aria-label="Server">
      <i />
      <span>{says}</span>
      {times && now.state === "ready" && (
        <span class="quiet" title={`of it ${times.server.toFixed(0)} ms the server's, ${(times.studio - times.server).toFixed(0)} ms the studio's`}>
          {times.all.toFixed(0)} ms
        </span>
      )}
      {served && <span class="quiet wide">{served.name} · {served.device} · {served.backend}</span>}
    </div>
  );
}

function Banner() {
  const now = server.value;
  const error = refusal.value;
  if (now.state === "lost" || now.state === "no-studio" || (now.state === "connecting" && now.detail)) {
    return (
      <div class="banner lost" role="alert">
        <Icon name="target" />
        <p>
          <b>{now.state === "no-studio" ? "The studio's program does not answer." : now.state === "lost" ? "The server is gone." : "There is no server yet."}</b>{" "}
          {now.state === "no-studio" ? "Start `turbolens studio` again." : `Looking for one at ${now.target}.`} Your work is kept, and this
          page goes on by itself once it is back.
        </p>
      </div>
    );
  }
  if (!error) return null;
  return (
    <div class="banner refused" role="alert">
      <Icon name="help" />
      <div>
        <b>{error.violations.length ? "This cannot be drawn:" : error.message}</b>
        {error.violations.map((one) => {
          const layer = layerAt(one.field);
          return (
            <p>
              {layer ? (
                <button type="button" class="text" onClick={() => (activeId.value = layer.id)}>{nameOf(layer)}</button>
              ) : null}{" "}
              <code>{one.field.replace(/^(request|run)\./, "")}</code> {one.description}
            </p>
          );
        })}
        {error.retryAfter ? <p>Come back in {Math.ceil(error.retryAfter)} s.</p> : null}
      </div>
      <IconButton icon="close" label="Dismiss" onClick={() => (refusal.value = null)} />
    </div>
  );
}

function Toasts() {
  return (
    <div class="toasts" role="status" aria-live="polite">
      {toasts.value.map((toast) => (
        <div class="toast" key={toast.id}>
          <span>{toast.text}</span>
          {toast.action && <button type="button" class="text" onClick={toast.action.act}>{toast.action.label}</button>}
        </div>
      ))}
    </div>
  );
}

/** A file dropped anywhere is opened: a picture or a zip that the studio saved, or a steering file. */
export async function openDropped(file: File): Promise<void> {
  try {
    const { seed, ...rest } = await openFile(file);
    restore(await docOf({ ...rest, seed: String(seed) }, size.value));
    say(`${file.name} is on the screen as it was made.`);
  } catch (error) {
    say(`${file.name}: ${error instanceof Error ? error.message : "cannot be opened"}`);
  }
}

function useDrop(): boolean {
  const [over, setOver] = useState(false);
  useEffect(() => {
    const hasFiles = (event: DragEvent) => event.dataTransfer?.types.includes("Files") ?? false;
    const enter = (event: DragEvent) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      setOver(true);
    };
    const leave = (event: DragEvent) => event.relatedTarget === null && setOver(false);
    const drop = (event: DragEvent) => {
      setOver(false);
      const file = event.dataTransfer?.files[0];
      if (!file) return;
      event.preventDefault();
      void openDropped(file);
    };
    addEventListener("dragover", enter);
    addEventListener("dragleave", leave);
    addEventListener("drop", drop);
    return () => {
      removeEventListener("dragover", enter);
      removeEventListener("dragleave", leave);
      removeEventListener("drop", drop);
    };
  }, []);
  return over;
}

const SCREENS = { explore: Explore, features: Features, feature: FeaturePage, paint: Paint, compare: Compare, history: History };

export function App() {
  const main = useRef<HTMLElement>(null);
  const over = useDrop();
  const Shown = SCREENS[route.value.screen];
  const title = PLACES.find(([screen]) => screen === route.value.screen)?.[2] ?? "Feature";
  useEffect(() => {
    document.title = `${title} · TurboLens studio`;
  }, [title]);
  useEffect(() => {
    const key = (event: KeyboardEvent) => {
      if (!keysOn.value || (event.target as HTMLElement).matches?.("input:not([type=range]), textarea, select")) return;
      if (event.key === "?") keysOpen.value = true;
      if (event.key === "Escape" && busy.value) cancelRuns();
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  }, []);
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => { event.preventDefault(); main.current?.focus(); }}>To the screen</a>
      <Rail />
      <header class="top">
        <PromptBar />
        <Status />
      </header>
      <main id="main" ref={main} tabIndex={-1} class={`screen ${route.value.screen}`}>
        <Banner />
        <h1 class="hidden">{title}</h1>
        <Shown key={`${route.value.screen}/${route.value.sae}/${route.value.index}`} />
      </main>
      <Toasts />
      <Keys open={keysOpen.value} onClose={() => (keysOpen.value = false)} on={keysOn.value} setOn={setKeysOn} />
      {over && <div class="drop" aria-hidden="true"><p>Drop a picture that the studio saved, a zip or a steering file</p></div>}
    </>
  );
}
