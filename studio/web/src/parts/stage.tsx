/** A picture that can be zoomed, moved and pointed at, with something drawn over it. */
import { useSignalEffect, type Signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import type { Point, Size } from "../lib/raster.ts";
import { fit, pan, toPicture, zoom, type View } from "../lib/view.ts";

export interface Pointed {
  /** In pixels of the picture. */
  at: Point;
  pressure: number;
  /** Events that the browser put together into this one, oldest first. */
  path: Point[];
  event: PointerEvent;
}

export interface StageProps {
  picture: CanvasImageSource | null;
  size: Size;
  /** Shared by stages that show the same place; null: the whole picture. */
  view: Signal<View | null>;
  label: string;
  /** Draws in device pixels; `place` maps pixels of the picture to them. */
  draw?: (context: CanvasRenderingContext2D, place: (at: Point) => Point, ratio: number, scale: number) => void;
  /** Draw again when one of these changes. */
  depends?: readonly unknown[];
  cursor?: string;
  onDown?: (pointed: Pointed) => boolean;
  onMove?: (pointed: Pointed) => void;
  onUp?: (pointed: Pointed | null) => void;
  onLeave?: () => void;
  onKeyDown?: (event: KeyboardEvent) => void;
  onWheel?: (event: WheelEvent) => boolean;
  describedBy?: string;
  children?: ComponentChildren;
}

export function Stage(props: StageProps) {
  const holder = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const element = useRef<Size>({ width: 0, height: 0 });
  const pointers = useRef(new Map<number, Point>());
  const gesture = useRef<"none" | "use" | "pan" | "pinch">("none");
  const space = useRef(false);
  const latest = useRef(props);
  latest.current = props;
  const frame = useRef(0);
  const stretched = useRef<{ seen: unknown[]; canvas: OffscreenCanvas } | null>(null);

  const viewNow = () => latest.current.view.value ?? fit(latest.current.size, element.current, 0);

  const paint = () => {
    frame.current = 0;
    const drawn = canvas.current;
    const context = drawn?.getContext("2d");
    if (!drawn || !context || !element.current.width) return;
    const { picture, size, draw } = latest.current;
    const ratio = drawn.width / element.current.width;
    const view = viewNow();
    const place = (at: Point) => ({
      x: Math.round((view.x + at.x * view.scale) * ratio),
      y: Math.round((view.y + at.y * view.scale) * ratio),
    });
    const [from, to] = [place({ x: 0, y: 0 }), place({ x: size.width, y: size.height })];
    const smooth = view.scale < 8;
    const seen = [picture, drawn.width, drawn.height, from.x, from.y, to.x, to.y, smooth];
    // Stretching a picture costs more than all that is drawn over it, and while one paints it stays the same.
    if (!stretched.current || seen.some((part, at) => part !== stretched.current!.seen[at])) {
      const canvas = new OffscreenCanvas(drawn.width, drawn.height);
      const own = canvas.getContext("2d")!;
      own.imageSmoothingEnabled = smooth;
      own.imageSmoothingQuality = "high";
      if (picture) own.drawImage(picture, from.x, from.y, to.x - from.x, to.y - from.y);
      stretched.current = { seen, canvas };
    }
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.globalCompositeOperation = "copy";
    context.drawImage(stretched.current.canvas, 0, 0);
    context.globalCompositeOperation = "source-over";
    draw?.(context, place, ratio, view.scale);
  };
  const redraw = () => {
    frame.current ||= requestAnimationFrame(paint);
  };

  useLayoutEffect(() => {
    const [drawn, held] = [canvas.current!, holder.current!];
    const resize = () => {
      const box = held.getBoundingClientRect();
      element.current = { width: box.width, height: box.height };
      // Pixels of the device, so that a cell's edge falls on one.
      drawn.width = Math.max(1, Math.round(box.width * devicePixelRatio));
      drawn.height = Math.max(1, Math.round(box.height * devicePixelRatio));
      paint();
    };
    const watching = new ResizeObserver(resize);
    watching.observe(held);
    const ratio = matchMedia(`(resolution: ${devicePixelRatio}dppx)`);
    ratio.addEventListener("change", resize);
    return () => {
      watching.disconnect();
      ratio.removeEventListener("change", resize);
      cancelAnimationFrame(frame.current);
    };
  }, []);

  useEffect(redraw, [props.picture, props.size.width, props.size.height, ...(props.depends ?? [])]);
  useSignalEffect(() => {
    void props.view.value;
    redraw();
  });

  const pointOf = (event: PointerEvent | WheelEvent): Point => {
    const box = canvas.current!.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };
  const pointed = (event: PointerEvent): Pointed => {
    const view = viewNow();
    const events = event.getCoalescedEvents?.() ?? [];
    const path = (events.length ? events : [event]).map((one) => toPicture(view, pointOf(one)));
    // A mouse says 0 or 0.5, which stands for nothing.
    const pressure = event.pointerType === "pen" ? event.pressure : 1;
    return { at: toPicture(view, pointOf(event)), pressure, path, event };
  };

  useEffect(() => {
    const drawn = canvas.current!;
    const wheel = (event: WheelEvent) => {
      event.preventDefault();
      if (latest.current.onWheel?.(event)) return;
      latest.current.view.value = zoom(viewNow(), Math.exp(-event.deltaY / (event.ctrlKey ? 120 : 400)), pointOf(event));
    };
    drawn.addEventListener("wheel", wheel, { passive: false });
    const key = (event: KeyboardEvent) => {
      if (event.code === "Space") space.current = event.type === "keydown";
    };
    addEventListener("keydown", key);
    addEventListener("keyup", key);
    return () => {
      drawn.removeEventListener("wheel", wheel);
      removeEventListener("keydown", key);
      removeEventListener("keyup", key);
    };
  }, []);

  const down = (event: PointerEvent) => {
    canvas.current!.setPointerCapture(event.pointerId);
    pointers.current.set(event.pointerId, pointOf(event));
    if (pointers.current.size === 2) {
      if (gesture.current === "use") latest.current.onUp?.(null); // two fingers move the picture: no stroke
      gesture.current = "pinch";
      return;
    }
    if (event.button === 1 || space.current) gesture.current = "pan";
    else if (event.button === 0) gesture.current = latest.current.onDown?.(pointed(event)) ? "use" : "pan";
  };
  const move = (event: PointerEvent) => {
    const before = pointers.current.get(event.pointerId);
    const now = pointOf(event);
    if (before && gesture.current === "pinch" && pointers.current.size === 2) {
      const other = [...pointers.current].find(([id]) => id !== event.pointerId)![1];
      const apart = (point: Point) => Math.max(1, Math.hypot(point.x - other.x, point.y - other.y));
      const middle = { x: (now.x + other.x) / 2, y: (now.y + other.y) / 2 };
      const moved = pan(viewNow(), (now.x - before.x) / 2, (now.y - before.y) / 2);
      latest.current.view.value = zoom(moved, apart(now) / apart(before), middle);
    } else if (before && gesture.current === "pan" && event.buttons) {
      latest.current.view.value = pan(viewNow(), now.x - before.x, now.y - before.y);
    } else latest.current.onMove?.(pointed(event));
    if (before) pointers.current.set(event.pointerId, now);
  };
  const up = (event: PointerEvent) => {
    pointers.current.delete(event.pointerId);
    if (gesture.current === "use") latest.current.onUp?.(event.type === "pointercancel" ? null : pointed(event));
    if (!pointers.current.size) gesture.current = "none";
  };

  return (
    <div class="stage" ref={holder}>
      <canvas
        ref={canvas}
        tabIndex={0}
        role="application"
        aria-label={props.label}
        aria-describedby={props.describedBy}
        style={{ cursor: props.cursor ?? "default" }}
        onPointerDown={down}
        onPointerMove={move}
        onPointerUp={up}
        onPointerCancel={up}
        onPointerLeave={() => latest.current.onLeave?.()}
        onContextMenu={(event) => event.preventDefault()}
        onKeyDown={(event) => latest.current.onKeyDown?.(event)}
      />
      {props.children}
    </div>
  );
}
