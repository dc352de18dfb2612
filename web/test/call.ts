// Makes one call, and prints a line of JSON for each message and one for the end. The test that compares clients runs
// it.
//
//   node dist/test/call.js '{"baseUrl": ..., "protocol": ..., "headers": {...},
//     "method": "getOrder", "request": {...}, "timeoutMs": 500}'
//
// A request that is too long for the command line may be omitted there and come on standard input.
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
  // The types of methods differ, and the method is known only at run time.
  type Method = (request: Message, options: object) => Promise<Message> | AsyncIterable<Message>;
  const made = (client[call.method] as Method)(request, { timeoutMs: call.timeoutMs });
  if (Symbol.asyncIterator in made) {
    for await (const message of made) print(message);
  } else {
    print(await made);
  }
  console.log(JSON.stringify({ code: "ok" }));
} catch (error) {
  const code = Code[ConnectError.from(error).code] ?? "";
  const name = code.replace(/[A-Z]/g, (letter, at) => (at > 0 ? "_" : "") + letter.toLowerCase());
  const violations = fieldViolations(error).map(({ field }) => field);
  console.log(JSON.stringify({ code: name, violations, text: String(error) }));
}
