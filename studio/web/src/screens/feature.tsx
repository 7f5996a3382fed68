/** One feature: what it stands for, where and how strongly it fires, what it does, and which others are like it. */
import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { colour, css, type Block } from "../lib/heat.ts";
import { BlobImage, Empty, Go, percent, short } from "../parts/controls.tsx";
import { Icon } from "../parts/icons.tsx";
import { ApiError, getFeature, getNearest, getSampled, type Brief, type Example, type Known, type Sampled } from "../state/api.ts";
import { doc } from "../state/doc.ts";
import { Lane, server, type Picture } from "../state/live.ts";
import { route } from "../state/router.ts";
import { roleOf, saeNames, steerBy } from "../state/studio.ts";
import { editOf, plain, type Run } from "../state/wire.ts";
import { Cards } from "./features.tsx";

const examplesLane = new Lane("examples");
const doseLane = new Lane("dose");
const iconLane = new Lane("icon");
const DOSES = [-8, -4, -2, 0, 2, 4, 8, 16] as const;
/** Where none is known to show anything. */
const ICON_STRENGTH = 4;
const ICON_SEEDS = ["0", "1", "2"] as const;

function adding(sae: string, index: number, amount: number, kind: "add" | "replace", unit: "mean" | "raw") {
  return editOf({ id: "", kind, features: [{ sae, index, label: "" }], amount, unit, mask: null, steps: null, on: true, colour: 0, locked: false });
}

export function FeaturePage() {
  const { sae, index } = route.value;
  const known = useSignal<Known | null>(null);
  const error = useSignal("");
  useEffect(() => {
    if (server.value.state !== "ready") return;
    getFeature(sae, index).then((found) => (known.value = found)).catch((problem: unknown) => {
      error.value = problem instanceof ApiError ? problem.message : "It cannot be read.";
    });
  }, [sae, index, server.value.generation, server.value.state]);
  const one = known.value;
  if (error.value) {
    return (
      <Empty icon="features" title="There is no such feature">
        <p>{error.value}</p>
        <div class="chips">{saeNames.value.map((name) => <Go to={{ screen: "features", query: { block: name } }} class="chip">{name}</Go>)}</div>
      </Empty>
    );
  }
  return (
    <div class="feature-grid">
      <header class="feature-head">
        <Go to={{ screen: "features" }} class="back"><Icon name="left" size={16} /> Features</Go>
        <p class="path"><Go to={{ screen: "features", query: { block: sae } }}>{sae}</Go> / {index} {roleOf(sae) && <span class="quiet">· {roleOf(sae)}</span>}</p>
        <h2>{one ? one.label || "no label" : "…"}</h2>
        {one && (
          <dl class="facts">
            <div><dt>label fits</dt><dd>{one.labelScore ? one.labelScore.toFixed(3) : "no label"}</dd></div>
            <div><dt>active in</dt><dd>{percent(one.frequency)} <small>of places</small></dd></div>
            <div><dt>mean when active</dt><dd>{short(one.mean)}</dd></div>
            <div><dt>most seen</dt><dd>{short(one.max)}</dd></div>
          </dl>
        )}
        <div class="head-acts">
          <button type="button" class="primary" disabled={!one} onClick={() => one && steerBy([one])}><Icon name="steer" /><span>Paint with this</span></button>
          <button type="button" disabled={!one} onClick={() => one && steerBy([one], { kind: "scale", amount: 0 })}><Icon name="minus" /><span>Take it away</span></button>
        </div>
      </header>
      {one && <Examples of={one} />}
      {one && <Dose of={one} />}
      <div class="columns">
        {one && <Labels of={one} />}
        <Density sae={sae} index={index} />
        {one && <AloneIcon of={one} />}
      </div>
      <Alike sae={sae} index={index} />
    </div>
  );
}

function Labels({ of }: { of: Known }) {
  return (
    <section class="panel">
      <h3>Labels</h3>
      <p class="quiet">How well each fits; 0.5 is chance.</p>
      {of.labels.length ? (
        <ul class="bars">
          {of.labels.map((label) => (
            <li>
              <span><b>{label.value}</b> <small>{label.attribute}{label.region ? `, ${label.region}` : ""}</small></span>
              <span class="meter chance"><span style={{ width: `${Math.max(0, label.score - 0.5) * 200}%` }} /></span>
              <em>{label.score.toFixed(2)}</em>
            </li>
          ))}
        </ul>
      ) : <p>None fits.</p>}
    </section>
  );
}

