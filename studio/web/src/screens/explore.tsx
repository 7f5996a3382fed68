/** A picture and the features behind it: point at a feature to see where it fires, at a place to see what fires there. */
import { computed, signal, useComputed, useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { colour, css, type Block, type Firing } from "../lib/heat.ts";
import { fromHeat } from "../lib/raster.ts";
import { cellAt, type View } from "../lib/view.ts";
import { Empty, Go, IconButton, Meter, percent, Segmented, short } from "../parts/controls.tsx";
import { Icon } from "../parts/icons.tsx";
import { drawCell, drawHeat } from "../parts/overlay.ts";
import { Stage } from "../parts/stage.tsx";
import type { Brief } from "../state/api.ts";
import { acting, makeMask, wordsOf } from "../state/doc.ts";
import { server } from "../state/live.ts";
import { route, setQuery } from "../state/router.ts";
import { base, blocks, examples, gridOf, preview, result, roleOf, setSettings, size, steerBy } from "../state/studio.ts";

const view = signal<View | null>(null);
const hovered = signal<string>("");
const cell = signal<{ column: number; row: number } | null>(null);
const alone = signal(false);
const smooth = signal(false);
const own = signal(false);

const steered = computed(() => route.value.query.of === "steered" && result.value !== null && result.value.blocks.length > 0);
const shown = computed(() => (steered.value ? result.value : base.value));
const pinned = computed(() => route.value.query.f ?? "");
const step = computed(() => (route.value.query.step === undefined ? -1 : Number(route.value.query.step)));
const lookedAt = computed(() => hovered.value || pinned.value);

const fires = computed<Block[]>(() => (shown.value?.blocks ?? []).map((block) => (step.value >= 0 ? block.at(step.value) : block)));
const known = computed<Record<string, Brief>>(() => shown.value?.known ?? {});

function briefOf(sae: string, index: number): Brief {
  return known.value[`${sae}/${index}`] ?? { sae, index, label: "", labelScore: 0, frequency: 0, mean: 0, max: 0, attribute: "" };
}

const heat = computed(() => {
  const [sae, index] = splitRef(lookedAt.value);
  const block = fires.value.find((one) => one.sae === sae);
  if (!block || index < 0) return null;
  const values = block.heat(index);
  const top = own.value ? values.reduce((a, b) => Math.max(a, b), 0) : briefOf(sae, index).max || values.reduce((a, b) => Math.max(a, b), 0);
  return { block, index, values, top };
});

export function splitRef(ref: string): [string, number] {
  const at = ref.lastIndexOf("/");
  return at < 0 ? ["", -1] : [ref.slice(0, at), Number(ref.slice(at + 1))];
}

const here = computed(() => {
  const at = cell.value;
  if (!at) return null;
  return fires.value.flatMap((block) => {
    const grid = { width: block.width, height: block.height };
    const column = Math.floor((at.column / gridOf(fires.value[0]!.sae).width) * grid.width);
    const row = Math.floor((at.row / gridOf(fires.value[0]!.sae).height) * grid.height);
    return block.in(row * grid.width + column).slice(0, 4).map((firing) => ({ sae: block.sae, ...firing }));
  });
});

export function Explore() {
  const list = useRef<HTMLDivElement>(null);
  useEffect(() => () => {
    hovered.value = "";
    cell.value = null;
  }, []);
  const grid = fires.value[0] ? { width: fires.value[0].width, height: fires.value[0].height } : null;
  const image = preview.value?.bitmap ?? shown.value?.bitmap ?? null;
  const steps = shown.value?.blocks[0]?.steps ?? [];
  const now = heat.value;
  const about = now ? briefOf(now.block.sae, now.index) : null;

  const moveCell = (dx: number, dy: number) => {
    if (!grid) return;
    const at = cell.value ?? { column: -dx < 0 ? -1 : 0, row: 0 };
    cell.value = {
      column: Math.min(grid.width - 1, Math.max(0, at.column + dx)),
      row: Math.min(grid.height - 1, Math.max(0, at.row + dy)),
    };
  };

  return (
    <div class="explore-grid">
      <section class="picture-side" aria-label="Picture">
        <div class="frame">
          <Stage
            picture={image}
            size={size.value}
            view={view}
            label="The picture; arrows walk over its cells and tell what fires there"
            describedBy="cell-says"
            depends={[heat.value, cell.value, alone.value, smooth.value, preview.value]}
            draw={(context, place, ratio) => {
              if (preview.value) return;
              const hot = heat.value;
              if (hot) {
                const look = { top: hot.top, smooth: smooth.value, alone: alone.value };
                drawHeat(context, hot.values, { width: hot.block.width, height: hot.block.height }, size.value, place, look);
              }
              if (cell.value && grid) drawCell(context, cell.value.column, cell.value.row, grid, size.value, place, ratio);
            }}
            onDown={({ at }) => {
              if (grid) cell.value = cellAt(at, size.value, grid);
              return true;
            }}
            onMove={({ at, event }) => {
              if (grid && (event.pointerType === "mouse" || event.buttons)) cell.value = cellAt(at, size.value, grid);
            }}
            onLeave={() => (cell.value = null)}
            onKeyDown={(event) => {
              const by = ({ ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] } as Record<string, [number, number]>)[event.key];
              if (by) {
                event.preventDefault();
                moveCell(...by);
              } else if (event.key === "Escape") cell.value = null;
              else if (event.key === "0") view.value = null;
            }}
          >
            {!image && <div class="stage-wait loading" />}
          </Stage>
          <p class="caption" id="cell-says" aria-live="polite">
            {cell.value && here.value?.length ? (
              <><b>Row {cell.value.row + 1}, column {cell.value.column + 1}:</b> {here.value.slice(0, 3).map((one) => briefOf(one.sae, one.index).label || `${one.sae}/${one.index}`).join(" · ")}</>
            ) : about ? (
              <><b>{about.label || `${about.sae}/${about.index}`}</b> {now?.values.some((value) => value > 0) ? "where it is bright" : "does not fire in this picture"}</>
            ) : (
              <>Point at the picture to see what fires there, or at a feature to see where it does.</>
            )}
          </p>
        </div>
        <div class="under">
          <Legend top={now?.top ?? 0} known={about} />
          <div class="toggles">
            <label class="switch"><input type="checkbox" checked={smooth.value} onChange={(event) => (smooth.value = event.currentTarget.checked)} /> smooth</label>
            <label class="switch"><input type="checkbox" checked={alone.value} onChange={(event) => (alone.value = event.currentTarget.checked)} /> heat alone</label>
            <label class="switch" title="Else the brightest color is the most that the feature was ever seen to fire">
              <input type="checkbox" checked={own.value} onChange={(event) => (own.value = event.currentTarget.checked)} /> own maximum
            </label>
          </div>
          {steps.length > 1 && (
            <Segmented label="Step" value={step.value} options={[[-1, "all steps"], ...steps.map((one) => [one, `step ${one + 1}`] as const)]}
              onChange={(next) => setQuery({ step: next < 0 ? "" : String(next) })} />
          )}
          {acting.value.length > 0 && (
            <Segmented label="Which picture" value={steered.value ? "steered" : "plain"} options={[["plain", "plain"], ["steered", "steered"]]}
              onChange={(next) => setQuery({ of: next === "steered" ? "steered" : "" })} />
          )}
        </div>
        <div class="suggestions">
          <span>Try</span>
          {examples.value.prompts.map((prompt) => (
            <button type="button" class="chip" onClick={() => setSettings({ prompt })}>{prompt}</button>
          ))}
        </div>
      </section>
      <section class="features-side" aria-label="Features behind the picture" ref={list}>
        {!fires.value.length && server.value.state === "ready" && !blocks.value.length && (
          <Empty icon="features" title="No SAEs are served"><p>Start the server with <code>--sae</code> to see features.</p></Empty>
        )}
        {!fires.value.length && blocks.value.length > 0 && blocks.value.map((point) => (
          <article class="block"><header><h2>{point.name}</h2><p>{roleOf(point.name ?? "")}</p></header>{Array.from({ length: 8 }, () => <div class="row loading" />)}</article>
        ))}
        {fires.value.map((block) => <BlockColumn block={block} />)}
      </section>
    </div>
  );
}

