/** The keys, listed, and the switch that turns them off. */
import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { IconButton } from "../parts/controls.tsx";

export const keysOn = signal(true);
export const setKeysOn = (on: boolean) => (keysOn.value = on);

const KEYS: readonly (readonly [string, readonly (readonly [string, string])[]])[] = [
  ["Painting", [
    ["B", "brush"], ["E", "eraser"], ["R", "box"], ["L", "lasso"], ["F", "fill"], ["V", "move the mask"],
    ["[ and ]", "smaller, larger"], ["Shift [ and ]", "softer, harder"], ["1 to 9", "how much is painted"], ["X", "paint or erase"],
    ["I", "invert the mask"], ["Shift C", "clear the mask"], ["G", "show what the model sees"],
  ]],
  ["Cells, without a pointer", [
    ["Tab", "to the picture"], ["arrows", "walk over the cells"], ["Space", "paint or clear the cell"], ["Shift arrows", "paint along the way"],
  ]],
  ["Everywhere", [
    ["Ctrl Z", "undo"], ["Ctrl Shift Z", "redo"], ["Enter", "draw now"], ["Esc", "stop the stroke, or the drawing"],
    ["hold \\", "see the plain picture"], ["Alt ↑ ↓", "layer above, below"], ["0", "whole picture"], ["Space and drag", "move the picture"], ["?", "this list"],
  ]],
];

export function Keys(props: { open: boolean; onClose: () => void; on: boolean; setOn: (on: boolean) => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    if (props.open) dialog.current?.showModal();
    else dialog.current?.close();
  }, [props.open]);
  return (
    <dialog ref={dialog} class="keys" aria-labelledby="keys-title" onClose={props.onClose}
      onClick={(event) => event.target === dialog.current && props.onClose()}>
      <header>
        <h2 id="keys-title">Keys</h2>
        <label class="switch"><input type="checkbox" checked={props.on} onChange={(event) => props.setOn(event.currentTarget.checked)} /> in use</label>
        <IconButton icon="close" label="Close" onClick={props.onClose} />
      </header>
      <div class="keys-columns">
        {KEYS.map(([title, rows]) => (
          <section>
            <h3>{title}</h3>
            <dl>{rows.map(([key, what]) => <div><dt><kbd>{key}</kbd></dt><dd>{what}</dd></div>)}</dl>
          </section>
        ))}
      </div>
    </dialog>
  );
}