function Density({ sae, index }: { sae: string; index: number }) {
  const sampled = useSignal<Sampled | null>(null);
  useEffect(() => {
    let gone = false;
    let timer = 0;
    const ask = () => {
      getSampled(sae, index).then((found) => {
        if (gone) return;
        sampled.value = found;
        if (found.state === "measuring") timer = window.setTimeout(ask, 700);
      }).catch(() => undefined);
    };
    if (server.value.state === "ready") ask();
    return () => {
      gone = true;
      clearTimeout(timer);
    };
  }, [sae, index, server.value.state]);
  const now = sampled.value;
  const most = Math.max(1, ...(now?.counts ?? []));
  return (
    <section class="panel" data-panel="density">
      <h3>Density of its activations</h3>
      {now?.state === "measured" && now.counts ? (
        <>
          <p class="quiet">Active in {now.active} of {now.cells} places of {now.runs} pictures: the catalogue's own examples.</p>
          <div class="histogram" role="img" aria-label={`Histogram of activations from 0 to ${short(now.top ?? 0)}`}>
            {now.counts.map((count, at) => <i style={{ height: `${count ? Math.max(3, (Math.log1p(count) / Math.log1p(most)) * 100) : 0}%`, background: css(colour((at + 1) / now.counts!.length)) }} title={String(count)} />)}
          </div>
          <p class="axis"><span>0</span><span>log count</span><span>{short(now.top ?? 0)}</span></p>
        </>
      ) : now?.state === "none" ? <p>The catalogue has no examples to sample.</p> : (
        <>
          <p class="quiet">Looking at a sample of pictures, once for all features.</p>
          <progress max={now?.of || 64} value={now?.done ?? 0} aria-label="Pictures looked at" />
        </>
      )}
      {now?.together && now.together.length > 0 && (
        <>
          <h3>Fires together with</h3>
          <ul class="list">{now.together.slice(0, 5).map((one) => (
            <li><Go to={{ screen: "feature", sae: one.sae, index: one.index }}>{one.label || `feature ${one.index}`}</Go> <small>{one.sae}/{one.index} · {percent(one.together ?? 0)}</small></li>
          ))}</ul>
        </>
      )}
    </section>
  );
}

/** Pictures of runs that are asked for once, as they come. */
function useRuns(lane: Lane, runs: Run[], key: string): (Picture | undefined)[] {
  const pictures = useSignal<(Picture | undefined)[]>([]);
  useEffect(() => {
    pictures.value = [];
    if (!runs.length || server.value.state !== "ready") return undefined;
    let gone = false;
    lane.run(runs, {
      picture: (picture) => {
        if (gone) return;
        const next = [...pictures.value];
        next[picture.index] = picture;
        pictures.value = next;
      },
    });
    return () => {
      gone = true;
      lane.cancel();
    };
  }, [key, server.value.state]);
  return pictures.value;
}

function Examples({ of }: { of: Known }) {
  const ref = `${of.sae}/${of.index}`;
  const runs = of.examples.map(({ prompt, seed, steps }) => ({ prompt, seed, steps, edits: [], only: [ref] }));
  const pictures = useRuns(examplesLane, runs, ref);
  if (!of.examples.length) return null;
  return (
    <section class="panel wide-panel" data-panel="examples">
      <h3>Where it fires most</h3>
      <ul class="examples">
        {of.examples.map((example, at) => <li><ExamplePicture picture={pictures[at]} example={example} of={of} /></li>)}
      </ul>
    </section>
  );
}

