/** All features: by words, by filters, or by a place in the picture at hand. */
import { signal, useComputed, useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { encodeGrey } from "../lib/png.ts";
import { toBase64 } from "../lib/bytes.ts";
import { box, type Point } from "../lib/raster.ts";
import type { View } from "../lib/view.ts";
import { Empty, Go, IconButton, Meter, percent, Segmented, short, Thumb } from "../parts/controls.tsx";
import { Icon } from "../parts/icons.tsx";
import { Stage } from "../parts/stage.tsx";
import { ApiError, contrast, getFeatures, type Brief, type Listing } from "../state/api.ts";
import { doc, wordsOf } from "../state/doc.ts";
import { server } from "../state/live.ts";
import { route, setQuery } from "../state/router.ts";
import { base, examples, roleOf, saeNames, say, size, steerBy } from "../state/studio.ts";
import { plain } from "../state/wire.ts";

const SORTS = [["best", "best labelled"], ["frequency", "most frequent"], ["rare", "rarest"], ["mean", "strongest"], ["index", "by number"]] as const;
const PAGE = 48;
const chosen = signal<readonly Brief[]>([]);

export function Features() {
  const query = route.value.query;
  const by = query.by === "place" ? "place" : "words";
  return (
    <div class="features-grid">
      <section class="finder" aria-label="Find features">
        <Segmented label="Find by" value={by} options={[["words", "By words"], ["place", "By a place in the picture"]]}
          onChange={(next) => setQuery({ by: next === "place" ? "place" : "" }, "push")} />
        {by === "words" ? <ByWords /> : <ByPlace />}
      </section>
      {chosen.value.length > 0 && <Chosen />}
    </div>
  );
}

function ByWords() {
  const query = route.value.query;
  const listing = useSignal<Listing | null>(null);
  const error = useSignal("");
  const loading = useSignal(false);
  const asked = useComputed(() => {
    const { q = "", block = "", attribute = "", least = "", most = "", score = "", sort = "" } = route.value.query;
    return JSON.stringify({ q, block, attribute, least, most, score, sort });
  });
  const load = async (start: number, signal: AbortSignal) => {
    loading.value = true;
    try {
      const wanted = Object.fromEntries(Object.entries(JSON.parse(asked.value) as Record<string, string>).filter(([, value]) => value));
      const page = await getFeatures({ ...wanted, start: String(start), count: String(PAGE) }, signal);
      listing.value = start && listing.value ? { ...page, features: [...listing.value.features, ...page.features] } : page;
      error.value = "";
    } catch (problem) {
      if (problem instanceof ApiError) error.value = problem.refusal.violations.map((one) => `${one.field} ${one.description}`).join("; ") || problem.message;
    } finally {
      loading.value = false;
    }
  };
  useEffect(() => {
    if (server.value.state !== "ready") return undefined;
    const stop = new AbortController();
    const timer = setTimeout(() => void load(0, stop.signal), query.q ? 180 : 0);
    return () => {
      clearTimeout(timer);
      stop.abort();
    };
  }, [asked.value, server.value.generation, server.value.state]);
  const end = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const watching = new IntersectionObserver(([entry]) => {
      const now = listing.value;
      if (entry?.isIntersecting && now && now.features.length < now.total && !loading.value) void load(now.features.length, new AbortController().signal);
    }, { rootMargin: "400px" });
    if (end.current) watching.observe(end.current);
    return () => watching.disconnect();
  }, []);
  const attributes = Object.entries(listing.value?.attributes ?? {});
  const found = listing.value;
  return (
    <>
      <label class="search big">
        <Icon name="search" />
        <input type="search" placeholder="What should it stand for? star, night, purple ..." aria-label="Search features by words" value={query.q ?? ""}
          onInput={(event) => setQuery({ q: event.currentTarget.value })} />
      </label>
      <div class="filters">
        <label class="field"><span>Block</span>
          <select value={query.block ?? ""} onChange={(event) => setQuery({ block: event.currentTarget.value })}>
            <option value="">all</option>
            {saeNames.value.map((name) => <option value={name}>{name}{roleOf(name) ? ` · ${roleOf(name)}` : ""}</option>)}
          </select>
        </label>
        <label class="field"><span>About</span>
          <select value={query.attribute ?? ""} onChange={(event) => setQuery({ attribute: event.currentTarget.value })}>
            <option value="">anything</option>
            {query.attribute && !attributes.some(([name]) => name === query.attribute) && <option value={query.attribute}>{query.attribute}</option>}
            {attributes.map(([name, count]) => <option value={name}>{name} ({count})</option>)}
          </select>
        </label>
        <label class="field"><span>Active in at least</span>
          <select value={query.least ?? ""} onChange={(event) => setQuery({ least: event.currentTarget.value })}>
            <option value="">any share</option><option value="0.001">0.1 %</option><option value="0.01">1 %</option><option value="0.05">5 %</option><option value="0.2">20 %</option>
          </select>
        </label>
        <label class="field"><span>Label fits at least</span>
          <select value={query.score ?? ""} onChange={(event) => setQuery({ score: event.currentTarget.value })}>
            <option value="">any</option><option value="0.6">0.6</option><option value="0.7">0.7</option><option value="0.8">0.8</option><option value="0.9">0.9</option>
          </select>
        </label>
        {!query.q && (
          <label class="field"><span>Order</span>
            <select value={query.sort || "best"} onChange={(event) => setQuery({ sort: event.currentTarget.value })}>
              {SORTS.map(([value, text]) => <option value={value}>{text}</option>)}
            </select>
          </label>
        )}
        <span class="spread" />
        <span class="quiet" role="status">{found ? `${found.total} features` : "reading ..."}</span>
      </div>
      {error.value && <div class="banner refused" role="alert"><p>{error.value}</p></div>}
      {found && !found.features.length && !error.value && (
        <Empty icon="search" title="Nothing answers to that">
          <p>Try one of these, or widen the filters.</p>
          <div class="chips">{examples.value.words.map((word) => <button type="button" class="chip" onClick={() => setQuery({ q: word, block: "", attribute: "", least: "", score: "" })}>{word}</button>)}</div>
        </Empty>
      )}
      <Cards features={found?.features ?? []} waiting={!found} />
      <div ref={end} class="end" />
    </>
  );
}

