// The client of ops.v1, and the credential it sends: kept in this tab only, and never in a cookie, so that no other
// page can make the browser send it.
import { type Client, Code, ConnectError, createClient } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-web";
import { OpsService } from "../../src/gen/ops/v1/ops_pb.js";

const slot = "credential";

/** signIn keeps a credential for as long as the tab lives; "" forgets it. */
export function signIn(credential: string): void {
  if (credential) sessionStorage.setItem(slot, credential);
  else sessionStorage.removeItem(slot);
}

export function isSignedIn(): boolean {
  return sessionStorage.getItem(slot) !== null;
}

/** header is how a credential is sent: a token has three parts, an API key has two. */
function header(credential: string): [string, string] {
  return credential.split(".").length === 3 ? ["authorization", `Bearer ${credential}`] : ["x-api-key", credential];
}

export const api: Client<typeof OpsService> = createClient(
  OpsService,
  createConnectTransport({
    // The page is at console/, next to the procedures: a proxy may have put a path before both.
    baseUrl: new URL("..", location.href).href.replace(/\/$/, ""),
    interceptors: [
      (next) => (request) => {
        const credential = sessionStorage.getItem(slot);
        if (credential) request.header.set(...header(credential));
        return next(request);
      },
    ],
  }),
);

/** reason says what went wrong, for people. */
export function reason(error: unknown): string {
  const failure = ConnectError.from(error);
  switch (failure.code) {
    case Code.PermissionDenied:
      return "Your roles do not allow this.";
    case Code.Unauthenticated:
      return "You are not signed in, or your credential has expired.";
    case Code.Unavailable:
      return "The service cannot be reached, or its database is away.";
    case Code.Unknown:
      return failure.rawMessage === "Failed to fetch" ? "The console's process cannot be reached." : failure.rawMessage;
  }
  return failure.rawMessage;
}

export function isUnauthenticated(error: unknown): boolean {
  return ConnectError.from(error).code === Code.Unauthenticated;
}
