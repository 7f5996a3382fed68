/** Small controls that every screen uses. */
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { getThumb } from "../state/api.ts";
import { server } from "../state/live.ts";
import { go, hrefOf, type Route, type Screen } from "../state/router.ts";
import { Icon, type IconName } from "./icons.tsx";

export function IconButton(props: {
  icon: IconName;
  label: string;
  onClick: () => void;
  pressed?: boolean | undefined;
  disabled?: boolean;
  keys?: string;
  size?: number;
}) {
  const { icon, label, onClick, pressed, disabled, keys, size } = props;
  return (
    <button
      type="button"
      class="icon-button"
      aria-label={label}
      title={keys ? `${label} (${keys})` : label}
      aria-pressed={pressed}
      disabled={disabled ?? false}
      onClick={onClick}
    >
      <Icon name={icon} size={size ?? 18} />
    </button>
  );
}

export function Segmented<T extends string | number>(props: {
  label: string;
  value: T;
  options: readonly (readonly [T, ComponentChildren])[];
  onChange: (value: T) => void;
}) {
  return (
    <div class="segmented" role="radiogroup" aria-label={props.label}>
      {props.options.map(([value, text]) => (
        <button
          type="button"
          role="radio"
          aria-checked={value === props.value}
          tabIndex={value === props.value ? 0 : -1}
          onClick={() => props.onChange(value)}
          onKeyDown={(event) => {
            const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
            if (!by) return;
            event.preventDefault();
            const at = props.options.findIndex(([one]) => one === props.value);
            const next = props.options[(at + by + props.options.length) % props.options.length]!;
            props.onChange(next[0]);
            const buttons = event.currentTarget.parentElement?.children;
            (buttons?.[props.options.indexOf(next)] as HTMLElement | undefined)?.focus();
          }}
        >
          {text}
        </button>
      ))}
    </div>
  );
}