function Legend({ top, known: about }: { top: number; known: Brief | null }) {
  const stops = Array.from({ length: 12 }, (_, at) => css(colour(at / 11))).join(",");
  return (
    <div class="legend" aria-label="Colors of the heat-map">
      <span>0</span>
      <i style={{ background: `linear-gradient(90deg, ${stops})` }} />
      <span>{top ? short(top) : "max"}</span>
      <small>{about ? (own.value ? "this picture's maximum" : "the feature's own maximum") : "activation"}</small>
    </div>
  );
}

function BlockColumn({ block }: { block: Block }) {
  const top = useComputed(() => {
    const inCell = here.value?.filter((one) => one.sae === block.sae);
    return inCell ?? null;
  });
  const more = useSignal(false);
  const rows: Firing[] = (top.value as Firing[] | null) ?? block.top(more.value ? 40 : 6);
  const most = rows[0]?.mean ?? 1;
  return (
    <article class="block">
      <header>
        <h2>{block.sae}</h2>
        <p>{top.value ? "fires here" : roleOf(block.sae)}</p>
      </header>
      <ul>
        {rows.map((firing) => <FeatureRow key={firing.index} block={block} firing={firing} most={most} />)}
        {!rows.length && <li class="none">nothing</li>}
        {!top.value && <li class="more"><button type="button" class="text" aria-expanded={more.value} aria-label={`${more.value ? "Fewer" : "More"} features of ${block.sae}`} onClick={() => (more.value = !more.value)}>{more.value ? "fewer" : "more"}</button></li>}
      </ul>
    </article>
  );
}

