// Opens a page of another origin in a real Chromium. The page places an order durably and watches its operation, and
// what it sees is printed as JSON.
//
//   node origin.mjs '{"page": ..., "api": ..., "order": ..., "chromium": ...}'
import { chromium } from "playwright-core";

const { page: address, api, order, chromium: executablePath } = JSON.parse(process.argv[2]);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking"] });
const page = await browser.newPage();
await page.goto(address);
const seen = await page.evaluate(
  async ({ api, order }) => {
    const call = (method, type, body, headers) =>
      fetch(`${api}/${method}`, { method: "POST", body, headers: { "content-type": type, "connect-protocol-version": "1", ...headers } });
    const place = () =>
      call("orders.v1.OrderService/PlaceOrder", "application/json", order, {
        prefer: "respond-async",
        "idempotency-key": "from a page",
        "x-request-id": "page-1",
        traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        tracestate: "a=b",
        baggage: "c=d",
      });
    const placed = await place();
    const name = placed.headers.get("operation");
    const again = await place();
    // A stream's message: a byte of flags, four of length, JSON.
    const text = new TextEncoder().encode(JSON.stringify({ name }));
    const frame = new Uint8Array(5 + text.length);
    new DataView(frame.buffer).setUint32(1, text.length);
    frame.set(text, 5);
    const watched = await call("shop.operations.v1.OperationService/WatchOperation", "application/connect+json", frame, {});
    return {
      status: placed.status,
      operation: name,
      applied: placed.headers.get("preference-applied"),
      requestId: placed.headers.get("x-request-id"),
      same: again.headers.get("operation") === name,
      watched: await watched.text(), // to the stream's end, which is the operation's
    };
  },
  { api, order },
);
console.log(JSON.stringify(seen));
await browser.close();
