/** The layers: what each does, how strongly, when, and in which order. */
import { useEffect, useRef, useState } from "preact/hooks";
import { getFeatures, type Brief } from "../state/api.ts";
import {
  activeId, activeLayer, addLayer, changeLayer, doc, duplicateLayer, moveLayer, nameOf, noEffect, refOf, removeLayer, settle, soloId, type Kind, type Layer, type Unit,
} from "../state/doc.ts";
import { examples, firstStrength, model, say, termOf } from "../state/studio.ts";
import { Go, IconButton, NumberBox, Segmented, Strength } from "./controls.tsx";
import { Icon } from "./icons.tsx";
import { layerColour } from "./overlay.ts";

const KINDS: readonly (readonly [Kind, string])[] = [["add", "add"], ["scale", "scale"], ["set", "set"], ["replace", "replace"]];
const WHAT: Record<Kind, string> = {
  add: "raises the feature; below 0 lowers it",
  scale: "multiplies it; 0 takes it away",
  set: "fixes it at a value",
  replace: "puts it in place of all that the block writes",
};

/** Features for a word that go well together: the best one's block, as many as say the word. */
export async function groupFor(word: string, block = ""): Promise<Brief[]> {
  const { features } = await getFeatures({ q: word, ...(block ? { block } : {}), count: "40" });
  const first = features[0];
  if (!first) return [];
  const alike = features.filter((one) => one.sae === first.sae && one.label.toLowerCase().includes(word.toLowerCase()));
  return (alike.length ? alike : [first]).slice(0, 4);
}

export async function addWord(word: string): Promise<void> {
  const features = await groupFor(word);
  if (!features.length) return say(`No feature stands for "${word}".`);
  const unit: Unit = features.every((one) => one.mean > 0) ? "mean" : "raw";
  addLayer(features.map(termOf), { amount: firstStrength(features), unit });
}

export function LayerPanel() {
  const layers = doc.value.layers;
  const before = useRef(layers.length);
  useEffect(() => {
    // On a phone the picture is above the layers: a new one is looked at there.
    if (layers.length > before.current && innerWidth < 820) document.querySelector(".easel")?.scrollIntoView({ block: "start" });
    before.current = layers.length;
  }, [layers.length]);
  return (
    <aside class="layers" aria-label="Layers">
      <AddLayer />
      {!layers.length && (
        <div class="first-steps">
          <h2>Steer this picture</h2>
          <p>Pick a concept. It becomes a layer that raises the features behind it; then paint where it should act.</p>
          <div class="chips">{examples.value.words.map((word) => <button type="button" class="chip" onClick={() => void addWord(word)}>{word}</button>)}</div>
          <p class="quiet">Or <Go to={{ screen: "explore" }}>explore the picture</Go> and steer by what is in it.</p>
        </div>
      )}
      <ol>
        {layers.map((layer, at) => <LayerCard key={layer.id} layer={layer} at={at} of={layers.length} />)}
      </ol>
    </aside>
  );
}

function AddLayer() {
  const [words, setWords] = useState("");
  const [found, setFound] = useState<Brief[]>([]);
  const [open, setOpen] = useState(false);
  const holder = useRef<HTMLDivElement>(null);
  useEffect(() => {
    if (words.trim().length < 2) return setFound([]);
    const stop = new AbortController();
    const timer = setTimeout(() => {
      getFeatures({ q: words, count: "12" }, stop.signal).then(({ features }) => setFound(features)).catch(() => undefined);
    }, 150);
    return () => {
      clearTimeout(timer);
      stop.abort();
    };
  }, [words]);
  const take = (brief: Brief[]) => {
    addLayer(brief.map(termOf), { amount: firstStrength(brief), unit: brief.every((one) => one.mean > 0) ? "mean" : "raw" });
    setWords("");
    setOpen(false);
  };
  return (
    <div class="add-layer" ref={holder} onFocusOut={(event) => !holder.current?.contains(event.relatedTarget as Node) && setOpen(false)}>
      <label class="search">
        <Icon name="plus" />
        <input type="search" placeholder="Add a concept: words, or up.0.1/202" aria-label="Add a layer by words" value={words}
          onFocus={() => setOpen(true)}
          onInput={(event) => { setWords(event.currentTarget.value); setOpen(true); }}
          onKeyDown={(event) => {
            if (event.key === "Escape") setOpen(false);
            if (event.key === "ArrowDown") holder.current?.querySelector<HTMLElement>(".found button")?.focus();
            if (event.key !== "Enter") return;
            const named = /^(.+)\/(\d+)$/.exec(words.trim());
            if (named && model.value?.saes?.some((sae) => sae.name === named[1])) {
              addLayer([{ sae: named[1]!, index: Number(named[2]), label: "" }]);
              setWords("");
            } else if (words.trim()) void addWord(words.trim()).then(() => { setWords(""); setOpen(false); });
          }} />
      </label>
      {open && found.length > 0 && (
        <div class="found">
          <button type="button" class="found-group" onClick={() => void groupFor(words.trim()).then((group) => group.length && take(group))}>
            <Icon name="group" size={16} /><span><b>“{words.trim()}”</b> as a group</span>
          </button>
          {found.map((one) => (
            <button type="button" onClick={() => take([one])}>
              <b>{one.label || `${one.sae}/${one.index}`}</b><small>{one.sae}/{one.index}</small>
            </button>
          ))}
        </div>
      )}
    </div>
  );
}