function ExamplePicture({ picture, example, of }: { picture: Picture | undefined; example: Example; of: Known }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    const context = canvas.current?.getContext("2d");
    if (!picture || !context || !canvas.current) return;
    const { width, height } = canvas.current;
    context.drawImage(picture.bitmap, 0, 0, width, height);
    const block: Block | undefined = picture.blocks[0];
    if (!block) return;
    // Dark where the feature is not, and its strongest place marked.
    const heat = block.at(example.step).heat(of.index);
    const most = heat.reduce((a, b) => Math.max(a, b), 1e-9);
    const [w, h] = [width / block.width, height / block.height];
    const edge = (at: number, extent: number) => Math.round(at * extent);
    heat.forEach((value, cell) => {
      const [column, row] = [cell % block.width, Math.floor(cell / block.width)];
      const [x, y] = [edge(column, w), edge(row, h)];
      context.fillStyle = `rgb(0 0 0 / ${0.62 * (1 - Math.sqrt(value / most))})`;
      context.fillRect(x, y, edge(column + 1, w) - x, edge(row + 1, h) - y);
    });
    context.strokeStyle = "#fff";
    context.lineWidth = 3;
    context.strokeRect(example.x * w + 1.5, example.y * h + 1.5, w - 3, h - 3);
  }, [picture]);
  return (
    <figure>
      <Go to={{ screen: "explore", query: { prompt: example.prompt, seed: example.seed, steps: String(example.steps) } }} label={`Explore: ${example.prompt || "the empty prompt"}`}>
        <canvas ref={canvas} width={256} height={256} class={picture ? "" : "loading"} aria-hidden="true" />
      </Go>
      <figcaption><b>{short(example.activation)}</b> {example.prompt || <i>the empty prompt</i>}</figcaption>
    </figure>
  );
}

function Dose({ of }: { of: Known }) {
  const own = plain(doc.value);
  const unit = of.mean > 0 ? "mean" : "raw";
  const runs = DOSES.map((dose) => ({ ...own, edits: dose ? [adding(of.sae, of.index, dose, "add", unit)] : [] }));
  const pictures = useRuns(doseLane, runs, `${of.sae}/${of.index}/${JSON.stringify(own)}`);
  return (
    <section class="panel wide-panel" data-panel="dose">
      <h3>What it does to the picture at hand</h3>
      <p class="quiet">Added everywhere, in {unit === "mean" ? "means of the feature" : "raw activation"}. Press one to paint with it.</p>
      <ul class="strip">
        {DOSES.map((dose, at) => (
          <li>
            <button type="button" onClick={() => steerBy([of], { amount: dose, unit })} disabled={dose === 0}>
              {pictures[at] ? <BlobImage blob={pictures[at]!.png} alt={`with ${dose}`} /> : <span class="loading" />}
              <b>{dose > 0 ? `+${dose}` : dose || "plain"}</b>
            </button>
          </li>
        ))}
      </ul>
    </section>
  );
}

function AloneIcon({ of }: { of: Known }) {
  const unit = of.mean > 0 ? "mean" : "raw";
  const strength = of.iconStrength ?? ICON_STRENGTH;
  const runs = ICON_SEEDS.map((seed) => ({ prompt: "", seed, steps: 1, edits: [adding(of.sae, of.index, strength, "replace", unit)] }));
  const pictures = useRuns(iconLane, runs, `${of.sae}/${of.index}`);
  return (
    <section class="panel" data-panel="icon">
      <h3>Its icon</h3>
      <p class="quiet">On the empty prompt, the feature alone in place of all that its block writes, at three seeds. {of.iconStrength === null ? `No strength is known at which something shows; this is ${strength}.` : `At ${strength}, the first strength tried at which something shows.`} Icons can mislead.</p>
      <ul class="icons">{ICON_SEEDS.map((seed, at) => <li>{pictures[at] ? <BlobImage blob={pictures[at]!.png} alt={`icon, seed ${seed}`} /> : <span class="loading" />}</li>)}</ul>
    </section>
  );
}

function Alike({ sae, index }: { sae: string; index: number }) {
  const near = useSignal<Brief[] | null>(null);
  useEffect(() => {
    if (server.value.state !== "ready") return;
    getNearest(sae, index).then(({ features }) => (near.value = features)).catch(() => (near.value = []));
  }, [sae, index, server.value.state]);
  if (near.value && !near.value.length) return null;
  return (
    <section class="wide-panel" data-panel="near">
      <h3>Nearest features</h3>
      <p class="quiet">By the cosine of their decoder directions: what they write is alike.</p>
      <Cards features={near.value ?? []} waiting={!near.value} />
    </section>
  );
}
