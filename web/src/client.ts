// Clients of the API, for browsers and Node.js: the same calls as in Go, typed by proto/.
import type { DescService } from "@bufbuild/protobuf";
import { type Client, ConnectError, createClient, type Interceptor, type Transport } from "@connectrpc/connect";
import { createConnectTransport, createGrpcWebTransport } from "@connectrpc/connect-web";
import { type FieldPath, ViolationsSchema } from "./gen/buf/validate/validate_pb.js";
// example
import { OrderService } from "./gen/orders/v1/orders_pb.js";
// /example

export { Code, ConnectError } from "@connectrpc/connect";
// example
export * from "./gen/orders/v1/orders_pb.js";
// /example

export interface ApiOptions {
  /** Where the API is: http://127.0.0.1:8080 */
  baseUrl: string;
  /** Headers of every call, asked for anew each time: a token may have been refreshed. */
  headers?: () => HeadersInit | Promise<HeadersInit>;
  /** How calls travel. Both go through any proxy; Connect can be read in the browser's tools. Default "connect". */
  protocol?: "connect" | "grpc-web";
}

// example
/** createOrderClient makes a client of the orders. */
export function createOrderClient(options: ApiOptions): Client<typeof OrderService> {
  return createApiClient(OrderService, options);
}
// /example

/** createApiClient makes a client of any service of the API. */
export function createApiClient<S extends DescService>(service: S, options: ApiOptions): Client<S> {
  return createClient(service, createTransport(options));
}

/** createTransport makes what several clients can share. */
export function createTransport({ baseUrl, headers, protocol = "connect" }: ApiOptions): Transport {
  const interceptors: Interceptor[] = headers ? [withHeaders(headers)] : [];
  return protocol === "connect" ? createConnectTransport({ baseUrl, interceptors }) : createGrpcWebTransport({ baseUrl, interceptors });
}

function withHeaders(headers: () => HeadersInit | Promise<HeadersInit>): Interceptor {
  return (next) => async (req) => {
    new Headers(await headers()).forEach((value, name) => req.header.set(name, value));
    return next(req);
  };
}

/** FieldViolation says what is wrong with a field of a request. */
export interface FieldViolation {
  /** As the proto file names it: order_id, lines[0].sku. Empty for the message as a whole. */
  field: string;
  message: string;
}

/** fieldViolations returns which fields of a request were refused. It is empty for any error but that. */
export function fieldViolations(error: unknown): FieldViolation[] {
  return ConnectError.from(error)
    .findDetails(ViolationsSchema)
    .flatMap((detail) => detail.violations)
    .map((violation) => ({ field: fieldName(violation.field), message: violation.message }));
}

function fieldName(path: FieldPath | undefined): string {
  return (path?.elements ?? [])
    .map(({ fieldName, subscript }) => fieldName + (subscript.case === undefined ? "" : `[${JSON.stringify(subscript.value, plain)}]`))
    .join(".");
}

function plain(_: string, value: unknown): unknown {
  return typeof value === "bigint" ? Number(value) : value;
}
