/** What leaves the studio: a link, a picture that holds how it was made, a steering file, Python, all in a zip. */
import { exportAs } from "../state/api.ts";
import { acting, doc } from "../state/doc.ts";
import { linkTooLong, say } from "../state/studio.ts";
import { runOf, type Run } from "../state/wire.ts";
import { Menu, save } from "./controls.tsx";
import { Icon } from "./icons.tsx";

const NAMES = { png: "picture.png", zip: "turbolens.zip", json: "steering.json", yaml: "steering.yaml", python: "steer.py" } as const;

export async function exportRun(run: Run, as: keyof typeof NAMES): Promise<void> {
  try {
    save(await exportAs(run, as), NAMES[as]);
  } catch (error) {
    say(error instanceof Error ? error.message : "It cannot be saved.");
  }
}

async function copyLink(): Promise<void> {
  if (linkTooLong.value) return say("The masks are too large for a link; save a zip or the picture instead.");
  try {
    await navigator.clipboard.writeText(location.href);
    say("The link is copied; it opens this very state.");
  } catch {
    say("This browser does not let pages copy; the address bar has the link.");
  }
}

export function ShareMenu({ run }: { run?: Run }) {
  const now = () => run ?? runOf(doc.value, acting.value);
  return (
    <Menu class="share" label="Save" summaryClass="small" summary={<><Icon name="download" size={15} /><span>Save</span></>}>
        <button type="button" onClick={() => void exportRun(now(), "png")}>Picture (PNG, with how it was made)</button>
        <button type="button" onClick={() => void exportRun(now(), "json")}>Steering file (JSON)</button>
        <button type="button" onClick={() => void exportRun(now(), "yaml")}>Steering file (YAML)</button>
        <button type="button" onClick={() => void exportRun(now(), "python")}>Python for the SDK</button>
        <button type="button" onClick={() => void exportRun(now(), "zip")}>All of it (zip)</button>
        {!run && <button type="button" onClick={() => void copyLink()}>Copy a link to this state</button>}
    </Menu>
  );
}
