import { render } from "preact";
import { App } from "./app.tsx";
import { start } from "./state/studio.ts";
import "./styles.css";

start();
render(<App />, document.getElementById("app")!);