export function Cards({ features, waiting }: { features: readonly Brief[]; waiting?: boolean }) {
  return (
    <ul class="cards">
      {features.map((one) => <Card key={`${one.sae}/${one.index}`} one={one} />)}
      {waiting && Array.from({ length: 12 }, () => <li class="card"><div class="thumb loading" /></li>)}
    </ul>
  );
}

function Card({ one }: { one: Brief }) {
  const name = one.label || `feature ${one.index}`;
  const [words, detail] = wordsOf(one.label);
  const is = chosen.value.some((other) => other.sae === one.sae && other.index === one.index);
  const flag = one.frequency === 0 ? "never active" : one.frequency > 0.5 ? "active nearly everywhere" : "";
  return (
    <li class={`card ${is ? "chosen" : ""}`} data-feature={`${one.sae}/${one.index}`}>
      <Go to={{ screen: "feature", sae: one.sae, index: one.index }} class="card-link">
        <Thumb sae={one.sae} index={one.index} />
        <b class={one.label ? "" : "unnamed"}>{words || name}</b>
        <small>{one.sae}/{one.index}{detail && ` · ${detail}`}</small>
      </Go>
      <div class="card-facts">
        {one.effect !== undefined ? (
          <small title="Mean activation in the place and outside of it">{short(one.inside ?? 0)} in, {short(one.outside ?? 0)} out</small>
        ) : one.cosine !== undefined ? (
          <small>cosine {one.cosine.toFixed(2)}</small>
        ) : one.together !== undefined ? (
          <small>together in {percent(one.together)}</small>
        ) : one.match !== undefined ? (
          <small title={`found by ${one.reason ?? ""}`}>{one.match.toFixed(2)} · {(one.reason ?? "").replace("=", " ")}</small>
        ) : (
          <small>{flag || `active in ${percent(one.frequency)}`}{one.labelScore ? ` · fits ${one.labelScore.toFixed(2)}` : ""}</small>
        )}
        <Meter share={one.effect !== undefined ? one.effect : one.cosine ?? one.together ?? one.match ?? one.labelScore} />
      </div>
      <div class="card-acts">
        <button type="button" class="small steer" onClick={() => steerBy([one])} aria-label={`Steer by ${name}`}><Icon name="steer" size={15} /><span>Steer</span></button>
        <IconButton icon={is ? "check" : "plus"} size={16} label={is ? `Take ${name} out of the group` : `Put ${name} into a group`} pressed={is}
          onClick={() => (chosen.value = is ? chosen.value.filter((other) => other.sae !== one.sae || other.index !== one.index) : [...chosen.value, one])} />
      </div>
    </li>
  );
}

