// Clients of the API for browsers and Node.js, with the types of proto/.
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
  /** URL of the API, such as http://127.0.0.1:8080. */
  baseUrl: string;
  /** Returns the headers of a call. Each call requests them, since a token may have been refreshed. */
  headers?: () => HeadersInit | Promise<HeadersInit>;
  /** The protocol. Both work through any proxy; Connect is readable in the browser's tools. Default "connect". */
  protocol?: "connect" | "grpc-web";
}

// example
/** createOrderClient makes a client of OrderService. */
export function createOrderClient(options: ApiOptions): Client<typeof OrderService> {
  return createApiClient(OrderService, options);
}
// /example

/** createApiClient makes a client of any service of the API. */
export function createApiClient<S extends DescService>(service: S, options: ApiOptions): Client<S> {
  return createClient(service, createTransport(options));
}

/** createTransport makes a transport that several clients can share. */
export function createTransport({ baseUrl, headers, protocol = "connect" }: ApiOptions): Transport {
  const interceptors: Interceptor[] = headers ? [withHeaders(headers)] : [];
  const create = protocol === "connect" ? createConnectTransport : createGrpcWebTransport;
  return create({ baseUrl, interceptors });
}

function withHeaders(headers: () => HeadersInit | Promise<HeadersInit>): Interceptor {
  return (next) => async (req) => {
    new Headers(await headers()).forEach((value, name) => req.header.set(name, value));
    return next(req);
  };
}

/** FieldViolation describes an invalid field of a request. */
export interface FieldViolation {
  /** The name in the proto file: order_id, lines[0].sku. Empty for the message as a whole. */
  field: string;
  message: string;
}

/** fieldViolations returns the invalid fields of a refused request, and nothing for other errors. */
export function fieldViolations(error: unknown): FieldViolation[] {
  return ConnectError.from(error)
    .findDetails(ViolationsSchema)
    .flatMap((detail) => detail.violations)
    .map((violation) => ({ field: fieldName(violation.field), message: violation.message }));
}

function fieldName(path: FieldPath | undefined): string {
  return (path?.elements ?? [])
    .map(({ fieldName, subscript }) => {
      const index = subscript.case === undefined ? "" : `[${JSON.stringify(subscript.value, plain)}]`;
      return fieldName + index;
    })
    .join(".");
}

function plain(_: string, value: unknown): unknown {
  return typeof value === "bigint" ? Number(value) : value;
}
