// The numbers of the last 15 minutes. Each new point drops older ones, so a page that is open for hours uses no more
// memory than after 15 minutes.
import { timestampMs } from "@bufbuild/protobuf/wkt";
import type { Point } from "../../src/gen/ops/v1/ops_pb.js";

export const keepSeconds = 900;

/** Names of the numbers, in the order of Series.columns after the time. */
export const names = ["inserted", "published", "applied", "backlog", "queued", "retrying", "dead", "lag"] as const;

export class Series {
  /** Times in seconds, then a column for each name. */
  readonly columns: number[][] = [[], ...names.map(() => [])];

  add(point: Point): void {
    const at = point.at ? timestampMs(point.at) / 1000 : 0;
    const times = this.columns[0]!;
    if (times.length > 0 && at <= times[times.length - 1]!) return; // the history of a new connection repeats points
    times.push(at);
    names.forEach((name, i) => this.columns[i + 1]!.push(Number(point[name])));
    let old = 0;
    while (old < times.length && times[old]! < at - keepSeconds) old++;
    if (times.length - old > keepSeconds) old = times.length - keepSeconds;
    if (old > 0) for (const column of this.columns) column.splice(0, old);
  }

  get length(): number {
    return this.columns[0]!.length;
  }
}