/** A link within the studio. */
export function Go(props: {
  to: Partial<Route> & { screen: Screen };
  class?: string;
  current?: boolean;
  label?: string;
  children: ComponentChildren;
}) {
  return (
    <a
      href={hrefOf(props.to)}
      class={props.class ?? ""}
      aria-current={props.current ? "page" : undefined}
      aria-label={props.label}
      onClick={(event) => {
        if (event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
        event.preventDefault();
        go(props.to);
      }}
    >
      {props.children}
    </a>
  );
}

/** A menu that goes when one of its buttons was pressed, when Escape is, and when the focus leaves it. */
export function Menu(props: { class?: string; label: string; summary: ComponentChildren; summaryClass: string; children: ComponentChildren }) {
  const menu = useRef<HTMLDetailsElement>(null);
  const close = () => menu.current && (menu.current.open = false);
  return (
    <details
      ref={menu}
      class={`menu ${props.class ?? ""}`}
      onFocusOut={(event) => event.relatedTarget && !menu.current?.contains(event.relatedTarget as Node) && close()}
      onKeyDown={(event) => event.key === "Escape" && close()}
    >
      <summary class={props.summaryClass} aria-label={props.label} title={props.label}>{props.summary}</summary>
      <div class="menu-body" onClick={(event) => (event.target as HTMLElement).closest("button") && close()}>{props.children}</div>
    </details>
  );
}

export const REACH = 40;

/** A strength at a place of its slider: fine around 0, coarse far out, the same on both sides. */
export function strengthAt(place: number): number {
  const value = Math.expm1((Math.abs(place) / 100) * Math.log1p(REACH)) * Math.sign(place);
  return Math.abs(value) < 10 ? Math.round(value * 10) / 10 : Math.round(value);
}

export function placeOf(strength: number): number {
  return (Math.log1p(Math.min(REACH, Math.abs(strength))) / Math.log1p(REACH)) * 100 * Math.sign(strength);
}

/** A number with a slider; the box takes what the slider cannot reach. */
export function Strength(props: {
  label: string;
  value: number;
  most: number;
  onInput: (value: number) => void;
  onSettle: () => void;
}) {
  const { value } = props;
  return (
    <div class="strength">
      <input
        type="range"
        min={-100}
        max={100}
        step={1}
        value={placeOf(value)}
        aria-label={props.label}
        aria-valuetext={String(value)}
        style={{ "--at": `${(placeOf(value) + 100) / 2}%` }}
        onInput={(event) => props.onInput(strengthAt(Number(event.currentTarget.value)))}
        onChange={props.onSettle}
      />
      <NumberBox label={`${props.label}, as a number`} value={value} least={-props.most} most={props.most} step={0.1}
        onChange={(next) => { props.onInput(next); props.onSettle(); }} />
    </div>
  );
}

/** A number that is taken when it is one, on leaving the box or at once where arrows made it. */
export function NumberBox(props: {
  label: string;
  value: number;
  least: number;
  most: number;
  step?: number;
  onChange: (value: number) => void;
}) {
  const [text, setText] = useState<string | null>(null);
  const take = (given: string) => {
    const next = Number(given);
    if (given.trim() === "" || !Number.isFinite(next)) return;
    props.onChange(Math.min(props.most, Math.max(props.least, next)));
  };
  return (
    <input
      class="number"
      type="number"
      inputMode="decimal"
      aria-label={props.label}
      value={text ?? String(props.value)}
      min={props.least}
      max={props.most}
      step={props.step ?? 1}
      onInput={(event) => {
        setText(event.currentTarget.value);
        take(event.currentTarget.value);
      }}
      onBlur={() => setText(null)}
    />
  );
}

let loading = 0;
const waiting: (() => void)[] = [];
const thumbs = new Map<string, string>();

async function inTurn<T>(act: () => Promise<T>): Promise<T> {
  // A few at a time: a browser opens six connections to a host, and the rest of the studio needs some.
  if (loading >= 3) await new Promise<void>((resolve) => waiting.push(resolve));
  loading++;
  try {
    return await act();
  } finally {
    loading--;
    waiting.shift()?.();
  }
}

/** Where a feature fires, small; made when it is first seen. */
export function Thumb({ sae, index }: { sae: string; index: number }) {
  const key = `${server.value.generation}/${sae}/${index}`;
  const [source, setSource] = useState(thumbs.get(key) ?? "");
  const holder = useRef<HTMLDivElement>(null);
  useEffect(() => {
    setSource(thumbs.get(key) ?? "");
    if (thumbs.has(key) || !holder.current) return undefined;
    const stop = new AbortController();
    const watching = new IntersectionObserver(
      ([entry]) => {
        if (!entry?.isIntersecting) return;
        watching.disconnect();
        void inTurn(async () => {
          if (stop.signal.aborted) return;
          const address = URL.createObjectURL(await getThumb(sae, index, stop.signal));
          thumbs.set(key, address);
          if (!stop.signal.aborted) setSource(address);
        }).catch(() => undefined);
      },
      { rootMargin: "120px" },
    );
    watching.observe(holder.current);
    return () => {
      stop.abort();
      watching.disconnect();
    };
  }, [key]);
  return (
    <div class={`thumb ${source ? "" : "loading"}`} ref={holder}>
      {source && <img src={source} alt="" decoding="async" />}
    </div>
  );
}

/** A PNG that is held in this page. */
export function BlobImage({ blob, alt, class: name }: { blob: Blob; alt: string; class?: string }) {
  const [source, setSource] = useState("");
  useEffect(() => {
    const address = URL.createObjectURL(blob);
    setSource(address);
    return () => URL.revokeObjectURL(address);
  }, [blob]);
  return source ? <img class={name ?? ""} src={source} alt={alt} decoding="async" /> : <span class={`${name ?? ""} loading`} />;
}

/** A few bars: how large something is beside others of its kind. */
export function Meter({ share, tone }: { share: number; tone?: string }) {
  return (
    <span class="meter" aria-hidden="true">
      <span style={{ width: `${Math.max(2, Math.min(100, share * 100))}%`, ...(tone ? { background: tone } : {}) }} />
    </span>
  );
}

export const percent = (share: number) =>
  share === 0 ? "0 %" : share < 0.001 ? "< 0.1 %" : `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
export const short = (value: number) =>
  Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(2);

export function Empty(props: { icon: IconName; title: string; children?: ComponentChildren }) {
  return (
    <div class="empty">
      <span class="empty-icon"><Icon name={props.icon} size={28} /></span>
      <h2>{props.title}</h2>
      {props.children}
    </div>
  );
}

export function save(blob: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
