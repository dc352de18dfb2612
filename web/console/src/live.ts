// The stream of samples that all pages share. It reconnects until the console is closed, and keeps the last sample and
// the series.
import type { Station } from "../../src/gen/ops/v1/ops_pb.js";
import { api, isUnauthenticated, reason } from "./api.js";
import { Series } from "./series.js";

export interface Live {
  stations: Station[];
  series: Series;
  /** Why there are no new samples; "" while there are. */
  problem: string;
}

type Listener = (live: Live) => void;

const listeners = new Set<Listener>();
const live: Live = { stations: [], series: new Series(), problem: "connecting" };

/** follow calls a listener now and for each sample, until the signal is aborted. */
export function follow(listener: Listener, signal: AbortSignal): void {
  listeners.add(listener);
  signal.addEventListener("abort", () => listeners.delete(listener));
  listener(live);
}

function notify(): void {
  for (const listener of listeners) listener(live);
}

const shortest = 500;
const longest = 5000;

/** watch receives samples until the signal is aborted. */
export async function watch(signal: AbortSignal, onUnauthenticated: () => void): Promise<void> {
  for (let pause = shortest; !signal.aborted; pause = Math.min(2 * pause, longest)) {
    try {
      for await (const sample of api.watchFlow({}, { signal })) {
        for (const point of sample.history) live.series.add(point);
        if (sample.point) live.series.add(sample.point);
        live.stations = sample.stations;
        live.problem = "";
        pause = shortest;
        notify();
      }
      live.problem = "The connection ended.";
    } catch (error) {
      if (signal.aborted) return;
      if (isUnauthenticated(error)) return onUnauthenticated();
      live.problem = reason(error);
    }
    notify();
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}
