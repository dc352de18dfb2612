// Opens a page of another origin in a real Chromium. The page places an order with a durable call and watches its
// operation. Prints what the page sees as JSON.
//
//   node origin.mjs '{"page": ..., "api": ..., "order": ..., "chromium": ...}'
import { chromium } from "playwright-core";

const { page: address, api, order, chromium: executablePath } = JSON.parse(process.argv[2]);
const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"];
const browser = await chromium.launch({ executablePath, args });
const page = await browser.newPage();
await page.goto(address);
const seen = await page.evaluate(
  async ({ api, order }) => {
    const call = (method, type, body, headers) =>
      fetch(`${api}/${method}`, {
        method: "POST",
        body,
        headers: { "content-type": type, "connect-protocol-version": "1", ...headers },
      });
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
    // A message of a stream: a byte of flags, four bytes of length, JSON.
    const text = new TextEncoder().encode(JSON.stringify({ name }));
    const frame = new Uint8Array(5 + text.length);
    new DataView(frame.buffer).setUint32(1, text.length);
    frame.set(text, 5);
    const watch = "shop.operations.v1.OperationService/WatchOperation";
    const watched = await call(watch, "application/connect+json", frame, {});
    return {
      status: placed.status,
      operation: name,
      applied: placed.headers.get("preference-applied"),
      requestId: placed.headers.get("x-request-id"),
      same: again.headers.get("operation") === name,
      watched: await watched.text(), // until the stream ends, with the operation
    };
  },
  { api, order },
);
console.log(JSON.stringify(seen));
await browser.close();
