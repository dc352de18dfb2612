// Makes one call and prints what came of it, a line of JSON for each message and one for the end: for the test that
// compares clients.
//
//   node dist/test/call.js '{"baseUrl": ..., "protocol": ..., "headers": {...}, "method": "getOrder", "request": {...}, "timeoutMs": 500}'
//
// In place of a request that is too long for a command line, its text may come on standard input.
import { readFileSync } from "node:fs";
import { fromJson, type JsonValue, type Message, toJson } from "@bufbuild/protobuf";
import { Code, ConnectError, createOrderClient, fieldViolations, OrderService } from "../src/client.js";

interface Call {
  baseUrl: string;
  protocol: "connect" | "grpc-web";
  headers: Record<string, string>;
  method: keyof typeof OrderService.method;
  request?: JsonValue;
  timeoutMs?: number;
}

const call: Call = JSON.parse(process.argv[2] ?? "");
const client = createOrderClient({ baseUrl: call.baseUrl, protocol: call.protocol, headers: () => call.headers });
const method = OrderService.method[call.method];
const request = fromJson(method.input, call.request ?? JSON.parse(readFileSync(0, "utf8")));

function print(message: Message): void {
  console.log(JSON.stringify({ message: toJson(method.output, message as never) }));
}

try {
  // The types of methods differ, and which one it is, is known at run time only.
  const made = (client[call.method] as (request: Message, options: object) => Promise<Message> | AsyncIterable<Message>)(request, {
    timeoutMs: call.timeoutMs,
  });
  if (Symbol.asyncIterator in made) {
    for await (const message of made) print(message);
  } else {
    print(await made);
  }
  console.log(JSON.stringify({ code: "ok" }));
} catch (error) {
  const code = Code[ConnectError.from(error).code] ?? "";
  const name = code.replace(/[A-Z]/g, (letter, at) => (at > 0 ? "_" : "") + letter.toLowerCase());
  console.log(JSON.stringify({ code: name, violations: fieldViolations(error).map(({ field }) => field), text: String(error) }));
}
