/** Two settings on one seed, or a whole sweep, beside each other: with their difference, in pictures and numbers. */
import { computed, signal, useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { encodeGrey } from "../lib/png.ts";
import { toBase64 } from "../lib/bytes.ts";
import type { View } from "../lib/view.ts";
import { BlobImage, Empty, Go, NumberBox, percent, Segmented } from "../parts/controls.tsx";
import { addWord } from "../parts/layers.tsx";
import { Stage } from "../parts/stage.tsx";
import { compare, difference, type Numbers } from "../state/api.ts";
import { acting, doc, nameOf, type Doc, type Layer } from "../state/doc.ts";
import { Lane, server, type Picture } from "../state/live.ts";
import { route, setQuery } from "../state/router.ts";
import type { Made } from "../state/store.ts";
import { examples, model, restore, say, size } from "../state/studio.ts";
import { plain, runOf, type Run } from "../state/wire.ts";

/** What the state on the easel is compared with; null: its own plain picture. */
export const compareA = signal<Made | null>(null);
const compareLane = new Lane("compare");
const sweepLane = new Lane("sweep");
const view = signal<View | null>(null);
const pair = signal<{ a: Picture; b: Picture } | null>(null);

const runA = computed<Run>(() => compareA.value?.run ?? plain(doc.value));
const runB = computed<Run>(() => runOf(doc.value, acting.value));

type Mode = "slider" | "side" | "blink" | "difference";
const MODES: readonly (readonly [Mode, string])[] = [["slider", "Slider"], ["side", "Side by side"], ["blink", "Blink"], ["difference", "Difference"]];
const WHATS = [["pair", "Two settings"], ["seeds", "Several seeds"], ["strength", "Strength × steps"], ["features", "Layer × strength"]] as const;
type What = (typeof WHATS)[number][0];

export function Compare() {
  const what = (route.value.query.what ?? "pair") as What;
  if (!doc.value.layers.length && !compareA.value) {
    return (
      <Empty icon="compare" title="Nothing to compare yet">
        <p>A layer makes the difference. Begin with one of these:</p>
        <div class="chips">{examples.value.words.map((word) => <button type="button" class="chip" onClick={() => void addWord(word)}>{word}</button>)}</div>
      </Empty>
    );
  }
  return (
    <div class="compare-grid">
      <div class="bar">
        <Segmented<What> label="Compare" value={what} options={WHATS} onChange={(next) => setQuery({ what: next === "pair" ? "" : next }, "push")} />
        {compareA.value && <button type="button" class="small" onClick={() => (compareA.value = null)}>Compare with the plain picture again</button>}
      </div>
      {what === "pair" ? <Pair /> : <Sweep what={what} key={what} />}
    </div>
  );
}

function Pair() {
  const mode = (route.value.query.mode ?? "slider") as Mode;
  const gain = Number(route.value.query.gain ?? 2);
  const numbers = useSignal<Numbers | null>(null);
  const diff = useSignal<ImageBitmap | null>(null);
  const split = useSignal(0.5);
  const blink = useSignal(false);
  const key = JSON.stringify([runA.value, runB.value]);
  useEffect(() => {
    if (server.value.state !== "ready") return;
    const found: Picture[] = [];
    compareLane.run([runA.value, runB.value], {
      picture: (picture) => {
        found[picture.index] = picture;
        if (found[0] && found[1]) pair.value = { a: found[0], b: found[1] };
      },
      error: (error) => say(error.violations[0] ? `${error.violations[0].field} ${error.violations[0].description}` : error.message),
    });
    const mask = unionOf(acting.value);
    compare(runA.value, runB.value, mask).then((told) => (numbers.value = told)).catch((error: Error) => say(error.message));
  }, [key, server.value.state]);
  useEffect(() => {
    if (mode !== "difference" || server.value.state !== "ready") return;
    difference(runA.value, runB.value, gain).then(createImageBitmap).then((bitmap) => (diff.value = bitmap)).catch(() => undefined);
  }, [key, mode, gain, server.value.state]);
  useEffect(() => {
    if (mode !== "blink") return undefined;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const timer = setInterval(() => (blink.value = !blink.value), still ? 2000 : 700);
    return () => clearInterval(timer);
  }, [mode]);
  const [a, b] = [pair.value?.a.bitmap ?? null, pair.value?.b.bitmap ?? null];
  const nameA = compareA.value ? "From history" : "Plain";
  const warnings = differencesOf(runA.value, runB.value);
  return (
    <>
      <div class="bar">
        <Segmented<Mode> label="Look" value={mode} options={MODES} onChange={(next) => setQuery({ mode: next === "slider" ? "" : next })} />
        {mode === "difference" && <Segmented label="Times" value={gain} options={[[1, "×1"], [2, "×2"], [4, "×4"], [8, "×8"]]} onChange={(next) => setQuery({ gain: String(next) })} />}
      </div>
      {warnings.length > 0 && <div class="banner refused" role="alert"><p>Not of one kind: {warnings.join(", ")}. What differs may come of that.</p></div>}
      <div class={`pair ${mode}`}>
        {mode === "side" ? (
          <>
            <figure class="canvas"><figcaption>{nameA}</figcaption><Stage picture={a} size={size.value} view={view} label={nameA} /></figure>
            <figure class="canvas"><figcaption>Steered</figcaption><Stage picture={b} size={size.value} view={view} label="Steered" /></figure>
          </>
        ) : (
          <figure class="canvas">
            <figcaption>{mode === "slider" ? <><span>{nameA}</span><span class="spread" /><span>Steered</span></> : mode === "blink" ? (blink.value ? "Steered" : nameA) : `Difference ×${gain}`}</figcaption>
            <Stage
              picture={mode === "difference" ? diff.value : mode === "blink" ? (blink.value ? b : a) : b}
              size={size.value}
              view={view}
              cursor={mode === "slider" ? "ew-resize" : "grab"}
              label={mode === "slider" ? "Both pictures; arrows move the line between them" : "Picture"}
              depends={[split.value, a, mode]}
              draw={(context, place, ratio) => {
                if (mode !== "slider" || !a) return;
                const { width, height } = size.value;
                const [from, to] = [place({ x: 0, y: 0 }), place({ x: width, y: height })];
                const x = place({ x: width * split.value, y: 0 }).x;
                context.save();
                context.beginPath();
                context.rect(from.x, from.y, x - from.x, to.y - from.y);
                context.clip();
                context.imageSmoothingEnabled = true;
                context.imageSmoothingQuality = "high";
                context.drawImage(a, from.x, from.y, to.x - from.x, to.y - from.y);
                context.restore();
                context.fillStyle = "#fff";
                context.shadowColor = "#000a";
                context.shadowBlur = 6 * ratio;
                context.fillRect(x - ratio, from.y, 2 * ratio, to.y - from.y);
                context.beginPath();
                context.arc(x, (from.y + to.y) / 2, 11 * ratio, 0, 2 * Math.PI);
                context.fill();
                context.shadowBlur = 0;
              }}
              onDown={({ at }) => {
                if (mode !== "slider") return false;
                split.value = Math.min(1, Math.max(0, at.x / size.value.width));
                return true;
              }}
              onMove={({ at, event }) => {
                if (mode === "slider" && event.buttons) split.value = Math.min(1, Math.max(0, at.x / size.value.width));
              }}
              onKeyDown={(event) => {
                const by = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1 }[event.key];
                if (mode !== "slider" || !by) return;
                event.preventDefault();
                split.value = Math.min(1, Math.max(0, split.value + by));
              }}
            />
          </figure>
        )}
        <aside class="numbers" aria-label="Numbers">
          <h2>How far apart</h2>
          {numbers.value ? (
            <dl class="facts">
              {numbers.value.equal && <div class="equal"><dt>Equal</dt><dd>every pixel</dd></div>}
              <div><dt>mean change</dt><dd>{numbers.value.mean.toFixed(2)} <small>of 255</small></dd></div>
              <div><dt>largest</dt><dd>{numbers.value.max.toFixed(0)}</dd></div>
              <div><dt>pixels changed</dt><dd>{percent(numbers.value.changed)}</dd></div>
              {numbers.value.psnr !== null && <div><dt>PSNR</dt><dd>{numbers.value.psnr.toFixed(1)} <small>dB</small></dd></div>}
              {numbers.value.inside != null && <div><dt>inside the masks</dt><dd>{numbers.value.inside.toFixed(2)}</dd></div>}
              {numbers.value.outside != null && <div><dt>outside of them</dt><dd>{numbers.value.outside.toFixed(2)}</dd></div>}
            </dl>
          ) : <div class="row loading" />}
          <h2>What differs</h2>
          <ul class="list" data-differs>
            {acting.value.map((layer) => <li><i class="dot" /> {nameOf(layer)}: {layer.kind} {layer.amount}{layer.kind === "scale" ? "×" : ` ${layer.unit}`}{layer.mask ? ", painted" : ""}{layer.steps ? `, steps ${layer.steps[0] + 1} to ${layer.steps[1]}` : ""}</li>)}
            {!acting.value.length && <li>nothing acts</li>}
          </ul>
        </aside>
      </div>
    </>
  );
}