function FeatureRow({ block, firing, most }: { block: Block; firing: Firing; most: number }) {
  const ref = `${block.sae}/${firing.index}`;
  const about = briefOf(block.sae, firing.index);
  const chosen = pinned.value === ref;
  const [words, detail] = wordsOf(about.label);
  const name = about.label || `feature ${firing.index}`;
  return (
    <li class={`row ${chosen ? "chosen" : ""}`} data-feature={ref}
      onPointerEnter={(event) => event.pointerType === "mouse" && (hovered.value = ref)}
      onPointerLeave={() => hovered.value === ref && (hovered.value = "")}>
      <button type="button" class="row-main" aria-pressed={chosen} aria-label={`${name}: show where it fires`}
        onFocus={() => (hovered.value = ref)} onBlur={() => hovered.value === ref && (hovered.value = "")}
        onClick={() => setQuery({ f: chosen ? "" : ref })}>
        <MiniHeat block={block} index={firing.index} top={about.max} />
        <span class="row-text">
          <b class={about.label ? "" : "unnamed"} title={name}>{words || name}</b>
          <small title="Mean activation, and the share of cells where it fires">{short(firing.mean)} · in {percent(firing.share)}{detail && ` · ${detail}`}</small>
        </span>
        <Meter share={firing.mean / most} />
      </button>
      <span class="row-acts">
        <button type="button" class="small steer" onClick={() => steerBy([about])} aria-label={`Steer by ${name}`}><Icon name="steer" size={15} /><span>Steer</span></button>
        {chosen && (
          <>
            <IconButton icon="lasso" size={16} label={`Steer by ${name}, only where it fires`} onClick={() => {
              const grid = { width: block.width, height: block.height };
              steerBy([about], { mask: makeMask(fromHeat(block.heat(firing.index), grid, size.value, 0.3), size.value) });
            }} />
            <IconButton icon="minus" size={16} label={`Take ${name} away`} onClick={() => steerBy([about], { kind: "scale", amount: 0 })} />
          </>
        )}
        <Go to={{ screen: "feature", sae: block.sae, index: firing.index }} class="icon-button" label={`All about ${name}`}><Icon name="more" size={16} /></Go>
      </span>
    </li>
  );
}

/** A heat-map in a few pixels. */
function MiniHeat({ block, index, top }: { block: Block; index: number; top: number }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  useEffect(() => {
    const context = canvas.current?.getContext("2d");
    if (!context) return;
    const values = block.heat(index);
    const most = top || values.reduce((a, b) => Math.max(a, b), 1e-9);
    const pixels = context.createImageData(block.width, block.height);
    values.forEach((value, at) => pixels.data.set([...colour(value / most), 255], at * 4));
    context.putImageData(pixels, 0, 0);
  }, [block, index, top]);
  return <canvas ref={canvas} class="mini" width={block.width} height={block.height} aria-hidden="true" />;
}