function LayerCard({ layer, at, of }: { layer: Layer; at: number; of: number }) {
  const active = activeLayer.value?.id === layer.id;
  const name = nameOf(layer);
  const limit = model.value?.limits?.maxStrength ?? 1000;
  const steps = doc.value.steps;
  const heard = soloId.value ? soloId.value === layer.id : layer.on;
  const units = model.value?.saes?.find((sae) => sae.name === layer.features[0]?.sae)?.units ?? [];
  const mean: [Unit, string][] = units.length && !units.includes("UNIT_MEAN") ? [] : [["mean", "means"]];
  const norm: [Unit, string][] = units.length && !units.includes("UNIT_NORM") ? [] : [["norm", "norms"]];
  return (
    <li class={`layer ${active ? "active" : ""} ${heard ? "" : "muted"}`} style={{ "--layer": layerColour(layer.colour) }} data-layer={layer.id}>
      <header>
        <button type="button" class="layer-name" aria-pressed={active} onClick={() => (activeId.value = layer.id)}>
          <i class="swatch" />
          <span>
            <b>{name}</b>
            <small>{layer.features.length > 1 ? `${layer.features.length} features of ${layer.features[0]!.sae}` : layer.features[0] ? refOf(layer.features[0]) : ""} · {layer.mask ? "painted" : "whole picture"}{noEffect(layer) ? " · no effect" : ""}</small>
          </span>
        </button>
        <IconButton icon={layer.on ? "eye" : "eyeOff"} size={16} label={layer.on ? `Mute ${name}` : `Unmute ${name}`} pressed={!layer.on}
          onClick={() => changeLayer(layer.id, layer.on ? "Mute" : "Unmute", { on: !layer.on })} />
        <IconButton icon="solo" size={16} label={`Only ${name}`} pressed={soloId.value === layer.id}
          onClick={() => (soloId.value = soloId.value === layer.id ? "" : layer.id)} />
      </header>
      <Strength label={`Strength of ${name}`} value={layer.amount} most={limit}
        onInput={(amount) => changeLayer(layer.id, "Change the strength", { amount }, `amount-${layer.id}`)} onSettle={settle} />
      {active && (
        <div class="layer-more">
          <Segmented<Kind> label="Kind of edit" value={layer.kind} options={KINDS} onChange={(kind) => changeLayer(layer.id, "Change the kind", { kind })} />
          <p class="quiet">{WHAT[layer.kind]}</p>
          {layer.kind !== "scale" && (
            <div class="line"><span>in</span>
              <Segmented<Unit> label="Unit" value={layer.unit} options={[...mean, ["raw", "raw"], ...norm]} onChange={(unit) => changeLayer(layer.id, "Change the unit", { unit })} />
            </div>
          )}
          {steps > 1 && <StepWindow layer={layer} steps={steps} />}
          {layer.features.length > 1 && (
            <ul class="terms">
              {layer.features.map((term, i) => (
                <li>
                  <Go to={{ screen: "feature", sae: term.sae, index: term.index }}>{term.label || refOf(term)}</Go>
                  <small>{refOf(term)}</small>
                  {layer.kind !== "scale" && <NumberBox label={`Weight of ${refOf(term)}`} value={term.weight ?? 1} least={-limit} most={limit} step={0.1}
                    onChange={(weight) => changeLayer(layer.id, "Change a weight", { features: layer.features.with(i, { ...term, weight }) }, `weight-${layer.id}`)} />}
                  <IconButton icon="close" size={14} label={`Take ${refOf(term)} out of the group`}
                    onClick={() => changeLayer(layer.id, "Change the group", { features: layer.features.filter((_, j) => j !== i) })} />
                </li>
              ))}
            </ul>
          )}
          <div class="layer-acts">
            <IconButton icon="up" size={16} label="Act earlier" disabled={at === 0} onClick={() => moveLayer(layer.id, -1)} />
            <IconButton icon="down" size={16} label="Act later" disabled={at === of - 1} onClick={() => moveLayer(layer.id, 1)} />
            <IconButton icon="copy" size={16} label="Duplicate" onClick={() => duplicateLayer(layer.id)} />
            <IconButton icon="lock" size={16} label={layer.locked ? "Unlock" : "Lock"} pressed={layer.locked} onClick={() => changeLayer(layer.id, layer.locked ? "Unlock" : "Lock", { locked: !layer.locked })} />
            {layer.features[0] && <Go to={{ screen: "feature", sae: layer.features[0].sae, index: layer.features[0].index }} class="icon-button" label="All about this feature"><Icon name="features" size={16} /></Go>}
            <span class="spread" />
            <IconButton icon="trash" size={16} label={`Remove ${name}`} disabled={layer.locked} onClick={() => removeLayer(layer.id)} />
          </div>
        </div>
      )}
    </li>
  );
}

/** At which steps a layer acts: a button for each. */
function StepWindow({ layer, steps }: { layer: Layer; steps: number }) {
  const [from, to] = layer.steps ?? [0, steps];
  const toggle = (step: number) => {
    const next: [number, number] = step < from ? [step, to] : step >= to ? [from, step + 1] : to - from === 1 ? [0, steps] : step === from ? [from + 1, to] : [from, step];
    changeLayer(layer.id, "Change when it acts", { steps: next[0] === 0 && next[1] === steps ? null : next });
  };
  return (
    <div class="line" role="group" aria-label="Steps at which it acts">
      <span>at step</span>
      <div class="step-window">
        {[...Array(steps).keys()].map((step) => (
          <button type="button" aria-pressed={step >= from && step < to} onClick={() => toggle(step)}>{step + 1}</button>
        ))}
      </div>
    </div>
  );
}