/** The places that any acting layer is painted on; none where one acts everywhere. */
function unionOf(layers: readonly Layer[]): string | undefined {
  if (!layers.length || layers.some((layer) => !layer.mask)) return undefined;
  const { width, height } = layers[0]!.mask!;
  const union = new Uint8Array(width * height);
  for (const layer of layers) layer.mask!.data.forEach((value, at) => value > union[at]! && (union[at] = value));
  return toBase64(encodeGrey(union, width, height));
}

function differencesOf(a: Run, b: Run): string[] {
  const said: string[] = [];
  if (String(a.seed) !== String(b.seed)) said.push(`seed ${a.seed} and ${b.seed}`);
  if (a.steps !== b.steps) said.push(`${a.steps} and ${b.steps} steps`);
  if (a.prompt !== b.prompt) said.push("two prompts");
  return said;
}

interface Cell {
  doc: Doc;
  run: Run;
}

/** Layers with the first one's strength, or every one's, at some value. */
function withAmount(of: Doc, id: string, amount: number): Doc {
  return { ...of, layers: of.layers.map((layer) => (layer.id === id ? { ...layer, amount } : layer)) };
}

const AMOUNTS = [-4, -2, 0, 2, 4, 8];

function Sweep({ what }: { what: Exclude<What, "pair"> }) {
  const query = route.value.query;
  const count = Math.min(8, Math.max(2, Number(query.seeds ?? 4)));
  const pictures = useSignal<(Picture | undefined)[]>([]);
  const done = useSignal(0);
  const layers = doc.value.layers.filter((layer) => layer.on);
  const swept = layers.find((layer) => layer.id === query.layer) ?? layers.at(-1);
  const most = model.value?.limits?.maxSteps ?? 4;
  const first = BigInt(doc.value.seed);

  const cellOf = (of: Doc, acts = of.layers.filter((layer) => layer.on)): Cell => ({ doc: of, run: runOf(of, acts) });
  let columns: string[] = [];
  let rows: [string, Cell[]][] = [];
  if (what === "seeds") {
    const seeds = [...Array(count).keys()].map((at) => String(first + BigInt(at)));
    columns = seeds.map((seed) => `seed ${seed}`);
    rows = [
      ["plain", seeds.map((seed) => cellOf({ ...doc.value, seed, layers: [] }))],
      ["steered", seeds.map((seed) => cellOf({ ...doc.value, seed }))],
    ];
  } else if (what === "strength" && swept) {
    columns = AMOUNTS.map((amount) => (amount > 0 ? `+${amount}` : `${amount}`));
    rows = [...Array(most).keys()].map((at) => [`${at + 1} step${at ? "s" : ""}`, AMOUNTS.map((amount) => cellOf({ ...withAmount(doc.value, swept.id, amount), steps: at + 1 }))]);
  } else if (what === "features") {
    columns = AMOUNTS.map((amount) => (amount > 0 ? `+${amount}` : `${amount}`));
    rows = layers.map((layer) => [nameOf(layer), AMOUNTS.map((amount) => cellOf({ ...doc.value, layers: [{ ...layer, amount }] }))]);
  }
  const cells = rows.flatMap(([, own]) => own);
  const key = JSON.stringify(cells.map((cell) => cell.run));
  useEffect(() => {
    pictures.value = [];
    done.value = 0;
    if (!cells.length || server.value.state !== "ready") return undefined;
    sweepLane.run(cells.map((cell) => cell.run), {
      picture: (picture) => {
        const next = [...pictures.value];
        next[picture.index] = picture;
        pictures.value = next;
        done.value++;
      },
      error: (error) => say(error.violations[0] ? `${error.violations[0].field} ${error.violations[0].description}` : error.message),
    });
    return () => sweepLane.cancel();
  }, [key, server.value.state]);
  let at = 0;
  return (
    <div class="sweep">
      <div class="bar">
        {what === "seeds" && <label class="field"><span>Seeds</span><NumberBox label="Number of seeds" value={count} least={2} most={8} onChange={(next) => setQuery({ seeds: String(Math.round(next)) })} /></label>}
        {what === "strength" && layers.length > 1 && (
          <label class="field"><span>Layer</span>
            <select value={swept?.id} onChange={(event) => setQuery({ layer: event.currentTarget.value })}>{layers.map((layer) => <option value={layer.id}>{nameOf(layer)}</option>)}</select>
          </label>
        )}
        <progress max={cells.length} value={done.value} aria-label="Pictures drawn" />
        <span class="quiet">{done.value} of {cells.length}</span>
        {sweepLane.busy.value && <button type="button" class="small" onClick={() => sweepLane.cancel()}>Stop</button>}
        <span class="spread" />
        <button type="button" class="small" disabled={done.value < cells.length} onClick={() => void contactSheet(columns, rows.map(([name]) => name), pictures.value)}>Save the sheet</button>
      </div>
      {!cells.length && <Empty icon="compare" title="No layer is on"><Go to={{ screen: "paint" }} class="button primary">To the layers</Go></Empty>}
      <div class="sheet-scroll" tabIndex={0} role="region" aria-label="Pictures">
        <table class="sheet">
          <thead><tr><th />{columns.map((name) => <th scope="col">{name}</th>)}</tr></thead>
          <tbody>
            {rows.map(([name, own]) => (
              <tr>
                <th scope="row">{name}</th>
                {own.map((cell, column) => {
                  const picture = pictures.value[at++];
                  return (
                    <td>
                      <button type="button" onClick={() => restore(cell.doc)} aria-label={`Go on from ${name}, ${columns[column]}`}>
                        {picture ? <BlobImage blob={picture.png} alt={`${name}, ${columns[column]}`} /> : <span class="loading" />}
                      </button>
                    </td>
                  );
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </div>
  );
}

/** The sweep as one labelled picture. */
async function contactSheet(columns: string[], rows: string[], pictures: (Picture | undefined)[]): Promise<void> {
  const [tile, gap, left, top] = [Math.min(256, Math.max(160, size.value.width)), 8, 150, 34];
  const sheet = new OffscreenCanvas(left + columns.length * (tile + gap), top + rows.length * (tile + gap));
  const context = sheet.getContext("2d")!;
  context.fillStyle = "#fff";
  context.fillRect(0, 0, sheet.width, sheet.height);
  context.fillStyle = "#1b1f24";
  context.font = "14px system-ui, sans-serif";
  columns.forEach((name, at) => context.fillText(name, left + at * (tile + gap), 22));
  rows.forEach((name, row) => {
    context.fillText(name, gap, top + row * (tile + gap) + tile / 2, left - 2 * gap);
    columns.forEach((_, column) => {
      const picture = pictures[row * columns.length + column];
      if (picture) context.drawImage(picture.bitmap, left + column * (tile + gap), top + row * (tile + gap), tile, tile);
    });
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await sheet.convertToBlob());
  link.download = "sheet.png";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