function Chosen() {
  return (
    <div class="chosen-bar" role="region" aria-label="Group">
      <b>{chosen.value.length} together</b>
      <span>{chosen.value.map((one) => one.label || `${one.sae}/${one.index}`).join(", ")}</span>
      <button type="button" class="small" onClick={() => (chosen.value = [])}>Clear</button>
      <button type="button" class="small primary" onClick={() => { steerBy(chosen.value); chosen.value = []; }}><Icon name="steer" size={15} /><span>Steer as a group</span></button>
    </div>
  );
}

const placeView = signal<View | null>(null);

function ByPlace() {
  const corners = useSignal<[Point, Point] | null>(null);
  const found = useSignal<Brief[] | null>(null);
  const waiting = useSignal(false);
  const region = route.value.query.region;
  useEffect(() => {
    if (!region || server.value.state !== "ready" || !base.value) return;
    const [left, top, right, bottom] = region.split(",").map(Number) as [number, number, number, number];
    const { width, height } = size.value;
    corners.value = [{ x: left * width, y: top * height }, { x: right * width, y: bottom * height }];
    const mask = box(new Uint8Array(width * height), size.value, ...corners.value, 1, false);
    waiting.value = true;
    contrast(plain(doc.value), toBase64(encodeGrey(mask, width, height)))
      .then(({ features }) => (found.value = features))
      .catch((error: Error) => say(error.message))
      .finally(() => (waiting.value = false));
  }, [region, base.value?.name, server.value.state]);
  const mark = (next: [Point, Point]) => {
    const { width, height } = size.value;
    const share = (value: number, most: number) => Math.min(1, Math.max(0, value / most)).toFixed(3);
    const [a, b] = next;
    const [left, right] = [Math.min(a.x, b.x), Math.max(a.x, b.x)];
    const [top, bottom] = [Math.min(a.y, b.y), Math.max(a.y, b.y)];
    if (right - left < 2 || bottom - top < 2) return;
    setQuery({ region: [share(left, width), share(top, height), share(right, width), share(bottom, height)].join(",") });
  };
  const boxed = corners.value;
  return (
    <div class="by-place">
      <div class="frame">
        <Stage picture={base.value?.bitmap ?? null} size={size.value} view={placeView} cursor="crosshair" label="The picture at hand: drag a box around a place; or use the buttons below"
          depends={[boxed]}
          draw={(context, place, ratio) => {
            if (!boxed) return;
            const [a, b] = boxed.map(place) as [Point, Point];
            const [x, y, w, h] = [Math.min(a.x, b.x), Math.min(a.y, b.y), Math.abs(b.x - a.x), Math.abs(b.y - a.y)];
            context.fillStyle = "#0008";
            context.beginPath();
            context.rect(0, 0, context.canvas.width, context.canvas.height);
            context.rect(x, y, w, h);
            context.fill("evenodd");
            context.strokeStyle = "#fff";
            context.lineWidth = 2 * ratio;
            context.strokeRect(x, y, w, h);
          }}
          onDown={({ at }) => {
            corners.value = [at, at];
            return true;
          }}
          onMove={({ at, event }) => {
            if (event.buttons && corners.value) corners.value = [corners.value[0], at];
          }}
          onUp={(pointed) => pointed && corners.value && mark([corners.value[0], pointed.at])} />
        <p class="caption">Drag a box around something: the features that tell it from the rest of the picture come first.</p>
        <div class="chips">
          {([["left half", 0, 0, 0.5, 1], ["right half", 0.5, 0, 1, 1], ["middle", 0.25, 0.25, 0.75, 0.75], ["top", 0, 0, 1, 0.4]] as const).map(([name, ...at]) => (
            <button type="button" class="chip" onClick={() => setQuery({ region: at.join(",") })}>{name}</button>
          ))}
        </div>
      </div>
      <div>
        {!region ? <Empty icon="box" title="Mark a place"><p>What is special about it is found by its features, not by words.</p></Empty>
          : <Cards features={found.value ?? []} waiting={waiting.value && !found.value} />}
      </div>
    </div>
  );
}
